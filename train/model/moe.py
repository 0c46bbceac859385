"""A mixture of experts in place of a block's MLP: route, sort, compute, combine.

No token is ever dropped, and none is computed that is not real: tokens of padding choose no expert, so they stand
behind all others in the sorted rows, where no expert reads them.

Shapes: T tokens, D hidden size, K experts a token, R = T·K rows sorted by expert, E experts.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from train.model.config import ModelConfig
from train.model.experts import Experts
from train.model.mlp import Mlp
from train.model.router import Router
from train.model.rows import Rows
from train.packs import TokenPacks

Shared = Callable[[], Tensor | None]


class MixtureOfExperts(nn.Module):
    """What parallelism may replace from outside: `exchange`, which has the rows computed wherever their experts are."""

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
        weights_TK = weights_TK.to(x_TD.dtype)
        out_TD, shared_TD = self.exchange(self.experts, x_TD, weights_TK, rows, lambda: self._shared(x_TD))
        return out_TD if shared_TD is None else out_TD + shared_TD

    def _shared(self, x_TD: Tensor) -> Tensor | None:
        if self.shared is None:
            return None
        out_TD = self.shared(x_TD)
        return out_TD if self.shared_gate is None else torch.sigmoid(self.shared_gate(x_TD)) * out_TD


def compute_here(
    experts: Experts, x_TD: Tensor, weights_TK: Tensor, rows: Rows, shared: Shared
) -> tuple[Tensor, Tensor | None]:
    """(for every token the sum of what its experts make of it, by weight; what the shared expert makes of all tokens),
    without leaving the rank."""
    return experts(x_TD, weights_TK, rows), shared()
