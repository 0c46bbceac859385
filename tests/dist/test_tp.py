"""Tensor and sequence parallelism: every layout gives the loss and gradients of the documents one at a time, no token
reaches another document, and what does not fit together is refused by name."""

import functools
from dataclasses import replace
from fnmatch import fnmatchcase

import numpy as np
import pytest
import torch
import torch.distributed as dist
from parity import LIMIT, by_documents, packed_steps
from reference import distance
from tiny_models import DENSE, EAGER, write_tiny_model
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from formats.dataset import PackedDataset
from make_shards import make_shards, random_packs
from ranks import run_ranks
from train import hf
from train.config import Config, Data, Layout, Model
from train.cut import choose_cut
from train.data import PackedLoader, Schedule, open_shards
from train.loss import VocabPart, linear_cross_entropy
from train.mesh import build_mesh
from train.model.decoder import Decoder
from train.parallel.apply import parallelize
from train.parallel.plans import PLANS
from train.parallel.tensor_axis import TensorAxis
from train.parallel.tp import choose_styles

SHARDS = {"align 1": (199, 1, 1), "align 4": (200, 4, 2)}  # name → (capacity, align, cp): 199 tokens are cut by nothing


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """`places(name)` → folder of a model or of shards, made when first asked for."""
    folder = tmp_path_factory.mktemp("tp")

    @functools.cache
    def make(name):
        if name in DENSE:
            return write_tiny_model(folder / name, name)
        capacity, align, cp = SHARDS[name]
        rows = random_packs(np.random.default_rng(4), 5, capacity, align, 331)
        return make_shards(folder / name, rows, capacity=capacity, align=align, cp=cp)

    return make


@pytest.fixture(scope="module")
def wanted(places, tmp_path_factory):
    """`wanted(model, shards, dtype)` → (loss, file of the gradients) of transformers, document by document."""
    folder = tmp_path_factory.mktemp("wanted")

    @functools.cache
    def compute(model, shards, dtype):
        attention = "eager" if model in EAGER else "sdpa"
        loss, gradients = by_documents(places(model), PackedDataset(places(shards)), dtype, attention)
        path = folder / f"{model}-{shards}-{dtype}.pt"
        torch.save(gradients, path)
        return loss, path

    return compute


F32, F64 = torch.float32, torch.float64


def case(model, dtype=F64, shards="align 1", micro_packs=3, recompute="none", **layout):
    data = Data(batch_packs=6, micro_packs=micro_packs)
    return model, shards, dtype, Config(data=data, layout=Layout(**layout), model=Model(recompute=recompute))


# 5 packs and a batch of 6, of which one is empty: 2 rows of 3 packs are accumulated, or 1 over dp.
CASES = {
    2: [
        *(case(model, dtype, tp=2) for model in ("llama", "olmo2") for dtype in LIMIT),
        *(case(model, tp=2, sp=False, recompute="full") for model in ("llama", "olmo2")),
        case("gemma2", tp=2, micro_packs=2, recompute="full"),
    ],
    4: [
        *(case(model, tp=4) for model in ("llama", "olmo2", "gemma2")),  # 2 key/value heads on 4 ranks
        case("olmo2", F32, tp=4, sp=False, micro_packs=6, recompute="full"),
        case("olmo2", tp=2),
        case("llama", tp=2, dp_replicate=2, micro_packs=1),
        case("llama", tp=2, cp=2, shards="align 4"),
        case("gemma2", tp=2, cp=2, cp_method="needed", sp=False),
    ],
    8: [case("llama", F32, tp=2, cp=2, shards="align 4", recompute="full")],
}


def check(world, cases, places, wanted):
    arguments = [
        (places(model), places(shards), config, dtype, wanted(model, shards, dtype)[1])
        for model, shards, dtype, config in cases
    ]
    of_ranks = run_ranks(packed_steps, world, arguments, timeout=280)
    for (model, shards, dtype, config), *results in zip(cases, *of_ranks, strict=True):
        where = f"{model} {dtype} {shards} {config.layout} {config.data} {config.model.recompute}"
        for loss, error, parameter in results:
            assert loss == pytest.approx(wanted(model, shards, dtype)[0], rel=LIMIT[dtype]), where
            assert error <= LIMIT[dtype], f"{parameter}: {where}"


