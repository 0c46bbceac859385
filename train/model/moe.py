"""A mixture of experts in place of a block's MLP: route, sort, compute, combine.

No token is ever dropped, and none is computed that is not real: tokens of padding choose no expert, so they stand
behind all others in the sorted rows, where no expert reads them.

Shapes: T tokens, D hidden size, K experts a token, R = T·K rows sorted by expert, E experts.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from train.model.config import ModelConfig
from train.model.experts import Experts
from train.model.mlp import Mlp
from train.model.router import Router
from train.model.rows import Rows
from train.packs import TokenPacks

Compute = Callable[[Tensor, Tensor | None, Rows], Tensor]
Shared = Callable[[], Tensor | None]


class MixtureOfExperts(nn.Module):
    """What parallelism may replace from outside: `exchange`, which has the rows computed wherever their experts are.

    `computed` counts the rows that the experts of this rank computed since it was last taken, when their backward runs
    (as `Router.loads` counts what was chosen): where fewer rows arrive than tokens chose, it shows.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        moe, D = config.moe, config.hidden_size
        self.router = Router(D, moe)
        self.experts = Experts(D, moe, config.activation)
        self.shared = Mlp(D, moe.shared_size, config.activation) if moe.shared_size else None
        self.shared_gate = nn.Linear(D, 1, bias=False) if moe.shared_gate else None
        self.exchange = compute_here
        self.computed: Tensor | None = None

    def forward(self, x_TD: Tensor, packs: TokenPacks) -> Tensor:
        out_TD, shared_TD = self.parts(x_TD, packs, x_TD)
        return out_TD if shared_TD is None else out_TD + shared_TD

    def parts(self, x_TD: Tensor, packs: TokenPacks, x_SD: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the chosen experts make of `x_TD`, the tokens of `packs`; what the shared expert, where there is one,
        makes of the S tokens of `x_SD`."""
        chosen_TK, weights_TK = self.router(x_TD, packs)
        rows = Rows.sort(chosen_TK, self.router.config.num_experts)
        return self.exchange(self._compute, x_TD, weights_TK.to(x_TD.dtype), rows, lambda: self._shared(x_SD))

    def _compute(self, x_TD: Tensor, weights_TK: Tensor | None, rows: Rows) -> Tensor:
        """`Experts.forward`, counted."""
        return _Counted.apply(self.experts(x_TD, weights_TK, rows), rows.counts, self)

    def take_computed(self) -> Tensor:
        """int64: how many rows the experts of this rank computed since the last call."""
        computed = torch.zeros((), dtype=torch.int64) if self.computed is None else self.computed
        self.computed = None
        return computed

    def _shared(self, x_TD: Tensor) -> Tensor | None:
        if self.shared is None:
            return None
        out_TD = self.shared(x_TD)
        return out_TD if self.shared_gate is None else torch.sigmoid(self.shared_gate(x_TD)) * out_TD


class _Counted(torch.autograd.Function):
    """Identity on what the experts made of `counts_E` rows; backward counts them."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, counts_E: Tensor, mixture: MixtureOfExperts) -> Tensor:
        ctx.mixture = mixture
        ctx.save_for_backward(counts_E)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        mixture, rows = ctx.mixture, ctx.saved_tensors[0].sum()
        mixture.computed = rows if mixture.computed is None else mixture.computed + rows
        return grad, None, None


def compute_here(
    compute: Compute, x_TD: Tensor, weights_TK: Tensor, rows: Rows, shared: Shared
) -> tuple[Tensor, Tensor | None]:
    """(for every token the sum of what its experts make of it, by weight; what the shared expert makes of its tokens),
    without leaving the rank."""
    return compute(x_TD, weights_TK, rows), shared()
