"""The leak probe through experts and pipelines, in every layout in which they run: one token is changed, and outside
its document nothing moves, neither an output nor a gradient.

The step is the trainer's own, over 7 packs in a batch of 8: some rank has an empty one. The changed document has no
targets, so whatever of it shows in a gradient has leaked. No auxiliary loss: it is a function of how a *pack* is
routed, so it ties the documents of a pack together on purpose (`test_moe.py` holds it to the pack). No capacity either:
no expert drops a token, so none is dropped for another document's sake.

In float64, without experts to the bit, with them to 1e-12: a changed token may visit other experts, and a matrix
product with one row more may add in another order.
"""

import numpy as np
import pytest
import torch
from reference import distance
from tiny_models import write_tiny_model
from torch.distributed.tensor import DTensor

from make_shards import make_shards, random_packs
from ranks import run_ranks
from train import hf
from train.config import Config, Data, Layout
from train.cut import choose_cut
from train.data import PackedLoader, Schedule, open_shards
from train.mesh import build_mesh
from train.model.decoder import Decoder
from train.parallel.apply import parallelize
from train.parallel.pp import SCHEDULES
from train.step import accumulate_gradients

CAPACITY, ALIGN, CP = 120, 4, 2
CHANGED_PACK, CHANGED_DOCUMENT = 2, 1
METHODS = ("gather", "needed", "ring", "ulysses")
MODELS = {  # latent attention, a shared expert, node-limited groups; windows, sinks, biased experts; no experts at all
    "deepseek_v3": {"num_hidden_layers": 2},
    "gpt_oss": {"num_hidden_layers": 2},
    "gpt_oss, 8 layers": {"num_hidden_layers": 8, "hidden_size": 32},
    "gemma2": {"num_hidden_layers": 8, "hidden_size": 32},
}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Folders of models by name; of packs "before" and "after" the change, and of the same packs with the number of its
    document for every token."""
    folder = tmp_path_factory.mktemp("leaks")
    found = {
        name: write_tiny_model(folder / name, name.split(",")[0], vocab_size=320, intermediate_size=40, **options)
        for name, options in MODELS.items()
    }
    packs = random_packs(np.random.default_rng(9), 7, CAPACITY, ALIGN, 319, max_docs=4)
    before, after, numbers = [], [], []
    for p, (ids, mask, lens, slots, docs, offsets) in enumerate(packs):
        number = np.repeat(docs.astype(np.int32) + 1, slots)
        mask, changed = mask.copy(), ids.copy()
        if p == CHANGED_PACK:
            assert len(docs) > CHANGED_DOCUMENT + 1, "documents on both sides"
            own = np.flatnonzero(number == docs[CHANGED_DOCUMENT] + 1)
            mask[own] = 0
            changed[own[0]] += 1
            found["changed"] = int(number[own[0]])
        rest = lens, slots, docs, offsets
        before.append((ids, mask, *rest))
        after.append((changed, mask, *rest))
        numbers.append((number, mask, *rest))
    for name, rows in (("before", before), ("after", after), ("numbers", numbers)):
        found[name] = make_shards(folder / "packs" / name, rows, capacity=CAPACITY, align=ALIGN, cp=CP)
    return found


def rows_of(shards, config, mesh):
    """(facts of a step over all packs, this rank's rows of it)."""
    dataset = open_shards(shards, 320)
    layout, data = config.layout, config.data
    cut = choose_cut(layout.cp_method, mesh.cp_size, mesh.cp_rank, dataset.manifest, layout.sequence)
    options = {"dp_rank": mesh.dp_rank, "dp_size": mesh.dp_size, "device": torch.device("cpu"), "cut": cut}
    schedule = Schedule(len(dataset), "input", 0, 0, data.batch_packs, data.micro_packs)
    loader = PackedLoader(dataset, schedule, **options)
    facts = loader.next_step()
    rows = [row.clone() for row in loader.rows()]
    loader.close()
    return facts, rows


def probe(model_dir, before, after, numbers, changed, config):
    """Of this rank: (how far the largest output outside the changed document moved, inside, all gradients; whether the
    gradients are more than 0), None where it has no such output."""
    mesh = build_mesh(config.layout, torch.device("cpu"))
    with torch.device("meta"):
        model = Decoder(hf.read_config(model_dir)).double()
    model = parallelize(model, mesh, config)
    model.to_empty(device="cpu")
    hf.load_weights(model, model_dir)
    outputs: list[torch.Tensor] = []
    if model.norm is not None:  # the last states before the head, on the ranks of the last stage
        model.norm.register_forward_hook(lambda _, args, out: outputs.append(out.detach().clone()))
    _, rows = rows_of(numbers, config, mesh)
    own = torch.cat([_stream(row.input_ids == changed, mesh, config) for row in rows])
    states, gradients = [], []
    for shards in (before, after):
        facts, rows = rows_of(shards, config, mesh)
        accumulate_gradients(model, rows, len(rows), facts.target_tokens)
        states.append(torch.cat(outputs) if outputs else None)
        gradients.append(torch.cat([_whole(p.grad).flatten() for p in model.parameters()]))
        model.zero_grad()
        outputs.clear()
    outside = inside = None
    if states[0] is not None:
        assert len(states[0]) == len(own)
        moved = (states[0] - states[1]).abs().amax(dim=1)
        outside = moved[~own].max().item() if (~own).any() else None
        inside = moved[own].max().item() if own.any() else None
    return outside, inside, distance(gradients[1], gradients[0]), gradients[0].any().item()


def _stream(is_own, mesh, config):
    """The part of a row's tokens that is in this tensor rank's stream."""
    if not config.layout.sp or mesh.tp_size == 1:
        return is_own
    return is_own.chunk(mesh.tp_size)[mesh.root.get_local_rank("tp")]


def _whole(gradient):
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def probes(cases):
    return [probe(*case) for case in cases]


def case(model, micro=1, batch=8, **layout):
    return model, Config(data=Data(batch_packs=batch, micro_packs=micro), layout=Layout(**layout))


CASES = {
    2: [
        case("deepseek_v3", ep=2),
        case("gpt_oss", ep=2, cp=2, cp_method="needed"),
        case("gemma2", pp=2, pp_schedule="dualpipev"),
    ],
    4: [case("gpt_oss", micro=2, pp=2, ep=2), case("deepseek_v3", ep=2, tp=2)],
}
EXPERTS = ("deepseek_v3", "gpt_oss")
PRODUCT = {
    2: [
        *(case(model, micro=2, ep=2) for model in EXPERTS),
        *(case(model, ep=2, cp=2, cp_method=method) for model in EXPERTS for method in METHODS),
        *(case(model, ep=2, tp=2, sp=sp) for model in EXPERTS for sp in (True, False)),
        *(case("gemma2", pp=2, pp_schedule=name) for name in SCHEDULES),
        *(case("gpt_oss, 8 layers", pp=2, pp_schedule=name) for name in SCHEDULES),
    ],
    4: [
        *(case(model, ep=4) for model in EXPERTS),
        *(case(model, ep=2) for model in EXPERTS),  # ep_shard 2
        *(case(model, ep=2, dp_replicate=2) for model in EXPERTS),
        *(case(model, ep=4, cp=2, tp=2) for model in EXPERTS),
        *(case("gpt_oss", ep=2, cp=2, tp=2, cp_method=method) for method in METHODS),
        *(case("gpt_oss, 8 layers", pp=2, ep=2, pp_schedule=name) for name in SCHEDULES),
        *(case("gemma2", pp=4, pp_schedule=name) for name in SCHEDULES),
        *(case("gemma2", pp=2, cp=2, cp_method=method) for method in METHODS),
        *(case("gemma2", pp=2, tp=2, pp_schedule=name) for name in ("1f1b", "zbv")),
    ],
    8: [
        *(case("gemma2", pp=2, dp_shard=2, tp=2, pp_schedule=name) for name in SCHEDULES),
        # 4 data ranks: a batch of 16 makes the 4 rows that the last schedule needs.
        *(case("gpt_oss, 8 layers", batch=16, pp=2, ep=2, dp_replicate=2, pp_schedule=name) for name in SCHEDULES),
        *(case("gpt_oss, 8 layers", pp=2, ep=2, pp_schedule=name) for name in ("1f1b", "zbv")),  # ep_shard 2
        *(case("gemma2", pp=2, cp=2, tp=2, cp_method=method) for method in METHODS),
        case("gemma2", pp=2, cp=2, tp=2, pp_schedule="interleaved-zb"),
        case("deepseek_v3", pp=2, cp=2, tp=2, ep=4),
        case("gpt_oss, 8 layers", pp=2, cp=2, tp=2, ep=2, cp_method="ring", pp_schedule="zbv"),
    ],
}


def check(world, cases, places):
    folders = [places[name] for name in ("before", "after", "numbers", "changed")]
    arguments = [(places[model], *folders, config) for model, config in cases]
    for (model, config), *ranks in zip(cases, *run_ranks(probes, world, arguments, timeout=280), strict=True):
        where = f"{model} {config.layout}"
        limit = 0.0 if model == "gemma2" else 1e-12
        assert max(outside for outside, *_ in ranks if outside is not None) <= limit, where
        assert max(inside for _, inside, *_ in ranks if inside is not None) > 1e-4, where
        assert max(moved for *_, moved, _ in ranks) <= limit, where
        assert all(some for *_, some in ranks), where


@pytest.mark.parametrize("world", CASES)
def test_a_changed_token_moves_its_document_alone(world, places):
    check(world, CASES[world], places)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(3))
@pytest.mark.parametrize("world", PRODUCT)
def test_and_so_in_the_whole_product(world, part, places):
    check(world, PRODUCT[world][part::3], places)