@pytest.mark.parametrize("world", CASES)
def test_loss_and_every_gradient_equal_the_documents_one_at_a_time(world, places, wanted):
    check(world, CASES[world], places, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("model", DENSE)
def test_every_family_in_every_layout(model, places, wanted):
    layouts = {
        2: [{"tp": 2, "sp": sp, "recompute": recompute} for sp in (True, False) for recompute in ("none", "full")],
        4: [
            *({"tp": 4, "sp": sp} for sp in (True, False)),
            *({"tp": 2, "cp": 2, "cp_method": method} for method in ("gather", "needed", "ring", "ulysses")),
            {"tp": 2, "sp": False, "dp_replicate": 2, "recompute": "selective", "micro_packs": 1},
        ],
    }
    for world, cases in layouts.items():
        check(world, [case(model, dtype, **options) for options in cases for dtype in LIMIT], places, wanted)


@pytest.mark.slow
def test_three_kinds_of_ranks_in_every_way(places, wanted):
    ways = [{"cp_method": method, "sp": sp} for method in ("gather", "ring", "ulysses") for sp in (True, False)]
    cases = [case(model, tp=2, cp=2, shards="align 4", **way) for model in ("llama", "olmo2") for way in ways]
    pipelines = [{"cp": 2}, {"cp": 2, "cp_method": "ring", "pp_schedule": "gpipe"}, {}, {"sp": False}]
    # Rows of one pack: a pipeline needs as many rows as stages, also where dp takes half of them.
    cases += [case(model, tp=2, pp=2, micro_packs=1, **way) for model in ("llama", "olmo2") for way in pipelines]
    check(8, [*cases, case("llama", tp=4, cp=2), case("olmo2", tp=4, dp_replicate=2)], places, wanted)


OTHER_PLANS = (
    "lm_head=stream, embed_tokens=stream",
    "layers.*.mlp=stream, layers.0.attention=whole",
    "layers.1.mlp=whole, layers.*.attention.k_proj.weight=shard(1), norm.weight=shard(0)",
)


def test_another_plan_gives_the_same_gradients(places, wanted):
    check(2, [case("llama", tp=2, tp_plan=plan, micro_packs=6) for plan in OTHER_PLANS], places, wanted)


@pytest.mark.slow
def test_every_plan_gives_the_same_gradients(places, wanted):
    plans = (*OTHER_PLANS, "lm_head=stream", "layers.*.weight=shard(0)", "layers.*.attention=whole")
    models = ("llama", "olmo2", "gemma2")
    cases = [case(m, tp=2, tp_plan=plan, sp=sp) for m in models for plan in plans for sp in (True, False)]
    check(2, cases, places, wanted)
    # 4 heads over 8 ranks: attention whole, the rest shared out.
    check(8, [case("llama", tp=8, tp_plan="layers.*.attention=whole")], places, wanted)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operator returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def losses_over_ranks(cases):
    """For each (softcap, dtype), in chunks of 16: loss, gradient of the hidden states, of this rank's part of the head,
    and elements of the largest tensor made."""
    results = []
    for softcap, dtype in cases:
        hidden, weight, labels = loss_inputs()
        axis = TensorAxis(init_device_mesh("cpu", (3,)), sequence=False)
        rows = axis.part(len(weight))
        options = {"softcap": softcap, "chunk": 16, "vocab": VocabPart(axis.group, rows, most=111)}
        hidden, own = hidden.to(dtype).requires_grad_(), weight[rows].to(dtype).requires_grad_()
        with Largest() as largest:
            loss = linear_cross_entropy(hidden, own, labels, **options)
            grads = torch.autograd.grad(loss / 7, (hidden, own))
        with torch.no_grad():
            assert torch.equal(loss, linear_cross_entropy(hidden, own, labels, **options))
        results.append((loss.detach(), *grads, largest.elements))
    return results


def loss_inputs():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (70, 331))
    labels = torch.randint(331, (70,), generator=generator)
    labels[torch.rand(70, generator=generator) < 0.4] = -100
    labels[:4] = torch.tensor([0, 110, 111, 330])  # the borders of the parts
    return hidden, weight, labels


