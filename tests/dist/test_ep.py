"""Expert parallelism: loss, every gradient and the load of every expert are the same on every mesh, with the auxiliary
losses in them; without these losses they are those of transformers, document by document."""

import functools
import itertools
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from mixture_steps import BALANCED, built, compare_steps, step, write_steps
from parity import LIMIT, by_documents, packed_steps
from tiny_models import MIXTURES, write_tiny_model

from formats.dataset import PackedDataset
from formats.layout import align_up, cu_seqlens
from make_shards import make_shards, random_packs
from ranks import run_ranks
from train import hf
from train.balance import routers
from train.config import Config, Data, Layout, Model
from train.mesh import build_mesh
from train.model.decoder import Decoder
from train.parallel import ep
from train.parallel.apply import parallelize
from train.parallel.tp import choose_styles, parse_overrides

SIZES = {"vocab_size": 320, "intermediate_size": 40}
# (capacity, align, packed for cp): uneven, and aligned for a zigzag cut.
SHARDS = {"packed for 1": (199, 1, 1), "packed for 2": (200, 4, 2)}
PADDED = "packed for 1, padded"  # the documents of the first in longer slots of longer packs


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ep")
    made = {family: write_tiny_model(folder / family, family, **SIZES) for family in MIXTURES}
    for name, (capacity, align, cp) in SHARDS.items():
        rows = random_packs(np.random.default_rng(4), 5, capacity, align, 320)
        made[name] = make_shards(folder / name, rows, capacity=capacity, align=align, cp=cp)
    rows = random_packs(np.random.default_rng(4), 5, *SHARDS["packed for 1"][:2], 320)
    made[PADDED] = make_shards(folder / PADDED, [padded(*row, 16) for row in rows], capacity=352, align=16, cp=8)
    return made


def padded(ids, mask, lens, _, docs, offsets, align):
    """A row of documents without padding between them, in slots of `align`; what fills them is a token like others."""
    slots = align_up(lens, align)
    starts = np.repeat(cu_seqlens(slots)[:-1] - cu_seqlens(lens)[:-1], lens) + np.arange(len(ids))
    wide_ids, wide_mask = np.full(slots.sum(), 7, np.int32), np.zeros(slots.sum(), np.uint8)
    wide_ids[starts], wide_mask[starts] = ids, mask
    return wide_ids, wide_mask, lens, slots, docs, offsets


def case(ep, *, family="deepseek_v3", shards="packed for 1", dtype=torch.float64, micro=1, recompute="none", **layout):
    config = Config(
        data=Data(batch_packs=6, micro_packs=micro),
        model=Model(recompute=recompute),
        layout=Layout(ep=ep, **layout),
        router=BALANCED,
    )
    return config, shards, family, dtype


CASES = {
    2: [
        case(2),
        case(2, dtype=torch.float32, micro=2, recompute="selective"),
        case(2, family="gpt_oss", recompute="full", cp=2, cp_method="needed"),
        case(1, cp=2, family="qwen2_moe", shards="packed for 2", recompute="selective"),
        case(2, tp=2, sp=False, family="qwen2_moe"),
        case(2, tp=2, family="qwen2_moe", recompute="selective"),
    ],
    3: [case(1, family="mixtral"), case(1, family="gpt_oss", recompute="selective")],  # 4 experts: each is cut within
    4: [
        case(2, family="mixtral"),
        case(2, dp_replicate=2, family="qwen2_moe"),
        case(2, tp=2, cp=2, micro=2, shards=PADDED),
        case(2, pp=2, family="qwen2_moe"),
    ],
}


@pytest.fixture(scope="module")
def alone(places, tmp_path_factory):
    """(model, shards, dtype) → (loss, load, file of the gradients) of one process, one pack a row, without padding
    where the shards are another's padded."""
    folder = tmp_path_factory.mktemp("alone")

    @functools.cache
    def compute(family, shards, dtype):
        shards = shards.removesuffix(", padded")
        path = folder / f"{family}-{shards}-{dtype}.pt"
        config = Config(data=Data(batch_packs=6), router=BALANCED)
        (result,) = run_ranks(write_steps, 1, [(places[family], places[shards], config, dtype, path)], timeout=280)
        return *result[0], path

    return compute


