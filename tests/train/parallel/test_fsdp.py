"""What each switch of FSDP changes: which weights are gathered when, what is sent in which type, and where it rests."""

import functools
from dataclasses import replace

import pytest
import torch
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from ranks import run_ranks
from train.attention.interface import Segments
from train.config import Config, Layout, Model
from train.mesh import build_mesh
from train.model.config import LayerConfig, ModelConfig, MoeConfig, Rope
from train.model.decoder import Decoder
from train.model.initialize import init_weights
from train.parallel import fsdp
from train.parallel.apply import parallelize
from train.row import MicroBatch
from train.step import accumulate_gradients

LAYERS = 5
GROUPS = LAYERS + 2  # the embedding, and norm and head together
SENT = {"_allgather_base_": "gather", "_reduce_scatter_base_": "reduce", "allreduce_": "reduce over replicas"}


class Sent(TorchDispatchMode):
    """Notes every collective as (kind, type of what is sent)."""

    def __init__(self):
        super().__init__()
        self.events = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[-1]
        if func.namespace == "c10d" and name in SENT:
            tensor = args[0][0] if isinstance(args[0], list) else args[0]
            self.events.append((SENT[name], str(tensor.dtype)[6:]))
        return func(*args, **(kwargs or {}))


def step(config, rows):
    """What happened in a step of so many rows on this rank: the collectives, with ("forward", i) and ("backward", i)
    where block i begins forward and is through backward; types of the hidden states, of the gradients, of the
    routers' weights in forward, and of the cosines and sines that a block is given."""
    layer = LayerConfig(window=None, rope=Rope(1e4, 8))
    shape = ModelConfig("llama", 37, 16, 24, 2, 1, 8, (layer,) * LAYERS, 64, 1e-5, 8**-0.5, tied_embeddings=False)
    if config.layout.ep > 1:
        shape = replace(shape, layers=(replace(layer, experts=True),) * LAYERS, moe=MoeConfig(4, 2, 8))
    mesh = build_mesh(config.layout, torch.device("cpu"))
    sent, hidden, routing, angles, offloads = Sent(), set(), set(), set(), []

    def noting(*args, **options):
        offloads.append(options["offload_policy"])
        return fully_shard(*args, **options)

    fsdp.fully_shard = noting
    with torch.device("meta"):
        model = Decoder(shape)
    model = parallelize(model, mesh, config)
    fsdp.fully_shard = fully_shard
    model.to_empty(device="cpu")
    init_weights(model, 0)

    def note(number, block, inputs):
        sent.events.append(("forward", number))
        hidden.add(inputs[0].dtype)
        angles.update(table.dtype for table in inputs[1])
        inputs[0].register_hook(lambda gradient: sent.events.append(("backward", number)))

    for number, block in enumerate(model.layers.children()):
        block.register_forward_pre_hook(functools.partial(note, number))  # after FSDP's own
        if config.layout.ep > 1:
            block.mlp.router.register_forward_pre_hook(lambda router, _: routing.add(router.weight.dtype))
    ids = torch.arange(12, dtype=torch.int32)
    batch = [MicroBatch(ids, ids.long(), ids, Segments.of([12]))] * rows
    with sent:
        accumulate_gradients(model, batch, rows, 12 * rows, defer_sync=config.layout.defer_sync)
    return sent.events, hidden, {p.grad.dtype for p in model.parameters()}, offloads, routing, angles


def steps(cases):
    """Several cases in the same processes."""
    return [step(*case) for case in cases]


CASES = {
    "default": (Config(), 1),
    "no prefetch": (Config(layout=Layout(prefetch=0)), 1),
    "prefetch 2": (Config(layout=Layout(prefetch=2)), 1),
    "no reshard": (Config(layout=Layout(reshard=False)), 1),
    "offload": (Config(layout=Layout(cpu_offload=True)), 1),
    "replicas": (Config(layout=Layout(dp_replicate=2)), 1),
    "2 rows": (Config(), 2),
    "2 rows, each reduced": (Config(layout=Layout(defer_sync=False)), 2),
    "bfloat16": (Config(model=Model(dtype="bfloat16")), 1),
    "bfloat16 summed": (Config(model=Model(dtype="bfloat16", reduce_dtype="bfloat16")), 1),
    "float32, bfloat16 summed": (Config(model=Model(reduce_dtype="bfloat16")), 1),
}


MIXTURES = {
    "default": (Config(model=Model(dtype="bfloat16"), layout=Layout(ep=2)), 1),
    "recompute": (Config(model=Model(dtype="bfloat16", recompute="full"), layout=Layout(ep=2)), 1),
    "no prefetch": (Config(model=Model(dtype="bfloat16"), layout=Layout(ep=2, prefetch=0)), 1),
    "prefetch 2": (Config(model=Model(dtype="bfloat16"), layout=Layout(ep=2, prefetch=2)), 1),
}