def test_loss_over_uneven_parts_of_the_vocabulary_is_exact_and_holds_a_chunk_of_logits():
    hidden, weight, labels = (x.requires_grad_() if x.is_floating_point() else x for x in loss_inputs())
    limits = {F32: 1e-6, F64: 1e-14}
    cases = [(softcap, dtype) for softcap in (None, 5.0) for dtype in limits]
    for (softcap, dtype), *ranks in zip(cases, *run_ranks(losses_over_ranks, 3, cases), strict=True):
        logits = hidden @ weight.t()
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        wanted = torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)
        wanted_hidden, wanted_weight = torch.autograd.grad(wanted / 7, (hidden, weight))
        assert len({loss.item() for loss, *_ in ranks}) == 1, "the same number on every rank"
        assert distance(ranks[0][0], wanted) <= limits[dtype]
        assert distance(sum(grad for _, grad, *_ in ranks), wanted_hidden) <= limits[dtype]
        assert distance(torch.cat([grad for _, _, grad, _ in ranks]), wanted_weight) <= limits[dtype]
        assert max(largest for *_, largest in ranks) <= 16 * 111, "a chunk of this rank's logits, or its weight"


def probe(model_dir, folders, document, config):
    """This rank's (outputs before, after a token of `document` changed; which tokens are its own; whether the gradients
    of the other documents' targets moved, and whether there are any)."""
    mesh = build_mesh(config.layout, torch.device("cpu"))
    with torch.device("meta"):
        model = Decoder(hf.read_config(model_dir))
    model = parallelize(model, mesh, config)
    model.to_empty(device="cpu")
    hf.load_weights(model, model_dir)
    rows = []
    for folder in folders:
        dataset, layout = open_shards(folder), config.layout
        cut = choose_cut(layout.cp_method, mesh.cp_size, mesh.cp_rank, dataset.manifest, layout.sequence)
        schedule = Schedule(1, "input", 0, 0, 1, 1)
        loader = PackedLoader(dataset, schedule, dp_rank=0, dp_size=1, device=torch.device("cpu"), cut=cut)
        loader.next_step()
        rows += loader.rows()
        loader.close()
    own = rows[0].input_ids == document
    outputs, gradients = [], []
    for row in rows[1:]:
        with torch.no_grad():
            outputs.append(model(row.input_ids, row.position_ids, row.segments))
        model(row.input_ids, row.position_ids, row.segments, row.labels.masked_fill(own, -100)).backward()
        gradients.append([p.grad.full_tensor() for p in model.parameters()])
        model.zero_grad()
    moved = any(not torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    return *outputs, own, moved, any(gradient.any().item() for gradient in gradients[0])


def probes(cases):
    return [probe(*arguments) for arguments in cases]


def test_a_changed_token_moves_its_document_alone(places, tmp_path):
    """Through tp × cp, every method; whose a token is, is read off a pack whose ids are numbers of documents."""
    capacity, align, cp = SHARDS["align 4"]
    ids, *rest = random_packs(np.random.default_rng(8), 1, capacity, align, 300)[0]
    numbers = np.repeat(np.arange(1, len(rest[2]) + 1, dtype=np.int32), rest[2])
    document = int(numbers[capacity // 2])  # across the middle, where a contiguous cut is
    changed = ids.copy()
    changed[np.flatnonzero(numbers == document)[0]] += 1
    options = {"capacity": capacity, "align": align, "cp": cp}
    packs = {"numbers": numbers, "before": ids, "after": changed}
    folders = [make_shards(tmp_path / name, [(array, *rest)], **options) for name, array in packs.items()]
    methods = ("gather", "needed", "ring", "ulysses")
    layouts = [Layout(tp=2, cp=2, cp_method=method, sp=method != "needed") for method in methods]
    cases = [(places("gemma2"), folders, document, Config(layout=layout)) for layout in layouts]
    for layout, *ranks in zip(layouts, *run_ranks(probes, 4, cases, timeout=280), strict=True):
        assert any(own.any() for _, _, own, _, _ in ranks), layout
        for before, after, own, moved_gradient, some in ranks:
            moved = (before != after).any(dim=1)
            assert not moved[~own].any(), layout
            assert not moved_gradient, layout
            assert some, layout
            assert moved[own].any() or not own.any(), layout


@pytest.mark.parametrize("family", DENSE)
def test_every_pattern_of_a_plan_matches_and_every_parameter_has_a_style(family, places):
    config = hf.read_config(places(family))
    with torch.device("meta"):
        model = Decoder(config)
    chosen = choose_styles(model, {})
    for pattern in PLANS[model.config.family]:
        assert any(fnmatchcase(name, pattern) for name in chosen), pattern
    assert {name.rpartition(".")[0] for name, _ in model.named_parameters()} <= chosen.keys()


def refusals(model_dir, cases):
    """What a mesh of as many pretended ranks says to each (ranks, changes to the model, layout)."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    said = []
    config = hf.read_config(model_dir)
    for ranks, changes, layout in cases:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
        with torch.device("meta"):
            model = Decoder(replace(config, **changes))
        try:
            parallelize(model, build_mesh(layout, torch.device("cpu")), Config(layout=layout))
            said.append("nothing")
        except ValueError as error:
            said.append(str(error))
        dist.destroy_process_group()
    return said


REFUSED = [
    (2, {}, Layout(tp=2, tp_plan=plan), says)
    for plan, says in (
        ("layers.*.atention=whole", "no module or parameter of this model is called layers.*.atention; did you mean"),
        ("lm_head=columns", "lm_head has style 'columns'; there are gather, column, kv, row"),
        ("lm_head", "lm_head has style ''; there are"),
        ("norm=vocab", "style vocab does not fit norm, which takes kv, features, stream, whole"),
        ("layers.0.attention=stream", "style stream does not fit layers.0.attention, which takes gather, whole"),
        ("layers.0.mlp.up_proj=whole", "layers.0.mlp.up_proj fits only the other parts of layers.0.mlp; give"),
        ("norm.weight=stream", "norm.weight is a parameter and takes shard(0), shard(1) or replicate, not 'stream'"),
        ("norm.weight=shard(1)", "norm.weight has 1 dimensions and cannot be placed as"),
    )
] + [
    (3, {}, Layout(tp=3), "layers.0.attention has 4 query and 2 key/value heads, which --tp 3 cannot share out"),
    (4, {"num_heads": 12, "num_kv_heads": 6}, Layout(tp=4), "12 query and 6 key/value heads, which --tp 4 cannot"),
    (4, {"vocab_size": 5}, Layout(tp=4), "embed_tokens.weight of shape (5, 48) cannot be cut over --tp 4"),
    (4, {"intermediate_size": 5}, Layout(tp=4), "layers.0.mlp.gate_proj.weight of shape (5, 48) cannot be cut"),
    (10, {}, Layout(tp=2), "embed_tokens.weight of shape (331, 48) into uneven rows, which FSDP cannot shard further"),
    (2, {"family": "unheard"}, Layout(tp=2), "there is no plan for unheard models; leave --tp at 1, or take llama"),
    (8, {}, Layout(tp=2, cp=4, cp_method="ulysses"), "2 query and 1 key/value heads of a tensor rank over --cp 4"),
    (4, {}, Layout(tp=2, pp=2, tp_plan="lm_head=stream"), "embed_tokens has style vocab and lm_head stream"),
    (2, {}, Layout(tp=2), "nothing"),
]


def test_what_does_not_fit_together_is_refused_by_name(places):
    cases = [case[:3] for case in REFUSED]
    (said,) = run_ranks(refusals, 1, places("llama"), cases, process_group=False)
    for (*_, wanted), sentence in zip(REFUSED, said, strict=True):
        assert wanted in sentence
        assert "\n" not in sentence