def check_equal(world, cases, places, alone):
    arguments = [
        (places[family], places[shards], config, dtype, alone(family, shards, dtype)[2])
        for config, shards, family, dtype in cases
    ]
    for (config, shards, family, dtype), *ranks in zip(
        cases, *run_ranks(compare_steps, world, arguments, timeout=280), strict=True
    ):
        where = f"{config.layout} {config.data} {config.model.recompute} {shards} {family} {dtype}"
        wanted_loss, wanted_load, _ = alone(family, shards, dtype)
        for loss, error, parameter, load in ranks:
            assert loss == pytest.approx(wanted_loss, rel=LIMIT[dtype]), where
            assert error <= LIMIT[dtype], f"{parameter}: {where}"
            assert torch.equal(load.tokens, wanted_load.tokens), where
            assert load.dropped == 0
            assert load.aux_loss == pytest.approx(wanted_load.aux_loss, rel=LIMIT[dtype]), where
            assert load.z_loss == pytest.approx(wanted_load.z_loss, rel=LIMIT[dtype]), where


@pytest.mark.parametrize("world", CASES)
def test_loss_gradients_and_load_equal_one_process(world, places, alone):
    check_equal(world, CASES[world], places, alone)


def whole_weights(model_dirs):
    """Of each model the names, less their layer, of the matrices that both of two tensor ranks hold whole."""
    found = []
    config = Config(layout=Layout(tp=2))
    for model_dir in model_dirs:
        with torch.device("meta"):
            model = Decoder(hf.read_config(model_dir))
        model = parallelize(model, build_mesh(config.layout, torch.device("cpu")), config)
        held = {name: p.to_local().numel() == p.numel() for name, p in model.named_parameters() if p.ndim > 1}
        found.append({re.sub(r"layers\.\d+\.", "", name) for name, is_whole in held.items() if is_whole})
    return found


def test_tensor_ranks_share_out_all_that_is_large_in_attention_and_experts(places):
    wanted = {
        "mixtral": {"mlp.router.weight"},
        "qwen2_moe": {"mlp.router.weight", "mlp.shared_gate.weight"},
        "deepseek_v3": {"mlp.router.weight", "attention.q_a_proj.weight", "attention.kv_a_proj.weight"},
        "gpt_oss": {"mlp.router.weight"},
    }
    assert run_ranks(whole_weights, 2, [places[family] for family in wanted]) == 2 * [list(wanted.values())]


def test_parts_of_a_shared_expert_only_work_together(places):
    config = hf.read_config(places["deepseek_v3"])
    with torch.device("meta"):
        model = Decoder(config)
    for pattern, container in (("layers.*.mlp.shared.up_proj", "layers.0.mlp.shared"), ("*.experts", "layers.0.mlp")):
        with pytest.raises(ValueError, match=f"fits only the other parts of {container}; give"):
            choose_styles(model, parse_overrides(f"{pattern}=whole", config)[0])


def changed_bits(cases):
    """Names of the parameters whose gradients are not the same bits in every case."""
    first, *others = (step(*case)[1] for case in cases)
    return [name for name, gradient in first.items() if not all(torch.equal(gradient, other[name]) for other in others)]


def test_selective_recompute_beside_a_router_that_is_not_cast(places):
    """In bfloat16 the router is a group of FSDP in every mixture. What is computed again has the same bits."""
    cases = []
    for recompute in ("none", "selective"):
        model = Model(dtype="bfloat16", recompute=recompute)
        config = Config(data=Data(batch_packs=6), model=model, router=BALANCED)
        cases.append((places["mixtral"], places["packed for 1"], config, torch.float32))
    assert run_ranks(changed_bits, 2, cases) == [[], []]


def lossy_step(*case):
    """(rows that every expert of this rank ignored, the load of the step): the last of what came in, each time."""
    lost, complete = [], ep._expert_major

    def incomplete(*args):
        rows = complete(*args)
        lost.append((rows.counts > 0).sum().item())
        return replace(rows, counts=(rows.counts - 1).clamp(min=0))

    ep._expert_major = incomplete
    _, _, load = step(*case)
    return sum(lost), load


def test_tokens_that_reach_no_expert_are_counted(places):
    config, shards, family, dtype = case(2, dtype=torch.float32)
    lost, loads = zip(*run_ranks(lossy_step, 2, places[family], places[shards], config, dtype), strict=True)
    assert all(n > 0 for n in lost)
    assert [load.dropped for load in loads] == [sum(lost)] * 2


def test_without_auxiliary_losses_they_are_those_of_the_documents(places, tmp_path):
    """One process too: it is the reference of all others."""
    cases, wanted = [], []
    for family, dtype in itertools.product(("qwen2_moe", "gpt_oss"), LIMIT):
        attention = "eager" if family == "gpt_oss" else "sdpa"
        loss, gradients = by_documents(places[family], PackedDataset(places["packed for 2"]), dtype, attention)
        path = tmp_path / f"{family}-{dtype}.pt"
        torch.save(gradients, path)
        config = Config(data=Data(batch_packs=6), layout=Layout(ep=2))
        cases.append((places[family], places["packed for 2"], config, dtype, path))
        wanted.append((loss, dtype))
    for (loss, dtype), *ranks in zip(wanted, *run_ranks(packed_steps, 2, cases), strict=True):
        for measured, error, parameter in ranks:
            assert measured == pytest.approx(loss, rel=LIMIT[dtype])
            assert error <= LIMIT[dtype], parameter


