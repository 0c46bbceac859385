"""What an expert makes of its gate and up projection, and on a CPU what stands between its products in single passes.

Shapes: n rows, F intermediate size, D hidden size, T tokens.
"""

from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from train.model.mlp import activate


@dataclass(frozen=True)
class Gating:
    """activation(gate) · up; with a `limit` (GPT-OSS) both are clamped, and it is
    gate · sigmoid(alpha · gate) · (up + 1)."""

    activation: str
    limit: float | None
    alpha: float

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        if self.limit is None:
            return activate(gate, self.activation) * up
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return gate * torch.sigmoid(gate * self.alpha) * (up + 1)

    def without_gradient(self, gate_nF: Tensor, up_nF: Tensor) -> Tensor:
        """The same, in one pass where there is one."""
        if not self._in_loops(gate_nF):
            return self(gate_nF, up_nF)
        share_nF = torch.sigmoid(gate_nF)
        _loops().silu(share_nF.numpy(), gate_nF.numpy(), up_nF.numpy())
        return share_nF

    def backward(
        self, grad_nF: Tensor, gate_nF: Tensor, up_nF: Tensor, weights_n: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(the inner value again, by weight; the gradients of gate and up [n, F], by weight; that of the weights [n]).

        `grad_nF`, the gradient of the inner value without the weights, is overwritten.
        """
        if self._in_loops(grad_nF):
            share_nF, inner_nF, grad_weights_n = torch.sigmoid(gate_nF), torch.empty_like(grad_nF), weights_n.clone()
            tensors = (grad_nF, share_nF, gate_nF, up_nF, grad_weights_n, inner_nF)
            _loops().silu_backward(*(tensor.numpy() for tensor in tensors))
            return inner_nF, share_nF, grad_nF, grad_weights_n
        weighted = grad_nF * weights_n[:, None]
        if self.limit is None:
            inner = activate(gate_nF, self.activation)
            grad_up = weighted * inner
            weighted.mul_(up_nF)
            if self.activation == "silu":
                grad_gate = torch.ops.aten.silu_backward(weighted, gate_nF)
            else:
                grad_gate = torch.ops.aten.gelu_backward(weighted, gate_nF, approximate="tanh")
            inner.mul_(up_nF)
        else:
            gate, up = gate_nF.clamp(max=self.limit), up_nF.clamp(-self.limit, self.limit) + 1
            share = torch.sigmoid(gate * self.alpha)
            slope = share * (1 + self.alpha * gate * (1 - share))
            grad_gate = (weighted * up * slope).masked_fill_(gate_nF > self.limit, 0.0)
            glu = gate * share
            inner = glu * up
            grad_up = (weighted * glu).masked_fill_(up_nF.abs() > self.limit, 0.0)
        grad_weights = grad_nF.mul_(inner).sum(1)
        return inner.mul_(weights_n[:, None]), grad_gate, grad_up, grad_weights

    def _in_loops(self, value: Tensor) -> bool:
        return self.limit is None and self.activation == "silu" and _in_loops(value)


def add_rows(out_TD: Tensor, tokens_n: Tensor, rows_nD: Tensor, weights_n: Tensor | None) -> None:
    """Add rows, by weight if there are weights, to those of their tokens; `rows_nD` may be overwritten. `out_TD` is as
    wide as rows or wider, so that no product is rounded before the sum (as in `Rows.sum`)."""
    if out_TD.dtype == rows_nD.dtype and _in_loops(rows_nD):
        weights = None if weights_n is None else weights_n.numpy()
        _loops().add_rows(out_TD.numpy(), tokens_n.numpy(), rows_nD.numpy(), weights)
        return
    rows_nD = rows_nD.to(out_TD.dtype)
    out_TD.index_add_(0, tokens_n, rows_nD if weights_n is None else rows_nD.mul_(weights_n[:, None]))


def _in_loops(value: Tensor) -> bool:
    return value.device.type == "cpu" and value.dtype in (torch.float32, torch.float64)


@cache
def _loops() -> ModuleType:
    """Loaded by those who compute experts on a CPU, for it brings numba."""
    from train.model import loops

    return loops
