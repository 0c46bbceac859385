"""The memory estimate of `prep plan` for a rank of a mesh, against the tensors of training steps on it."""

import json

import pytest
import torch
from estimated_models import DENSE, MIXTURE
from peak_memory import PeakMemory
from tiny_models import MIXTURES, write_tiny_model
from torch.distributed.tensor import DTensor

from prep.inspect import memory as estimate
from ranks import run_ranks
from train import hf
from train.attention.interface import Segments
from train.config import Config, Layout, Model, Optim, Router
from train.mesh import build_mesh
from train.model import experts
from train.model.decoder import Decoder
from train.model.families import model_config
from train.model.initialize import init_weights
from train.optim import build_optimizer
from train.parallel.apply import parallelize
from train.row import MicroBatch
from train.step import accumulate_gradients

TOKENS = 512


def peak(content, config, rows, kernel):
    """Bytes of all tensors of this rank at the highest point of two training steps of so many rows; `kernel`: experts
    are computed as on a GPU, all with one kernel (torch has a slow one here)."""
    if kernel:
        experts.has_kernel = lambda x, weight: True
    mesh = build_mesh(config.layout, torch.device("cpu"))
    with torch.device("meta"):
        model = Decoder(model_config(content))
    model = parallelize(model, mesh, config)
    model.to_empty(device="cpu")
    init_weights(model, 0)
    optimizer = build_optimizer(model, Optim())
    tokens = TOKENS // mesh.cp_size
    ids = torch.randint(0, content["vocab_size"], (tokens,))
    row = MicroBatch(ids, ids, torch.arange(tokens), Segments.of([tokens]))
    with PeakMemory() as memory:
        for _ in range(2):
            accumulate_gradients(model, [row] * rows, rows, TOKENS * rows)
            optimizer.step()
            optimizer.zero_grad()
    return memory.bytes


def check(world, content, rows, recompute, kernel, **axes):
    router = Router(router_aux_loss=0.01) if content is MIXTURE else Router()
    config = Config(model=Model(recompute=recompute), layout=Layout(**axes), router=router)
    measured = max(run_ranks(peak, world, content, config, rows, kernel))
    dp_shard = world // (axes.get("pp", 1) * axes.get("tp", 1))
    layout = estimate.Layout(TOKENS, dp_shard=dp_shard, rows=rows, bytes=4, recompute=recompute, gpu=kernel, **axes)
    assert estimate.memory(content, layout)["total"] == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(
    ("world", "content", "rows", "recompute", "kernel", "axes"),
    [
        (2, MIXTURE, 1, "none", True, {"ep": 2}),
        (2, MIXTURE, 2, "selective", True, {"ep": 2}),
        (2, MIXTURE, 2, "full", True, {"tp": 2}),
        (4, MIXTURE, 4, "full", True, {"ep": 2, "pp": 2}),
    ],
)
def test_the_estimate_is_what_a_rank_takes(world, content, rows, recompute, kernel, axes):
    check(world, content, rows, recompute, kernel, **axes)


def held(cases):
    """Parameters that this rank holds, case by case."""
    counts = []
    for folder, axes in cases:
        config = Config(layout=Layout(**axes))
        mesh = build_mesh(config.layout, torch.device("cpu"))
        with torch.device("meta"):
            model = Decoder(hf.read_config(folder))
        parameters = parallelize(model, mesh, config).parameters()
        counts.append(sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in parameters))
    return counts


def test_parameters_of_a_tensor_rank(tmp_path):
    """Routers and projections to latents are whole on each, and keys and values where heads are too few."""
    cases = []
    for family in ("llama", "qwen3", *MIXTURES):
        heads = 4 if family == "deepseek_v3" else 2
        sizes = {"vocab_size": 320, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": heads}
        folder, sparse = write_tiny_model(tmp_path / family, family, **sizes), family in MIXTURES
        axes = [{"tp": 2}, {"tp": 4}, *([{"tp": 2, "ep": 4}, {"tp": 4, "ep": 4}, {"ep": 4}] if sparse else [])]
        cases += [(folder, each) for each in axes]
    for (folder, axes), *counts in zip(cases, *run_ranks(held, 4, cases), strict=True):
        content = json.loads((folder / "config.json").read_text())
        layout = estimate.Layout(TOKENS, dp_shard=4 // axes.get("tp", 1), bytes=4, **axes)
        assert estimate.memory(content, layout)["parameters"] / 4 == pytest.approx(max(counts), rel=0.01), (
            folder,
            axes,
        )


def test_parameters_of_experts_on_more_ranks_than_there_are_experts(tmp_path):
    """Rows or columns of each are cut then; only where none of both can be divided, some ranks hold more experts."""
    sizes = {"vocab_size": 320, "intermediate_size": 82, "num_local_experts": 2}
    even = write_tiny_model(tmp_path / "even", "mixtral", **sizes)
    uneven = write_tiny_model(tmp_path / "uneven", "gpt_oss", **sizes | {"num_local_experts": 6, "hidden_size": 50})
    cases = [(even, {}), (even, {"tp": 2}), (even, {"tp": 2, "cp": 2}), (uneven, {}), (uneven, {"tp": 4, "ep": 2})]
    ranks = run_ranks(held, 4, cases)
    for (folder, axes), *counts in zip(cases, *ranks, strict=True):
        content = json.loads((folder / "config.json").read_text())
        layout = estimate.Layout(TOKENS, dp_shard=4 // axes.get("tp", 1) // axes.get("cp", 1), bytes=4, **axes)
        assert estimate.memory(content, layout)["parameters"] / 4 == pytest.approx(max(counts), rel=0.02), axes
        assert folder is uneven or min(counts) > 0.98 * max(counts), axes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "content", "rows", "recompute", "kernel", "axes"),
    [
        (2, DENSE, 1, "none", False, {}),
        (2, DENSE, 2, "full", False, {}),
        (2, MIXTURE, 1, "none", True, {}),
        (4, MIXTURE, 1, "none", False, {"ep": 2}),
        (2, DENSE, 4, "none", False, {"pp": 2}),
        (2, MIXTURE, 4, "none", True, {"pp": 2}),
        (2, MIXTURE, 4, "selective", False, {"pp": 2}),
        (2, MIXTURE, 1, "none", True, {"tp": 2, "ep": 2}),
        (4, MIXTURE, 1, "full", True, {"ep": 2}),
        (4, MIXTURE, 2, "selective", False, {"ep": 2}),
    ],
)
def test_the_estimate_is_what_a_rank_takes_on_more_meshes(world, content, rows, recompute, kernel, axes):
    check(world, content, rows, recompute, kernel, **axes)
