"""Pipelines: every schedule, alone and with every other axis, gives the loss and gradients of the documents one at a
time."""

import functools

import numpy as np
import pytest
import torch
from parity import LIMIT, by_documents, packed_steps

import train.data
from formats.dataset import PackedDataset
from make_shards import make_shards, random_packs
from ranks import run_ranks
from train import hf
from train.config import Config, Data, Layout, Model
from train.mesh import build_mesh
from train.model.decoder import Decoder
from train.parallel.apply import parallelize
from train.parallel.pipeline import kept_bytes
from train.parallel.pp import SCHEDULES

METHODS = ("gather", "needed", "ring", "ulysses")

SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
# Gemma: scaled and tied embeddings, windows in every other layer, softcaps.
MODELS = {
    "untied": ("LlamaConfig", {"tie_word_embeddings": False}),
    "tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "gemma2": ("Gemma2Config", {"head_dim": 8, "sliding_window": 11, "attn_logit_softcapping": 2.0}),
}
CAPACITY = 120


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Folders of models by name, and of 7 packs."""
    import transformers

    folder = tmp_path_factory.mktemp("pp")
    found = {}
    for name, (config, options) in MODELS.items():
        with torch.random.fork_rng():
            torch.manual_seed(6)
            model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**(SIZES | options)))
            for key, parameter in model.named_parameters():
                torch.nn.init.normal_(parameter, mean=float("norm" in key and name != "gemma2"), std=0.15)
        model.save_pretrained(folder / name)
        found[name] = folder / name
    rows = random_packs(np.random.default_rng(4), 7, CAPACITY, 4, 320, max_docs=4)
    found["shards"] = make_shards(folder / "shards", rows, capacity=CAPACITY, align=4, cp=2)
    return found


@pytest.fixture(scope="module")
def wanted(places, tmp_path_factory):
    """`wanted(model, dtype)` → (loss, file of the gradients) of transformers, document by document."""
    folder = tmp_path_factory.mktemp("wanted")

    @functools.cache
    def compute(model, dtype):
        attention = "eager" if model == "gemma2" else "sdpa"  # its SDPA leaves out the softcap
        loss, gradients = by_documents(places[model], PackedDataset(places["shards"]), dtype, attention)
        torch.save(gradients, folder / f"{model}-{dtype}.pt")
        return loss, folder / f"{model}-{dtype}.pt"

    return compute


def case(
    schedule, pp, model="tied", dtype=torch.float64, micro=1, split=None, recompute="none", compiled=False, **axes
):
    """7 packs in a batch of 8: some row of some rank is always empty."""
    layout = Layout(pp=pp, pp_schedule=schedule, pp_split=split, **axes)
    options = Model(recompute=recompute, compile=compiled, compile_backend="eager")
    return Config(data=Data(batch_packs=8, micro_packs=micro), layout=layout, model=options), model, dtype


F32 = {"dtype": torch.float32}
WHOLE = tuple(name for name in SCHEDULES if not SCHEDULES[name].split)
CASES = {
    2: [
        case("gpipe", 2, "gemma2", recompute="full", **F32),
        case("1f1b", 2, "untied", micro=3, split="3,5"),
        case("interleaved", 2, "tied", split="1,2,1,1,2,1"),
        case("interleaved-zb", 2, "untied"),
        case("zbv", 2, "tied"),
        case("dualpipev", 2, "gemma2", **F32),
    ],
    4: [
        case("1f1b", 4, "untied", compiled=True),
        case("zbv", 4, "tied"),
        case("1f1b", 2, "tied", recompute="selective"),
        case("interleaved", 2, "tied", dp_replicate=2),
        case("dualpipev", 2, "untied"),
        case("interleaved-zb", 2, "gemma2", cp=2, **F32),
        case("1f1b", 2, "gemma2", cp=2, cp_method="needed", **F32),
        case("zbv", 2, "tied", tp=2),
    ],
}
PRODUCT = {
    2: [
        *(case(name, 2, model, dtype) for name in SCHEDULES for model in MODELS for dtype in LIMIT),
        *(case(name, 2, "gemma2", recompute=how) for name in WHOLE for how in ("full", "selective")),
        *(case(name, 2, "tied", compiled=True) for name in WHOLE),
    ],
    4: [
        *(case(name, 4, model, dtype) for name in SCHEDULES for model in ("tied", "untied") for dtype in LIMIT),
        *(case(name, 2, model) for name in SCHEDULES for model in MODELS),
        *(case(name, 2, "tied", dp_replicate=2) for name in SCHEDULES),
        *(case(name, 2, "gemma2", cp=2, cp_method=method) for name in SCHEDULES for method in METHODS),
        *(case(name, 2, "tied", tp=2) for name in SCHEDULES),
        case("1f1b", 2, "tied", cpu_offload=True),
        case("zbv", 2, "tied", cpu_offload=True),
    ],
    8: [
        *(case(name, 2, "tied", cp=2, cp_method=method) for name in ("1f1b", "zbv") for method in METHODS),
        *(case(name, 2, "untied", cp=2, dp_replicate=2) for name in ("interleaved", "interleaved-zb")),
        *(case(name, 2, "tied", tp=2) for name in SCHEDULES),
        *(case(name, 2, "gemma2", cp=2, tp=2) for name in SCHEDULES),
        *(case("1f1b", 2, "untied", cp=2, tp=2, cp_method=method) for method in METHODS),
        case("1f1b", 2, "tied", tp=2, sp=False, recompute="full"),
        case("1f1b", 4, "tied", tp=2),
    ],
}


@pytest.mark.parametrize("world", CASES)
def test_loss_and_every_gradient_equal_the_documents_one_at_a_time(world, places, wanted):
    check(world, CASES[world], places, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(3))
@pytest.mark.parametrize("world", PRODUCT)
def test_and_so_does_the_whole_product(world, part, places, wanted):
    check(world, PRODUCT[world][part::3], places, wanted)


def steps_with_short_runs(cases):
    """`packed_steps`, the loader's buffers filled again while the first rows of a step wait for their backward."""
    train.data.RUN_TOKENS = 1
    return packed_steps(cases)


