"""Many small MLPs at once: matrix products in groups of rows.

Shapes: R rows sorted by expert, E experts (of this rank), D hidden size, F intermediate size of an expert. The rows of
expert e are `ends_E[e-1]:ends_E[e]`; rows from `ends_E[-1]` on belong to none: what comes out for them means nothing,
neither forward nor backward, and touches no weight's gradient.
"""

import itertools

import torch
from torch import Tensor, nn

from train.model.config import MoeConfig
from train.model.held import held
from train.model.mlp import activate


class Experts(nn.Module):
    """The experts of a layer, stacked: one parameter a projection, so that names do not depend on who holds which."""

    def __init__(self, hidden_size: int, config: MoeConfig, activation: str):
        super().__init__()
        E, D, F = config.num_experts, hidden_size, config.intermediate_size
        self.gate_proj = nn.Parameter(torch.empty(E, F, D))
        self.up_proj = nn.Parameter(torch.empty(E, F, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, F))
        with_bias = config.expert_bias
        self.gate_proj_bias = nn.Parameter(torch.empty(E, F)) if with_bias else None
        self.up_proj_bias = nn.Parameter(torch.empty(E, F)) if with_bias else None
        self.down_proj_bias = nn.Parameter(torch.empty(E, D)) if with_bias else None
        self.activation, self.limit, self.alpha = activation, config.swiglu_limit, config.swiglu_alpha

    def forward(self, x_RD: Tensor, ends_E: Tensor) -> Tensor:
        """[R, D]; `ends_E` is int32."""
        gate_RF = self._project(x_RD, "gate_proj", ends_E)
        up_RF = self._project(x_RD, "up_proj", ends_E)
        if self.limit is None:
            inner_RF = activate(gate_RF, self.activation) * up_RF
        else:
            gate_RF, up_RF = gate_RF.clamp(max=self.limit), up_RF.clamp(-self.limit, self.limit)
            inner_RF = gate_RF * torch.sigmoid(gate_RF * self.alpha) * (up_RF + 1)
        return self._project(inner_RF, "down_proj", ends_E)

    def _project(self, x: Tensor, name: str, ends_E: Tensor) -> Tensor:
        out = grouped_linear(x, held(getattr(self, name)), ends_E)
        bias = getattr(self, f"{name}_bias")
        if bias is None:
            return out
        rows = torch.arange(len(x), dtype=ends_E.dtype, device=x.device)
        expert_R = torch.searchsorted(ends_E, rows, right=True)
        nobody = torch.zeros_like(out[:0]).new_zeros(1, out.shape[1])  # rows of no expert touch no bias
        return out + torch.cat((held(bias), nobody)).index_select(0, expert_R)


def grouped_linear(x_RD: Tensor, weight_EFD: Tensor, ends_E: Tensor) -> Tensor:
    """x · weight[e]ᵀ for the rows of each expert e: [R, F]. One kernel for all groups, or a loop over them."""
    if has_kernel(x_RD, weight_EFD):
        return nn.functional.grouped_mm(x_RD, weight_EFD.transpose(1, 2), offs=ends_E)
    return _loop(x_RD, weight_EFD, ends_E)


def has_kernel(x_RD: Tensor, weight_EFD: Tensor) -> bool:
    """Whether one kernel takes all groups: on CUDA, in half precision, with rows that begin at multiples of 16 bytes.

    torch has it on CPU too, in float32; there the loop is faster and has float64.
    """
    half = x_RD.dtype in (torch.bfloat16, torch.float16)
    return x_RD.device.type == "cuda" and half and all(size % 8 == 0 for size in weight_EFD.shape[1:])


@torch.library.custom_op("meshpack::grouped_linear", mutates_args=())
def _loop(x_RD: Tensor, weight_EFD: Tensor, ends_E: Tensor) -> Tensor:
    out_RF = x_RD.new_empty(len(x_RD), weight_EFD.shape[1])
    for e, rows in enumerate(_groups(ends_E)):
        torch.mm(x_RD[rows], weight_EFD[e].t(), out=out_RF[rows])
    return out_RF


@torch.library.custom_op("meshpack::grouped_linear_backward", mutates_args=())
def _loop_backward(grad_RF: Tensor, x_RD: Tensor, weight_EFD: Tensor, ends_E: Tensor) -> tuple[Tensor, Tensor]:
    grad_RF = grad_RF.contiguous()  # may arrive expanded
    grad_x, grad_weight = torch.empty_like(x_RD), torch.empty_like(weight_EFD)
    for e, rows in enumerate(_groups(ends_E)):
        torch.mm(grad_RF[rows], weight_EFD[e], out=grad_x[rows])
        torch.mm(grad_RF[rows].t(), x_RD[rows], out=grad_weight[e])  # no rows: 0
    return grad_x, grad_weight


def _groups(ends_E: Tensor) -> list[slice]:
    """The rows of each expert, perhaps none."""
    return [slice(start, stop) for start, stop in itertools.pairwise((0, *ends_E.tolist()))]


@_loop.register_fake
def _(x_RD, weight_EFD, ends_E):
    return x_RD.new_empty(len(x_RD), weight_EFD.shape[1])


@_loop_backward.register_fake
def _(grad_RF, x_RD, weight_EFD, ends_E):
    return torch.empty_like(x_RD), torch.empty_like(weight_EFD)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad_RF):
    return *_loop_backward(grad_RF, *ctx.saved_tensors), None


_loop.register_autograd(_backward, setup_context=_save)
GROUPED_LINEAR = _loop  # the operator, for policies that name it
