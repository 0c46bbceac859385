"""Many small MLPs at once: matrix products in groups of rows.

Shapes: R rows sorted by expert, E experts (of this rank), D hidden size, F intermediate size of an expert. The rows of
expert e are `ends_E[e-1]:ends_E[e]`; rows from `ends_E[-1]` on belong to none: what comes out for them means nothing,
neither forward nor backward, and touches no weight's gradient.

There are two ways. One kernel a projection for all groups, where there is one (`has_kernel`); else one expert after the
other, whole: its intermediate values then never leave the cache, and nothing of the size of all rows is made but what
comes out and what backward needs. With 64 experts on a CPU that is a quarter faster than projection after projection.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from train.model.config import MoeConfig
from train.model.held import held
from train.model.mlp import activate

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Gating:
    """What an expert makes of its gate and up projection: activation(gate) · up; with a `limit` (GPT-OSS) both are
    clamped, and it is gate · sigmoid(alpha · gate) · (up + 1)."""

    activation: str
    limit: float | None
    alpha: float

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        if self.limit is None:
            return activate(gate, self.activation) * up
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return gate * torch.sigmoid(gate * self.alpha) * (up + 1)

    def backward(self, grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(the inner value again, gradients of gate and up); `grad` is overwritten where that saves a buffer."""
        if self.limit is not None:
            clamped, wide = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit) + 1
            share = torch.sigmoid(clamped * self.alpha)
            slope = share * (1 + self.alpha * clamped * (1 - share))
            grad_gate = (grad * wide * slope).masked_fill_(gate > self.limit, 0.0)
            glu = clamped * share
            return glu * wide, grad_gate, (grad * glu).masked_fill_(up.abs() > self.limit, 0.0)
        activated = activate(gate, self.activation)
        grad_up = grad * activated
        grad.mul_(up)
        if self.activation == "silu":
            grad_gate = torch.ops.aten.silu_backward(grad, gate)
        else:
            grad_gate = torch.ops.aten.gelu_backward(grad, gate, approximate="tanh")
        return activated.mul_(up), grad_gate, grad_up


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
        self.gating = Gating(activation, config.swiglu_limit, config.swiglu_alpha)

    def forward(self, x_RD: Tensor, ends_E: Tensor) -> Tensor:
        """[R, D]; `ends_E` is int32."""
        weights = [held(getattr(self, name)) for name in PROJECTIONS]
        biases = [held(getattr(self, f"{name}_bias")) for name in PROJECTIONS]
        if not has_kernel(x_RD, weights[0]):
            gating = self.gating
            return _one_by_one(x_RD, *weights, *biases, ends_E, gating.activation, gating.limit, gating.alpha)[0]
        gate_RF, up_RF = (
            _with_kernel(x_RD, weight, bias, ends_E) for weight, bias in zip(weights[:2], biases[:2], strict=True)
        )
        return _with_kernel(self.gating(gate_RF, up_RF), weights[2], biases[2], ends_E)


def has_kernel(x_RD: Tensor, weight_EFD: Tensor) -> bool:
    """Whether one kernel takes all groups: on CUDA, in half precision, with rows that begin at multiples of 16 bytes.

    torch has it on CPU too, in float32; there it is a loop over the groups itself.
    """
    half = x_RD.dtype in (torch.bfloat16, torch.float16)
    return x_RD.device.type == "cuda" and half and all(size % 8 == 0 for size in weight_EFD.shape[1:])


def _with_kernel(x: Tensor, weight: Tensor, bias: Tensor | None, ends_E: Tensor) -> Tensor:
    out = nn.functional.grouped_mm(x, weight.transpose(1, 2), offs=ends_E)
    if bias is None:
        return out
    rows = torch.arange(len(x), dtype=ends_E.dtype, device=x.device)
    expert_R = torch.searchsorted(ends_E, rows, right=True)
    nobody = torch.zeros_like(out[:0]).new_zeros(1, out.shape[1])  # rows of no expert touch no bias
    return out + torch.cat((bias, nobody)).index_select(0, expert_R)


