"""Compiled blocks: no graph break, no more graphs than lengths, and the gradients of the documents one at a time."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from parity import LIMIT, by_documents, packed_step
from tiny_models import write_tiny_model

from formats.dataset import PackedDataset
from make_shards import make_shards, random_packs
from ranks import run_ranks
from train import hf
from train.attention.interface import Segments
from train.config import Config, Data, Layout, Model
from train.mesh import build_mesh
from train.model.decoder import Decoder
from train.model.initialize import init_weights
from train.parallel.apply import parallelize

FSDP, HSDP, TENSOR = Layout(), Layout(dp_replicate=2), Layout(tp=2)
GATHER, ULYSSES = Layout(cp=2), Layout(cp=2, cp_method="ulysses")
TENSOR_GATHER, TENSOR_ULYSSES = replace(GATHER, tp=2), replace(ULYSSES, tp=2)


def placed(model, folder):
    """(model, shards, {dtype: (loss, file of the gradients)}) of the documents one at a time."""
    rows = random_packs(np.random.default_rng(0), 5, 200, 4, 320)
    shards = make_shards(folder / "shards", rows, capacity=200, align=4, cp=2)
    wanted = {}
    for dtype in LIMIT:
        loss, gradients = by_documents(model, PackedDataset(shards), dtype)
        torch.save(gradients, folder / f"{dtype}.pt")
        wanted[dtype] = loss, folder / f"{dtype}.pt"
    return model, shards, wanted


@pytest.fixture(scope="module")
def places(tiny_llama_dir, tmp_path_factory):
    return placed(tiny_llama_dir, tmp_path_factory.mktemp("compile"))


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A layer without experts, then one with."""
    folder = tmp_path_factory.mktemp("mixture")
    return placed(write_tiny_model(folder / "model", "qwen2_moe", vocab_size=320), folder)


def changed(layout):
    """What of a layout is not the default, as the name of a case."""
    return " ".join(f"{name}={value}" for name, value in vars(layout).items() if value != getattr(FSDP, name)) or "fsdp"


def compiled_step(*case):
    """A step, and how often Dynamo traced and broke off."""
    return packed_step(*case), dict(torch._dynamo.utils.counters["stats"]), torch._dynamo.utils.counters["graph_break"]


def is_equal(places, layout, recompute, dtype, backend="aot_eager", graphs=1):
    """`graphs`: how many there may be. One serves both layers of a kind and all rows."""
    model, shards, wanted = places
    options = Model(recompute=recompute, compile=True, compile_backend=backend)
    config = Config(data=Data(batch_packs=6), layout=layout, model=options)
    loss, path = wanted[dtype]
    ranks = max(2, layout.tp * layout.cp)
    for step, stats, breaks in run_ranks(compiled_step, ranks, model, shards, config, dtype, path, timeout=240):
        assert step[0] == pytest.approx(loss, rel=LIMIT[dtype])
        assert step[1] <= LIMIT[dtype], step[2]
        assert not breaks
        assert stats["unique_graphs"] == graphs


@pytest.mark.parametrize(
    ("layout", "recompute"),
    [(FSDP, "selective"), (TENSOR_GATHER, "none"), (ULYSSES, "full")],
    ids=["fsdp", "tp cp gather", "cp ulysses"],
)
def test_compiled_equals_the_documents_one_at_a_time(places, layout, recompute):
    is_equal(places, layout, recompute, torch.float64)


@pytest.mark.parametrize(
    ("layout", "recompute"),
    [
        (Layout(ep=2), "selective"),
        *(
            pytest.param(layout, recompute, marks=pytest.mark.slow)
            for layout, recompute in (
                (Layout(ep=2), "none"),
                (Layout(ep=2, tp=2), "full"),
                (Layout(ep=2, tp=2), "selective"),
                (Layout(cp=2), "none"),
                (Layout(cp=2, tp=2, sp=False), "selective"),
                (Layout(pp=2), "none"),
                (Layout(pp=2), "selective"),
            )
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else changed(value),
)
def test_a_mixture_with_compiled_attention_equals_the_documents(mixture, layout, recompute):
    """A graph for the whole block without experts, and one for what comes before the experts of the other."""
    graphs = 1 if layout.pp > 1 else 2
    is_equal(mixture, layout, recompute, torch.float64, graphs=graphs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "recompute"),
    [
        (FSDP, "none"),
        (FSDP, "full"),
        (HSDP, "none"),
        (TENSOR, "selective"),
        (TENSOR, "full"),
        (replace(TENSOR, sp=False), "none"),
        (GATHER, "selective"),
        (ULYSSES, "none"),
        (TENSOR_GATHER, "full"),
        (TENSOR_ULYSSES, "selective"),
    ],
    ids=lambda value: value if isinstance(value, str) else changed(value),
)
def test_every_layout_compiled_with_one_recompute_or_another(places, layout, recompute):
    """In float64 alone: another type makes no other graph, and float32 is what the inductor computes in below."""
    is_equal(places, layout, recompute, torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [FSDP, TENSOR_GATHER], ids=["fsdp", "tp cp gather"])
def test_inductor_gives_the_same(places, layout):
    is_equal(places, layout, "selective", torch.float32, "inductor")


@pytest.mark.slow
def test_inductor_gives_the_same_before_a_mixture(mixture):
    is_equal(mixture, Layout(ep=2), "selective", torch.float32, "inductor", graphs=2)


def graphs_of_lengths(folder, recompute):
    """Graphs after each of several forwards (and backwards) of one row with another split into documents."""
    config = Config(model=Model(compile=True, compile_backend="eager", recompute=recompute))
    model = Decoder(hf.read_config(folder))
    init_weights(model, seed=0)
    model = parallelize(model, build_mesh(config.layout, torch.device("cpu")), config)
    ids = torch.arange(300) % 320
    seen = []
    for ends, max_seqlen in (((0, 10, 300, 300), 512), ((0, 299, 300, 300), 512), ((0, 100, 200, 300), 128)):
        segments = Segments(torch.tensor(ends, dtype=torch.int32), max_seqlen)
        model(ids, ids, segments, ids).backward()
        seen.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    return seen


def test_a_graph_for_each_length_and_not_for_each_row(tiny_llama_dir):
    assert run_ranks(graphs_of_lengths, 1, tiny_llama_dir, "none") == [[1, 1, 2]]