def check(world, cases, places, wanted):
    arguments = [
        (places[model], places["shards"], config, dtype, wanted(model, dtype)[1]) for config, model, dtype in cases
    ]
    of_ranks = run_ranks(steps_with_short_runs, world, arguments, timeout=280)
    for (config, model, dtype), *results in zip(cases, *of_ranks, strict=True):
        where = f"{config.layout} {config.data} {config.model} {model} {dtype}"
        for loss, error, parameter in results:
            assert loss == pytest.approx(wanted(model, dtype)[0], rel=LIMIT[dtype]), where
            assert error <= LIMIT[dtype], f"{parameter}: {where}"


def kept(model_dir, layout):
    """(bytes of weights and gradients that a rank of a pipeline keeps, how many parameters its stages have)."""
    mesh = build_mesh(layout, torch.device("cpu"))
    with torch.device("meta"):
        model = Decoder(hf.read_config(model_dir))
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    pipeline = parallelize(model, mesh, Config(data=Data(batch_packs=8), layout=layout))
    held = sum(sizes[name] for name, _ in pipeline.named_parameters())
    wide = kept_bytes(pipeline, None, None)
    return wide, kept_bytes(pipeline, torch.bfloat16, torch.float32), held, pipeline.summary()


def test_what_a_rank_keeps_whole_is_said(places):
    """All parameters of its stages, however FSDP cuts them, and their gradients."""
    for wide, mixed, held, summary in run_ranks(kept, 4, places["untied"], Layout(pp=2)):
        assert wide == (4 * held, 4 * held)
        assert mixed == (2 * held, 4 * held)
        assert "stages of 5, 3 layers; a rank keeps its weights and their gradients whole" in summary