@torch.library.custom_op("meshpack::experts", mutates_args=())
def _one_by_one(
    x_RD: Tensor,
    gate_EFD: Tensor,
    up_EFD: Tensor,
    down_EDF: Tensor,
    gate_bias_EF: Tensor | None,
    up_bias_EF: Tensor | None,
    down_bias_ED: Tensor | None,
    ends_E: Tensor,
    activation: str,
    limit: float | None,
    alpha: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(what the experts make of the rows, and for backward gate and up projection [R, F])."""
    gating = Gating(activation, limit, alpha)
    gate_RF, up_RF = (x_RD.new_empty(len(x_RD), gate_EFD.shape[1]) for _ in range(2))
    out_RD = torch.empty_like(x_RD)
    for e, rows in enumerate(_groups(ends_E)):
        x, gate, up = x_RD[rows], gate_RF[rows], up_RF[rows]
        _linear(x, gate_EFD, gate_bias_EF, e, out=gate)
        _linear(x, up_EFD, up_bias_EF, e, out=up)
        _linear(gating(gate, up), down_EDF, down_bias_ED, e, out=out_RD[rows])
    return out_RD, gate_RF, up_RF


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, e: int, *, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, weight[e].t(), out=out)
    else:
        torch.addmm(bias[e], x, weight[e].t(), out=out)


@torch.library.custom_op("meshpack::experts_backward", mutates_args=())
def _one_by_one_backward(
    grad_RD: Tensor,
    x_RD: Tensor,
    gate_EFD: Tensor,
    up_EFD: Tensor,
    down_EDF: Tensor,
    gate_RF: Tensor,
    up_RF: Tensor,
    ends_E: Tensor,
    with_bias: bool,
    activation: str,
    limit: float | None,
    alpha: float,
) -> list[Tensor]:
    """Gradients of the rows, of the three weights and, `with_bias`, of the three biases."""
    gating = Gating(activation, limit, alpha)
    grad_RD = grad_RD.contiguous()  # may arrive expanded
    grads = [torch.empty_like(value) for value in (x_RD, gate_EFD, up_EFD, down_EDF)]
    grads += [weight.new_empty(weight.shape[:2]) for weight in (gate_EFD, up_EFD, down_EDF) if with_bias]
    for e, rows in enumerate(_groups(ends_E)):
        x, grad = x_RD[rows], grad_RD[rows]
        inner, grad_gate, grad_up = gating.backward(grad @ down_EDF[e], gate_RF[rows], up_RF[rows])
        grad_x = grads[0][rows]
        torch.mm(grad_gate, gate_EFD[e], out=grad_x)
        grad_x.addmm_(grad_up, up_EFD[e])
        # Of an expert without rows these are 0.
        for name, (of_out, value) in enumerate(((grad_gate, x), (grad_up, x), (grad, inner))):
            torch.mm(of_out.t(), value, out=grads[1 + name][e])
            if with_bias:
                torch.sum(of_out, 0, out=grads[4 + name][e])
    return grads


def _groups(ends_E: Tensor) -> list[slice]:
    """The rows of each expert, perhaps none."""
    return [slice(start, stop) for start, stop in itertools.pairwise((0, *ends_E.tolist()))]


@_one_by_one.register_fake
def _(x_RD, gate_EFD, up_EFD, down_EDF, *rest):
    inner = x_RD.new_empty(len(x_RD), gate_EFD.shape[1])
    return torch.empty_like(x_RD), inner, torch.empty_like(inner)


@_one_by_one_backward.register_fake
def _(grad_RD, x_RD, gate_EFD, up_EFD, down_EDF, gate_RF, up_RF, ends_E, with_bias, activation, limit, alpha):
    grads = [torch.empty_like(value) for value in (x_RD, gate_EFD, up_EFD, down_EDF)]
    return grads + [weight.new_empty(weight.shape[:2]) for weight in (gate_EFD, up_EFD, down_EDF) if with_bias]


def _save(ctx, inputs, output):
    x, gate_w, up_w, down_w, bias, _, _, ends, *ctx.gating = inputs
    ctx.with_bias = bias is not None
    ctx.set_materialize_grads(False)  # none for gate and up, which nobody uses
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, gate_w, up_w, down_w, *output[1:], ends)


def _backward(ctx, grad_RD, *_):
    if grad_RD is None:  # gradients are traced for each output alone
        return (None,) * 11
    grads = _one_by_one_backward(grad_RD, *ctx.saved_tensors, ctx.with_bias, *ctx.gating)
    return *grads, *([None] * (7 - len(grads))), None, None, None, None


_one_by_one.register_autograd(_backward, setup_context=_save)
EXPERTS = _one_by_one  # the operator, for policies that name it