@pytest.mark.slow
def test_routing_in_bfloat16_is_nearly_that_of_one_rank(places):
    """Expert ranks compute each token alike. One rank sums a token's experts in their order, expert ranks in that of
    its choices, tensor ranks add what attention gave in another order: all round to bfloat16 a little differently, and
    a few tokens whose scores nearly tie then choose otherwise in the layers after, not in the first."""
    loads = {}
    for world, layout in ((1, Layout()), (2, Layout(ep=2)), (4, Layout(ep=4)), (2, Layout(ep=2, tp=2))):
        config = Config(data=Data(batch_packs=6), model=Model(dtype="bfloat16"), layout=layout)
        loads[layout.ep, layout.tp] = run_ranks(routed, world, places["deepseek_v3"], places["packed for 2"], config)[0]
    alone = loads[1, 1]
    assert torch.equal(loads[4, 1], loads[2, 1])
    assert torch.equal(loads[2, 1][0], alone[0])
    assert (loads[2, 1] - alone).abs().sum() / alone.sum() < 0.002
    assert (loads[2, 2] - alone).abs().sum() / alone.sum() < 0.02


def routed(model_dir, shards, config):
    """float64[layers, E]: how often each expert was chosen in a forward pass over all packs and ranks."""
    mesh = build_mesh(config.layout, torch.device("cpu"))
    model, loader = built(model_dir, shards, config, mesh, torch.float32)
    loader.next_step()
    chosen = {layer: [] for layer in routers(model)}
    for layer, router in routers(model).items():
        router.register_forward_hook(lambda _, args, out, layer=layer: chosen[layer].append(out[0].flatten()))
    with torch.no_grad():
        for row in loader.rows():
            model(row.input_ids, row.position_ids, row.segments, row.labels)
    loader.close()
    total = torch.stack([torch.cat(parts).bincount(minlength=9)[:8] for parts in chosen.values()]).double()
    dist.all_reduce(total)
    return total


FULL = {
    2: [
        case(2, family=family, dtype=dtype, shards=shards, micro=micro, recompute=recompute, **layout)
        for family in ("deepseek_v3", "gpt_oss")
        for dtype in LIMIT
        for layout in ({}, *({"cp": 2, "cp_method": method} for method in ("gather", "needed", "ring", "ulysses")))
        for shards, micro, recompute in (("packed for 1", 1, "full"), ("packed for 2", 2, "none"))
    ],
    4: [
        case(4),
        case(4, dtype=torch.float32, family="mixtral"),
        case(2, dp_replicate=2, family="gpt_oss", shards=PADDED),
        case(2, tp=2, recompute="selective"),
        case(4, tp=2, family="gpt_oss", recompute="full"),
        case(2, cp=2, family="mixtral", recompute="selective"),
        case(2, tp=2, sp=False, family="gpt_oss", recompute="selective"),
        case(4, tp=4, sp=False, family="deepseek_v3", recompute="full"),
        case(2, tp=2, cp=2, sp=False, family="gpt_oss"),
        case(1, tp=2, cp=2, family="qwen2_moe", dtype=torch.float32),
        case(2, tp=4, family="qwen2_moe", recompute="selective"),
        case(2, tp=2, tp_plan="layers.*.mlp.shared=stream"),
        case(2, tp=2, tp_plan="layers.*.mlp.shared=whole", sp=False, family="qwen2_moe"),
        case(2, tp=2, pp=2, pp_schedule="interleaved-zb", pp_split="1,1"),
        case(4, cp=2, shards="packed for 2", micro=3, recompute="full"),
        case(2, pp=2, pp_schedule="interleaved-zb", pp_split="1,1"),
    ],
    8: [
        case(2, pp=2),
        case(2, pp=2, dp_replicate=2, shards=PADDED),
        case(4, pp=2, family="qwen2_moe", pp_schedule="interleaved-zb", pp_split="1,1"),
        case(2, pp=2, tp=2, family="gpt_oss", recompute="full"),
        case(4, pp=2, cp=2, shards="packed for 2", recompute="selective"),
        case(4, tp=2, cp=2, family="gpt_oss"),
        case(2, tp=2, pp=2, cp=2, recompute="full"),
        case(4, dp_replicate=2, tp=2, family="qwen2_moe"),
        case(8, family="deepseek_v3", cp=2, cp_method="ulysses"),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("part", range(3))
@pytest.mark.parametrize("world", FULL)
def test_the_full_product_equals_one_process(world, part, places, alone):
    check_equal(world, FULL[world][part::3], places, alone)
