"""Experts, computed by one kernel for all and one after the other: the same, whatever stands in rows of nobody."""

import pytest
import torch
from plain_mixtures import SIZES, load, one_pack
from reference import distance
from tiny_models import write_tiny_model
from torch import nn

from train.model import experts as experts_module
from train.model.config import MoeConfig
from train.model.experts import Experts
from train.model.rows import Rows


def poisoned_kernel(x, weight, bias, ends):
    """What a kernel for all groups may do: garbage in the rows of nobody, forward and backward."""
    rows = _Poison.apply(x, ends)[: ends[-1]]
    expert = torch.searchsorted(ends, torch.arange(len(rows), dtype=ends.dtype), right=True)
    out = torch.einsum("rd,rfd->rf", rows, weight[expert])
    out = out if bias is None else out + bias[expert]
    return _Poison.apply(nn.functional.pad(out, (0, 0, 0, len(x) - len(rows))), ends)


class _Poison(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, ends):
        ctx.save_for_backward(ends)
        x = x.clone()
        x[ends[-1] :] = torch.nan
        return x

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        grad[ctx.saved_tensors[0][-1] :] = torch.nan
        return grad, None


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_rows_of_no_expert_mean_nothing(family, tmp_path, monkeypatch):
    model = load(write_tiny_model(tmp_path / family, family, **SIZES))
    mixture = model.layers[0].mlp
    x = torch.randn(33, 48, dtype=torch.float64)
    real = torch.arange(33) % 5 != 0
    results = []
    monkeypatch.setattr(experts_module, "_with_kernel", poisoned_kernel)
    for kernel in (False, True):
        monkeypatch.setattr(experts_module, "has_kernel", lambda x, weight, kernel=kernel: kernel)
        mixture.zero_grad()
        inputs = x.clone().requires_grad_()
        out = mixture(inputs, one_pack(real))
        (out * torch.linspace(-1, 1, 48)).sum().backward()
        results.append((out, inputs.grad, [p.grad for p in mixture.parameters()]))
    (out, grad, grads), (other_out, other_grad, other_grads) = results
    assert not out[~real].any()
    assert not grad[~real].any()
    torch.testing.assert_close(other_out, out)
    torch.testing.assert_close(other_grad, grad)
    for a, b in zip(grads, other_grads, strict=True):
        torch.testing.assert_close(a, b)


def some_experts(kind, dtype):
    """4 experts of 16 → 24, of every kind there is; the third projection of GPT-OSS is clamped for a good part."""
    options = {"silu": {}, "gelu_tanh": {}, "clamped": {"expert_bias": True, "swiglu_limit": 1.5, "swiglu_alpha": 1.7}}
    config = MoeConfig(num_experts=4, top_k=2, intermediate_size=24, **options[kind])
    experts = Experts(16, config, "silu" if kind == "clamped" else kind).to(dtype)
    generator = torch.Generator().manual_seed(3)
    for parameter in experts.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(dtype) / 3
    return experts


KINDS = ("silu", "gelu_tanh", "clamped")


def some_rows(third=(4, 4)):
    """Of 12 tokens with 2 choices among 4 experts; the third is padding, the second expert is chosen by none."""
    return Rows.sort(torch.tensor([(0, 2), (3, 2), third, (2, 0)] + [(3, 0), (2, 3)] * 4), 4)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_one_kernel_for_all_groups_gives_what_one_expert_after_the_other_gives(kind, dtype, weighted, monkeypatch):
    experts, rows = some_experts(kind, dtype), some_rows()
    torch.manual_seed(1)
    x = torch.randn(12, 16, dtype=dtype, requires_grad=True)
    weights = torch.rand(12, 2, dtype=dtype).masked_fill(rows.padding, 0.0).requires_grad_() if weighted else None
    direction = torch.randn(12, 16, dtype=dtype)
    results = []
    for kernel in (False, True):
        monkeypatch.setattr(experts_module, "has_kernel", lambda x, weight, kernel=kernel: kernel)
        leaves = [x, *experts.parameters(), *([weights] if weighted else [])]
        out = experts(x, weights, rows)
        results.append((out, *torch.autograd.grad((out * direction).sum(), leaves)))
    tolerance = 5e-2 if dtype == torch.bfloat16 else 1e-6
    for a, b in zip(*results, strict=True):
        assert distance(a, b) < tolerance
        assert distance(b, a) < tolerance
    out, of_x, *of_experts = results[0]
    assert not out[2].any(), "padding"
    assert not of_x[2].any(), "padding"
    projections = of_experts[: len(list(experts.parameters()))]
    assert all(not gradient[1].any() for gradient in projections), "an expert without rows has gradient 0"


@pytest.mark.parametrize(("kind", "weighted"), [("silu", True), ("gelu_tanh", False), ("clamped", True)])
def test_the_operator_of_experts_is_a_good_one(kind, weighted):
    experts, rows = some_experts(kind, torch.float64), some_rows(third=(0, 3))
    weights = [getattr(experts, name) for name in experts_module.PROJECTIONS]
    biases = [getattr(experts, f"{name}_bias") for name in experts_module.PROJECTIONS]
    gating = experts.gating
    x = torch.randn(12, 16, dtype=torch.float64, requires_grad=True)
    weights_R = torch.rand(24, dtype=torch.float64, requires_grad=True) if weighted else None
    rest = (rows.token, rows.ends, gating.activation, gating.limit, gating.alpha)
    if kind == "clamped":
        gate, up = (x @ weight[0].T for weight in weights[:2])
        assert (gate > gating.limit).any()
        assert (up.abs() > gating.limit).any()
    inputs = (x, weights_R, *weights, *biases)
    torch.library.opcheck(experts_module.EXPERTS, (*inputs, *rest))
    assert torch.autograd.gradcheck(lambda *tensors: experts_module.EXPERTS(*tensors, *rest)[0], inputs, fast_mode=True)
