"""Rows sorted by expert: a row for each choice of a token, from tokens to rows and back.

Shapes: T tokens, D hidden size, K choices a token, R = T·K rows, E experts.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Rows:
    """(token, choice) pairs sorted by expert, padding (expert E) last.

    `order` int64[R]: the pair of each row; `place` int64[T, K]: the row of each pair; `counts` int64[E]: the rows of
    each expert; `padding` bool[T, 1], None where all tokens are real.
    """

    order: Tensor
    place: Tensor
    counts: Tensor
    padding: Tensor | None

    @classmethod
    def sort(cls, chosen_TK: Tensor, num_experts: int) -> "Rows":
        pairs = chosen_TK.flatten()
        order = pairs.argsort(stable=True)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=order.device)
        counts = counts.scatter_add_(0, pairs, torch.ones_like(pairs))[:-1]
        return cls(order, place.view_as(chosen_TK), counts, chosen_TK[:, :1] == num_experts)

    @property
    def token(self) -> Tensor:
        """int64[R]: of which token each row is."""
        return self.order // self.place.shape[1]

    @property
    def ends(self) -> Tensor:
        """int32[E]: where the rows of each expert end; rows behind the last are of padding."""
        return self.counts.cumsum(0).int()

    def gather(self, x_TD: Tensor) -> Tensor:
        """The rows of tokens, [R, D]."""
        return _Gather.apply(x_TD, self)

    def combine(self, y_RD: Tensor, weights_TK: Tensor | None) -> Tensor:
        """Every token's sum of its rows, by weight if there are any, 0 for padding: [T, D]."""
        return _Combine.apply(y_RD, weights_TK, self)

    def sum(self, y_RD: Tensor, weights_TK: Tensor | None = None) -> Tensor:
        """`combine` without gradient. One kernel, which reads each row once; rows gathered and then summed are R rows
        more of memory."""
        out_TD = nn.functional.embedding_bag(self.place, y_RD, per_sample_weights=weights_TK, mode="sum")
        return out_TD if self.padding is None else out_TD.masked_fill_(self.padding, 0.0)


class _Gather(torch.autograd.Function):
    """A gather both ways: autograd's own backward would add row by row, slowly and on CUDA in no fixed order."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, rows: Rows) -> Tensor:
        ctx.save_for_backward(*vars(rows).values())
        return x_TD.index_select(0, rows.token)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:
        return Rows(*ctx.saved_tensors).sum(grad_RD), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, weights_TK: Tensor | None, rows: Rows) -> Tensor:
        # Only the gradient of the weights needs what they weigh.
        ctx.save_for_backward(y_RD if weights_TK is not None else None, weights_TK, *vars(rows).values())
        return rows.sum(y_RD, weights_TK)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor | None, None]:
        y_RD, weights_TK, *of_rows = ctx.saved_tensors
        rows = Rows(*of_rows)
        grad_RD = grad_TD.index_select(0, rows.token)
        if weights_TK is None:
            return grad_RD, None, None
        grad_weights_TK = (grad_RD * y_RD).sum(1)[rows.place]
        if rows.padding is not None:  # its rows mean nothing: their weights are 0 and get no gradient
            grad_weights_TK = grad_weights_TK.masked_fill_(rows.padding, 0.0)
        return grad_RD.mul_(weights_TK.flatten()[rows.order, None]), grad_weights_TK, None
