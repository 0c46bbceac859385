"""Learning rate, decay groups, and norms of gradients that live on different meshes."""

import itertools
import math

import pytest
import torch
import torch.distributed as dist
import transformers
from tiny_models import SIZES
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from ranks import run_ranks
from train import hf
from train.config import Optim
from train.model.decoder import Decoder
from train.optim import build_optimizer, clip_gradients, learning_rate


def test_warm_up_is_linear_then_a_cosine_reaches_the_floor_at_the_last_step():
    config = Optim(lr=1.0, warmup_steps=4, min_lr_ratio=0.2)
    rates = [learning_rate(step, 12, config) for step in range(1, 13)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[7] == pytest.approx(0.6), "half way down"
    assert rates[11] == pytest.approx(0.2)
    assert all(a > b for a, b in itertools.pairwise(rates[3:]))


def test_without_warm_up_and_with_more_warm_up_than_steps():
    assert learning_rate(1, 1, Optim(lr=1.0, min_lr_ratio=0.0)) == pytest.approx(0.0)
    assert learning_rate(1, 10, Optim(lr=1.0)) < 1.0
    assert learning_rate(3, 3, Optim(lr=1.0, warmup_steps=6)) == 0.5


def test_only_matrices_decay():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    optimizer = build_optimizer(model, Optim(weight_decay=0.3))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: decay[id(p)] for name, p in model.named_parameters()} == {
        "0.weight": 0.3,
        "0.bias": 0.0,
        "1.weight": 0.0,
        "1.bias": 0.0,
    }


def test_the_stacked_biases_of_experts_do_not_decay(tmp_path):
    transformers.GptOssConfig(**SIZES, num_local_experts=4, head_dim=12).save_pretrained(tmp_path)
    with torch.device("meta"):
        model = Decoder(hf.read_config(tmp_path))
    stacked = [name for name, p in model.named_parameters() if name.endswith("bias") and p.ndim == 2]
    assert len(stacked) == 2 * 3, "of gate, up and down of two layers"
    optimizer = build_optimizer(model, Optim(weight_decay=0.3))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.0 if name.endswith(("bias", "norm.weight", "sinks")) else 0.3), name


def test_clipping_without_ranks_equals_torch():
    torch.manual_seed(0)
    model = nn.Linear(5, 7)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    reference = nn.Linear(5, 7)
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        q.grad = p.grad.clone()
    expected = nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
    assert clip_gradients(model, 0.5).item() == pytest.approx(expected.item(), rel=1e-6)
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_zero_only_measures_and_a_small_norm_stays():
    model = nn.Linear(1, 1, bias=False)
    model.weight.grad = torch.tensor([[3.0]])
    assert clip_gradients(model, 0.0).item() == 3.0
    assert clip_gradients(model, 5.0).item() == 3.0
    assert model.weight.grad.item() == 3.0


def test_a_norm_that_is_not_finite_is_returned():
    model = nn.Linear(1, 1, bias=False)
    model.weight.grad = torch.tensor([[math.nan]])
    assert math.isnan(clip_gradients(model, 1.0).item())


def mixed_model():
    """Parameters on a 2-D mesh, on one of its axes, replicated, and plain, with known gradients."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    placed = [
        (mesh, [Replicate(), Shard(0)]),
        (mesh, [Shard(0), Shard(1)]),
        (mesh["b"], [Shard(0)]),
        (mesh["a"], [Replicate()]),
        (None, None),
    ]
    torch.manual_seed(3)
    model, grads = nn.Module(), []
    for i, (axis, placements) in enumerate(placed):
        value, grad = torch.zeros(5, 6), torch.randn(5, 6)
        grads.append(grad.clone())
        if axis is not None:
            value, grad = (distribute_tensor(t, axis, placements) for t in (value, grad))
        parameter = nn.Parameter(value)
        parameter.grad = grad
        model.register_parameter(f"p{i}", parameter)
    return model, grads


def clip_mixed():
    model, grads = mixed_model()
    norm = clip_gradients(model, 2.0).item()
    after = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in model.parameters()]
    expected = math.sqrt(sum(g.double().square().sum().item() for g in grads))
    for a, g in zip(after, grads, strict=True):
        torch.testing.assert_close(a, g * (2.0 / expected))
    return norm, expected, dist.get_rank()


def test_gradients_of_several_meshes_are_clipped_by_their_common_norm():
    seen = run_ranks(clip_mixed, 4)
    assert len({norm for norm, _, _ in seen}) == 1, "every rank must scale by the same bits"
    assert seen[0][0] == pytest.approx(seen[0][1], rel=1e-6)