def seen_by(world_size, cases):
    """Name of a case → what rank 0 saw (the other ranks saw the same)."""
    ranks = run_ranks(steps, world_size, list(cases.values()))
    assert all(rank == ranks[0] for rank in ranks)
    return dict(zip(cases, ranks[0], strict=True))


@pytest.fixture(scope="module")
def seen():
    return seen_by(2, CASES)


@pytest.fixture(scope="module")
def seen_of_mixtures():
    """Experts on 2 × 2 ranks, so that their weights are both distributed and gathered."""
    return seen_by(4, MIXTURES)


def gathered(events, mark):
    """How many groups of weights had been gathered at each of these marks."""
    at = [i for i, (kind, _) in enumerate(events) if kind == mark]
    return [sum(kind == "gather" for kind, _ in events[:i]) for i in at]


@pytest.mark.parametrize(
    ("case", "forward", "backward"),
    [
        # The embedding and block 0, then in each step what is asked for; in the end all groups. Backward gathers again
        # blocks 3 to 0 and the embedding: the last block and the head were kept.
        ("no prefetch", [2, 3, 4, 5, 6], [8, 9, 10, 11, 12]),  # on its own FSDP looks one ahead backward
        ("default", [3, 4, 5, 6, 7], [8, 9, 10, 11, 12]),
        ("prefetch 2", [4, 5, 6, 7, 7], [9, 10, 11, 12, 12]),
        ("no reshard", [3, 4, 5, 6, 7], [7, 7, 7, 7, 7]),
    ],
)
def test_weights_are_gathered_ahead_and_kept_as_the_flags_say(case, forward, backward, seen):
    events = seen[case][0]
    assert (gathered(events, "forward"), gathered(events, "backward")) == (forward, backward)


@pytest.mark.parametrize(
    ("case", "forward", "backward"),
    [
        # A block is three groups: its router, in float32, and its experts are gathered apart. On its own FSDP gathers
        # these two when they are about to run, after the host has waited for the routing.
        ("no prefetch", [2, 5, 8, 11, 14], [18, 21, 24, 27, 30]),
        ("default", [7, 10, 13, 16, 17], [20, 23, 26, 29, 30]),
        ("recompute", [7, 10, 13, 16, 17], [20, 23, 26, 29, 30]),
        ("prefetch 2", [10, 13, 16, 17, 17], [23, 26, 29, 30, 30]),
    ],
)
def test_a_mixture_is_gathered_ahead_with_its_block(case, forward, backward, seen_of_mixtures):
    events = seen_of_mixtures[case][0]
    assert (gathered(events, "forward"), gathered(events, "backward")) == (forward, backward)


def test_routers_of_a_bfloat16_model_choose_by_float32_weights(seen_of_mixtures):
    for _, hidden, _, _, routing, _ in seen_of_mixtures.values():
        assert (hidden, routing) == ({torch.bfloat16}, {torch.float32})


@pytest.mark.parametrize(
    ("case", "weights", "sums"),
    [
        ("default", "float32", "float32"),
        ("bfloat16", "bfloat16", "float32"),
        ("bfloat16 summed", "bfloat16", "bfloat16"),
        ("float32, bfloat16 summed", "float32", "bfloat16"),
    ],
)
def test_weights_and_gradients_travel_in_the_types_of_the_flags(case, weights, sums, seen):
    events, hidden, gradients, *_, angles = seen[case]
    assert {event for event in events if event[0] in SENT.values()} == {("gather", weights), ("reduce", sums)}
    assert hidden == {getattr(torch, weights)}
    assert gradients == {torch.float32}, "what the optimizer sees"
    assert angles == {torch.float32}, "positions beyond 256 are none in bfloat16"


@pytest.mark.parametrize(("case", "reductions"), [("2 rows", GROUPS), ("2 rows, each reduced", 2 * GROUPS)])
def test_gradients_of_several_rows_are_reduced_once_or_after_each(case, reductions, seen):
    kinds = [kind for kind, _ in seen[case][0]]
    assert kinds.count("reduce") == reductions
    second = [i for i, kind in enumerate(kinds) if kind == "forward"][LAYERS]
    assert kinds[:second].count("reduce") == reductions - GROUPS


def test_replicas_hold_all_weights_and_sum_gradients(seen):
    kinds = [kind for kind, _ in seen["replicas"][0]]
    assert (kinds.count("gather"), kinds.count("reduce over replicas")) == (0, GROUPS)


def test_only_offload_keeps_parameters_in_host_memory(seen):
    assert all(isinstance(policy, CPUOffloadPolicy) for policy in seen["offload"][3])
    assert all(type(policy) is OffloadPolicy for policy in seen["default"][3])
