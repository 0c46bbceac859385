"""The look at the kernel of the experts: right ones pass, broken ones are refused in a sentence."""

import re

import pytest
import torch
from torch import nn

from train.model import experts, probe
from train.model.config import LayerConfig, ModelConfig, MoeConfig, Rope
from train.model.probe import check_experts

CPU = torch.device("cpu")
OPTIONS = {"silu": {}, "gelu_tanh": {}, "clamped": {"expert_bias": True, "swiglu_limit": 1.0, "swiglu_alpha": 1.7}}


def mixture(kind="silu", intermediate_size=8):
    moe = MoeConfig(8, 2, intermediate_size, **OPTIONS[kind])
    layer = LayerConfig(window=None, rope=Rope(1e4, 8), experts=True)
    sizes = 37, 16, 24, 2, 1, 8, (layer,), 64, 1e-5, 8**-0.5
    return ModelConfig("x", *sizes, tied_embeddings=False, activation="silu" if kind == "clamped" else kind, moe=moe)


@pytest.fixture
def on_cpu(monkeypatch):
    """torch's kernel of the CPU stands in for that of a GPU."""
    monkeypatch.setattr(probe, "has_kernel", lambda x, weight: True)
    monkeypatch.setattr(experts, "has_kernel", lambda x, weight: x.dtype != torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", OPTIONS)
def test_a_right_kernel_passes(kind, dtype, on_cpu):
    check_experts(mixture(kind), CPU, dtype)


right = nn.functional.grouped_mm


class Broken(torch.autograd.Function):
    """torch's kernel with one mistake."""

    @staticmethod
    def forward(ctx, x, weight, ends, mistake):
        ctx.save_for_backward(x, weight, ends)
        ctx.mistake = mistake
        out = right(x, weight, offs=ends)
        if mistake == "no rows" and not len(x):
            raise RuntimeError("Invalid strides/sizes\nmore lines")
        if mistake == "second row":
            out[1:2] *= 1.2
        if mistake == "nan leaks forward" and len(x):
            out[ends[-1] - 1] += x[-1, 0]
        return out

    @staticmethod
    def backward(ctx, grad):
        x, weight, ends = ctx.saved_tensors
        with torch.enable_grad():
            leaves = x.detach().requires_grad_(), weight.detach().requires_grad_()
            of_x, of_weight = torch.autograd.grad(right(*leaves, offs=ends), leaves, grad)
        if ctx.mistake == "empty group":
            of_weight[1, 0, 0] = 1e-6
        if ctx.mistake == "nan leaks backward":  # into the last group, as if its rows went on to the end
            start = ends[-2]
            of_weight[-1] = x[start:].t() @ grad[start:]
        if ctx.mistake == "no rows, some gradient" and not len(x):
            of_weight += 1
        return of_x, of_weight, None, None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("mistake", "sentence"),
    [
        ("second row", "computes experts in {} on cpu (no GPU) wrongly: result is not"),
        ("nan leaks forward", "computes experts in {} on cpu (no GPU) wrongly: result is not"),
        ("nan leaks backward", "computes experts in {} on cpu (no GPU) wrongly: the gradient of gate_proj is not"),
        ("empty group", "computes experts in {} on cpu (no GPU) wrongly: the gradient of gate_proj is not"),
        ("no rows", "computes experts without rows in {} on cpu (no GPU) with an error (Invalid strides/sizes); take"),
        ("no rows, some gradient", "computes experts without rows in {} on cpu (no GPU) wrongly: the gradient of gate"),
    ],
)
def test_a_broken_kernel_is_refused(mistake, sentence, dtype, on_cpu, monkeypatch):
    monkeypatch.setattr(nn.functional, "grouped_mm", lambda x, weight, *, offs: Broken.apply(x, weight, offs, mistake))
    message = f"torch {torch.__version__} " + sentence.format(str(dtype)[6:])
    with pytest.raises(ValueError, match=re.escape(message)):
        check_experts(mixture(), CPU, dtype)


@pytest.mark.parametrize("intermediate_size", [8, 12])
def test_nothing_is_looked_at_where_experts_run_one_by_one(intermediate_size, monkeypatch):
    monkeypatch.setattr(probe, "Experts", None)
    check_experts(mixture(intermediate_size=intermediate_size), CPU, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT TESTED: no CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", OPTIONS)
def test_the_kernel_of_this_machine_is_right(kind, dtype):
    check_experts(mixture(kind), torch.device("cuda"), dtype)
