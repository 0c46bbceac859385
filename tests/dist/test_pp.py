"""Pipelines: every schedule, alone and with every other axis, gives the loss and gradients of the documents one at a
time."""

import functools

import numpy as np
import pytest
import torch
from parity import LIMIT, by_documents, packed_steps
from torch.distributed.tensor import DTensor

import train.data
from formats.dataset import PackedDataset
from make_shards import make_shards, random_packs
from ranks import run_ranks
from train import hf
from train.config import Config, Data, Layout, Model
from train.cut import choose_cut
from train.data import PackedLoader, Schedule, open_shards
from train.mesh import build_mesh
from train.model.decoder import Decoder
from train.parallel.apply import parallelize
from train.parallel.pp import SCHEDULES
from train.step import LOSS_AXES, accumulate_gradients, sum_over

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


def case(schedule, pp, model="tied", dtype=torch.float64, micro=1, split=None, recompute="none", compiled=False, **axes):
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


def gradients_of(cases):
    """For each (model, shards, config) the loss and every gradient of this rank in one step over all packs."""
    found = []
    for model_dir, shards, config in cases:
        mesh = build_mesh(config.layout, torch.device("cpu"))
        with torch.device("meta"):
            model = Decoder(hf.read_config(model_dir)).double()
        model = parallelize(model, mesh, config)
        model.to_empty(device="cpu")
        hf.load_weights(model, model_dir)
        dataset = open_shards(shards, 320)
        schedule = Schedule(len(dataset), "input", 0, 0, config.data.batch_packs, 1)
        cut = choose_cut(config.layout.cp_method, mesh.cp_size, mesh.cp_rank, dataset.manifest)
        options = {"dp_rank": mesh.dp_rank, "dp_size": mesh.dp_size, "device": torch.device("cpu"), "cut": cut}
        loader = PackedLoader(dataset, schedule, **options)
        facts = loader.next_step()
        share = accumulate_gradients(model, loader.rows(), loader.row_count, facts.target_tokens)
        loader.close()
        loss = sum_over(mesh, share, LOSS_AXES).item()
        local = {name: p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for name, p in model.named_parameters()}
        found.append((loss, local))
    return found


PROBED = {
    2: [{"pp_schedule": name} for name in SCHEDULES],
    4: [{"cp": 2, "cp_method": method} for method in METHODS] + [{"tp": 2}, {"cp": 2, "pp_schedule": "zbv"}],
}


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_no_token_reaches_another_document_through_a_pipeline(world, places, tmp_path):
    """Only one document has targets: to the bit, no other document's tokens are in its loss or in any gradient, and
    its own are."""
    rows = random_packs(np.random.default_rng(9), 4, CAPACITY, 4, 320, max_docs=4)
    lens = rows[1][3]
    only, other = 1, 2  # documents of the second pack
    assert len(lens) > 2
    mask = np.zeros_like(rows[1][1])
    starts = np.cumsum([0, *lens])
    mask[starts[only] + 1 : starts[only] + rows[1][2][only]] = 1
    folders = {}
    for name, changed in {"as it was": None, "another": other, "its own": only}.items():
        packs = [(ids.copy(), np.zeros_like(targets), *rest) for ids, targets, *rest in rows]
        packs[1] = (packs[1][0], mask, *rows[1][2:])
        if changed is not None:
            packs[1][0][starts[changed]] += 1
        folders[name] = make_shards(tmp_path / name.replace(" ", "-"), packs, capacity=CAPACITY, align=4, cp=2)
    cases = [
        (places["gemma2"], shards, Config(data=Data(batch_packs=4), layout=Layout(pp=2, **layout)))
        for layout in PROBED[world]
        for shards in folders.values()
    ]
    for of_rank in run_ranks(gradients_of, world, cases, timeout=280):
        for k, layout in enumerate(PROBED[world]):
            (loss, before), (same, unmoved), (differs, moved) = of_rank[3 * k : 3 * k + 3]
            assert loss == same != differs, layout
            assert all(torch.equal(before[name], unmoved[name]) for name in before), layout
            assert any(not torch.equal(before[name], moved[name]) for name in before), layout
