"""Many small MLPs at once: each for the tokens that chose it.

Shapes: T tokens, R rows sorted by expert (`train.model.rows`), E experts (of this rank), D hidden size, F intermediate
size of an expert. The rows of expert e are `ends_E[e-1]:ends_E[e]`; rows from `ends_E[-1]` on belong to none: they are
not computed and touch no gradient.

There are two ways. One kernel a projection for all experts, where there is one (`has_kernel`), over rows that are
gathered before and combined after. Else every expert by itself, from its tokens to their sums: what lies between never
leaves the cache, and nothing of the size of all rows is made but the two projections that backward needs. These and the
gradients of the weights stand in memory that is kept (`train.model.kept`). Where experts have even work, each thread
takes some of them.
"""

import itertools

import torch
from torch import Tensor, nn

from train.model.config import MoeConfig
from train.model.gating import Gating, add_rows
from train.model.held import held
from train.model.kept import Kept
from train.model.rows import Rows
from train.model.side_by_side import side_by_side

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_PROJECTED, _GRADIENTS = Kept(2), Kept(3)  # on a CPU


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

    def forward(self, x_TD: Tensor, weights_TK: Tensor | None, rows: Rows) -> Tensor:
        """For every token the sum of what its experts make of it, by weight if there are weights: [T, D]."""
        weights = [held(getattr(self, name)) for name in PROJECTIONS]
        biases = [held(getattr(self, f"{name}_bias")) for name in PROJECTIONS]
        if not has_kernel(x_TD, weights[0]):
            weights_R = None if weights_TK is None else weights_TK.flatten().index_select(0, rows.order)
            kind = self.gating.activation, self.gating.limit, self.gating.alpha
            return _one_by_one(x_TD, weights_R, *weights, *biases, rows.token, rows.ends, *kind)[0]
        x_RD, ends_E = rows.gather(x_TD), rows.ends
        gate_RF, up_RF = (_with_kernel(x_RD, w, b, ends_E) for w, b in zip(weights[:2], biases[:2], strict=True))
        return rows.combine(_with_kernel(self.gating(gate_RF, up_RF), weights[2], biases[2], ends_E), weights_TK)


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
    x_TD: Tensor,
    weights_R: Tensor | None,
    gate_EFD: Tensor,
    up_EFD: Tensor,
    down_EDF: Tensor,
    gate_bias_EF: Tensor | None,
    up_bias_EF: Tensor | None,
    down_bias_ED: Tensor | None,
    token_R: Tensor,
    ends_E: Tensor,
    activation: str,
    limit: float | None,
    alpha: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(the sums [T, D], and for backward gate and up projection [R, F])."""
    gating = Gating(activation, limit, alpha)
    gate_RF, up_RF = (_PROJECTED.empty(x_TD, (len(token_R), gate_EFD.shape[1])) for _ in range(2))
    sizes = _sizes(ends_E)
    of_rows = _by_expert(sizes, token_R, gate_RF, up_RF, weights_R)
    of_experts = _by_expert(None, gate_EFD, up_EFD, down_EDF, gate_bias_EF, up_bias_EF, down_bias_ED)

    def run(experts: list[int]) -> Tensor:
        out_TD = torch.zeros_like(x_TD, dtype=_wide(x_TD))
        for e in experts:
            tokens, gate, up, weights = of_rows[e]
            gate_weight, up_weight, down_weight, gate_bias, up_bias, down_bias = of_experts[e]
            x = x_TD.index_select(0, tokens)
            _linear(x, gate_weight, gate_bias, out=gate)
            _linear(x, up_weight, up_bias, out=up)
            add_rows(out_TD, tokens, _linear(gating.without_gradient(gate, up), down_weight, down_bias, out=x), weights)
        return out_TD

    return _sum(side_by_side(sizes, run)).to(x_TD.dtype), gate_RF, up_RF


def _sum(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total += part
    return total


def _wide(x: Tensor) -> torch.dtype:
    """What sums over experts are made in."""
    return torch.promote_types(x.dtype, torch.float32)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, out: Tensor) -> Tensor:
    return torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)


@torch.library.custom_op("meshpack::experts_backward", mutates_args=())
def _one_by_one_backward(
    grad_TD: Tensor,
    x_TD: Tensor,
    weights_R: Tensor | None,
    gate_EFD: Tensor,
    up_EFD: Tensor,
    down_EDF: Tensor,
    down_bias_ED: Tensor | None,
    gate_RF: Tensor,
    up_RF: Tensor,
    token_R: Tensor,
    ends_E: Tensor,
    activation: str,
    limit: float | None,
    alpha: float,
) -> list[Tensor]:
    """Gradients of the tokens, of the three projections, of their biases if there are any, of the rows' weights if
    there are any."""
    gating, with_bias = Gating(activation, limit, alpha), down_bias_ED is not None
    grads = [_GRADIENTS.empty(weight, weight.shape) for weight in (gate_EFD, up_EFD, down_EDF)]
    grads += [weight.new_empty(weight.shape[:2]) for weight in (gate_EFD, up_EFD, down_EDF) if with_bias]
    weighted = weights_R is not None
    weights_R = weights_R if weighted else x_TD.new_ones(len(token_R))
    grad_weights_R = torch.zeros_like(weights_R)
    sizes = _sizes(ends_E)
    of_rows = _by_expert(sizes, token_R, gate_RF, up_RF, weights_R, grad_weights_R)
    of_experts = _by_expert(None, gate_EFD, up_EFD, down_EDF, down_bias_ED)
    into = _by_expert(None, *grads)

    def run(experts: list[int]) -> Tensor:
        grad_x_TD = torch.zeros_like(x_TD, dtype=_wide(x_TD))
        for e in experts:
            tokens, gate, up, weights, grad_weights = of_rows[e]
            gate_weight, up_weight, down_weight, down_bias = of_experts[e]
            grad = grad_TD.index_select(0, tokens)
            # Of the weights: grad · (down · inner) without what the expert gave, which is not kept.
            inner, grad_gate, grad_up, of_weights = gating.backward(grad @ down_weight, gate, up, weights)
            grad_weights.copy_(of_weights if down_bias is None else of_weights + grad @ down_bias)
            # The gradients of an expert without rows are 0.
            of_gate, of_up, of_down, *of_biases = into[e]
            torch.mm(grad.t(), inner, out=of_down)
            if with_bias:
                for of_bias, value in zip(of_biases, (grad_gate, grad_up, grad.mul_(weights[:, None])), strict=True):
                    torch.sum(value, 0, out=of_bias)
            x = torch.index_select(x_TD, 0, tokens, out=grad)
            torch.mm(grad_gate.t(), x, out=of_gate)
            torch.mm(grad_up.t(), x, out=of_up)
            grad_x = torch.mm(grad_gate, gate_weight, out=x).addmm_(grad_up, up_weight)
            add_rows(grad_x_TD, tokens, grad_x, None)
        return grad_x_TD

    grad_x_TD = _sum(side_by_side(sizes, run))
    return [grad_x_TD.to(x_TD.dtype), *grads, *([grad_weights_R] if weighted else [])]


def _sizes(ends_E: Tensor) -> list[int]:
    """The rows of each expert, perhaps none."""
    return [stop - start for start, stop in itertools.pairwise((0, *ends_E.tolist()))]


def _by_expert(sizes: list[int] | None, *tensors: Tensor | None) -> list[tuple[Tensor | None, ...]]:
    """For each expert its part of every tensor: its rows by `sizes`, or without them what stands at its number.

    All views at once: made one by one they cost more than the smaller operators do.
    """
    parts = []
    for tensor in tensors:
        if tensor is None:
            parts.append(itertools.repeat(None))
        else:
            parts.append(tensor.unbind() if sizes is None else tensor[: sum(sizes)].split(sizes))
    return list(zip(*parts, strict=False))


@_one_by_one.register_fake
def _(x_TD, weights_R, gate_EFD, up_EFD, down_EDF, gate_bias, up_bias, down_bias, token_R, *rest):
    inner = x_TD.new_empty(len(token_R), gate_EFD.shape[1])
    return torch.empty_like(x_TD), inner, torch.empty_like(inner)


@_one_by_one_backward.register_fake
def _(grad_TD, x_TD, weights_R, gate_EFD, up_EFD, down_EDF, down_bias_ED, *rest):
    weights = (gate_EFD, up_EFD, down_EDF)
    grads = [torch.empty_like(value) for value in (x_TD, *weights)]
    grads += [weight.new_empty(weight.shape[:2]) for weight in weights if down_bias_ED is not None]
    return grads if weights_R is None else [*grads, torch.empty_like(weights_R)]


def _save(ctx, inputs, output):
    x, weights_R, gate_w, up_w, down_w, _, _, down_bias, token, ends, *ctx.gating = inputs
    ctx.set_materialize_grads(False)  # none for gate and up, which nobody uses
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, weights_R, gate_w, up_w, down_w, down_bias, *output[1:], token, ends)


def _backward(ctx, grad_TD, *_):
    if grad_TD is None:  # gradients are traced for each output alone
        return (None,) * 13
    saved = ctx.saved_tensors
    weighted, with_bias = saved[1] is not None, saved[5] is not None
    grad_x, *grads = _one_by_one_backward(grad_TD, *saved, *ctx.gating)
    grad_weights = grads.pop() if weighted else None
    return grad_x, grad_weights, *grads, *([] if with_bias else [None] * 3), None, None, None, None, None


_one_by_one.register_autograd(_backward, setup_context=_save)
EXPERTS = _one_by_one  # the operator, for policies that name it
