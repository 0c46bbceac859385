"""A mixture of experts in place of a block's MLP: route, sort, compute, combine.

No token is ever dropped, and none is computed that is not real: tokens of padding choose no expert, so they stand
behind all others in the sorted rows, where no expert reads them.

Shapes: T tokens, D hidden size, K experts a token, R = T·K rows sorted by expert, E experts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from train.model.config import ModelConfig
from train.model.experts import Experts
from train.model.mlp import Mlp
from train.model.router import Router
from train.packs import TokenPacks

Shared = Callable[[], Tensor | None]


class MixtureOfExperts(nn.Module):
    """What parallelism may replace from outside: `exchange`, which has the sorted rows computed wherever their experts
    are."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        moe, D = config.moe, config.hidden_size
        self.router = Router(D, moe)
        self.experts = Experts(D, moe, config.activation)
        self.shared = Mlp(D, moe.shared_size, config.activation) if moe.shared_size else None
        self.shared_gate = nn.Linear(D, 1, bias=False) if moe.shared_gate else None
        self.exchange = compute_here

    def forward(self, x_TD: Tensor, packs: TokenPacks) -> Tensor:
        chosen_TK, weights_TK = self.router(x_TD, packs)
        rows = Rows.sort(chosen_TK, self.router.config.num_experts)
        sorted_RD = _Sort.apply(x_TD, rows.order // chosen_TK.shape[1], rows.place, rows.padding)
        computed_RD, shared_TD = self.exchange(self.experts, sorted_RD, rows.counts, lambda: self._shared(x_TD))
        weights_TK = weights_TK.to(computed_RD.dtype)
        out_TD = _Combine.apply(computed_RD, weights_TK, rows.order, rows.place, rows.padding)
        return out_TD if shared_TD is None else out_TD + shared_TD

    def _shared(self, x_TD: Tensor) -> Tensor | None:
        if self.shared is None:
            return None
        out_TD = self.shared(x_TD)
        return out_TD if self.shared_gate is None else torch.sigmoid(self.shared_gate(x_TD)) * out_TD


def compute_here(experts: Experts, x_RD: Tensor, counts_E: Tensor, shared: Shared) -> tuple[Tensor, Tensor | None]:
    """(what the experts make of the sorted rows, what the shared expert makes of all tokens), without leaving the
    rank. `counts_E` int64: the rows of each expert."""
    return experts(x_RD, counts_E.cumsum(0).int()), shared()


@dataclass(frozen=True)
class Rows:
    """(token, choice) pairs sorted by expert, padding (expert E) last.

    `order` int64[R]: the pair of each row; `place` int64[T, K]: the row of each pair; `counts` int64[E]: the rows of
    each expert; `padding` bool[T, 1].
    """

    order: Tensor
    place: Tensor
    counts: Tensor
    padding: Tensor

    @classmethod
    def sort(cls, chosen_TK: Tensor, num_experts: int) -> "Rows":
        pairs = chosen_TK.flatten()
        order = pairs.argsort(stable=True)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=order.device)
        counts = counts.scatter_add_(0, pairs, torch.ones_like(pairs))[:-1]
        return cls(order, place.view_as(chosen_TK), counts, chosen_TK[:, :1] == num_experts)


class _Sort(torch.autograd.Function):
    """Rows of tokens, sorted by expert. A gather both ways: autograd's own backward would add row by row, slowly and on
    CUDA in no fixed order."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_R: Tensor, place_TK: Tensor, padding_T1: Tensor) -> Tensor:
        ctx.save_for_backward(place_TK, padding_T1)
        return x_TD.index_select(0, token_R)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None, None]:
        place_TK, padding_T1 = ctx.saved_tensors
        return _sum_of_rows(grad_RD, place_TK).masked_fill_(padding_T1, 0.0), None, None, None


def _sum_of_rows(y_RD: Tensor, place_TK: Tensor, weights_TK: Tensor | None = None) -> Tensor:
    """Every token's sum of its rows, by weight if there are any: [T, D]. One kernel, which reads each row once; rows
    gathered and then summed are K·T rows more of memory."""
    return nn.functional.embedding_bag(place_TK, y_RD, per_sample_weights=weights_TK, mode="sum")


class _Combine(torch.autograd.Function):
    """Every token's sum of its rows by weight; 0 for padding."""

    @staticmethod
    def forward(
        ctx: Any, y_RD: Tensor, weights_TK: Tensor, order_R: Tensor, place_TK: Tensor, padding_T1: Tensor
    ) -> Tensor:
        ctx.save_for_backward(y_RD, weights_TK, order_R, place_TK, padding_T1)
        return _sum_of_rows(y_RD, place_TK, weights_TK).masked_fill_(padding_T1, 0.0)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        y_RD, weights_TK, order_R, place_TK, padding_T1 = ctx.saved_tensors
        grad_RD = grad_TD.index_select(0, order_R // weights_TK.shape[1])
        grad_weight_R = (grad_RD * y_RD).sum(1)
        # Rows of padding mean nothing: their weights are 0 and get no gradient.
        grad_weights_TK = grad_weight_R[place_TK].masked_fill_(padding_T1, 0.0)
        return grad_RD.mul_(weights_TK.flatten()[order_R, None]), grad_weights_TK, None, None, None
