"""Where a decoder is cut into stages, and what is refused before anything runs."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.pipelining import PipelineStage

from train.config import PP_SCHEDULES, SPLIT_BACKWARD, Config, Data, Layout
from train.model.config import LayerConfig, ModelConfig, Rope
from train.model.decoder import Decoder
from train.parallel.pp import (
    SCHEDULES,
    check_microbatches,
    cut_stages,
    layer_costs,
    layers_of_stages,
    read_split,
    split_by_cost,
)


def tiny(layers=6, vocab=64, tied=False):
    layer = LayerConfig(window=None, rope=Rope(10_000.0, 8))
    config = ModelConfig("llama", vocab, 16, 24, 2, 1, 8, (layer,) * layers, 64, 1e-5, 8**-0.5, tied_embeddings=tied)
    with torch.device("meta"):
        return Decoder(config)


def dearest(sizes, costs, before, after):
    starts = list(itertools.accumulate(sizes, initial=0))
    stages = [sum(costs[a:b]) for a, b in itertools.pairwise(starts)]
    stages[0] += before
    stages[-1] += after
    return max(stages)


@pytest.mark.parametrize("stages", [1, 2, 3, 5])
def test_no_other_split_has_a_cheaper_dearest_stage(stages):
    generator = torch.Generator().manual_seed(stages)
    for _ in range(40):
        layers = int(torch.randint(stages, 9, (), generator=generator))
        costs = torch.rand(layers, generator=generator).tolist()
        before, after = (3 * torch.rand(2, generator=generator)).tolist()
        sizes = split_by_cost(costs, stages, before, after)
        assert (len(sizes), sum(sizes), min(sizes) > 0) == (stages, layers, True)
        inner = itertools.combinations(range(1, layers), stages - 1)
        every = ([b - a for a, b in itertools.pairwise((0, *cuts, layers))] for cuts in inner)
        best = min(dearest(other, costs, before, after) for other in every)
        assert dearest(sizes, costs, before, after) == pytest.approx(best)


def test_the_head_counts():
    """A head worth two layers takes two layers from the last stage, and what is left is even."""
    assert split_by_cost([1.0] * 10, 4, before=0.1, after=2.0) == [3, 3, 3, 1]
    assert split_by_cost([1.0] * 8, 4, before=0.0, after=0.0) == [2, 2, 2, 2]
    layer = sum(p.numel() for p in tiny().layers[0].parameters() if p.ndim == 2)
    config = Config(layout=Layout(pp=2))
    assert [len(r) for r in layers_of_stages(tiny(vocab=2 * layer // 16), config)] == [4, 2]


def test_the_embedding_counts_a_tenth_of_the_head():
    """Of a head worth 20 layers: two layers less in the first stage, beside one whose only burden is layers."""
    layer = sum(p.numel() for p in tiny().layers[0].parameters() if p.ndim == 2)
    model = tiny(layers=9, vocab=20 * layer // 16)
    assert [len(r) for r in layers_of_stages(model, Config(layout=Layout(pp=3)))] == [3, 5, 1]


def test_experts_count_as_far_as_a_token_visits_them():
    block = torch.nn.ParameterDict({"router": torch.empty(8, 16), "experts": torch.empty(8, 16, 4)})
    moe = SimpleNamespace(top_k=2, num_experts=8)
    model = SimpleNamespace(config=SimpleNamespace(moe=moe), layers=torch.nn.ModuleList([block]))
    assert layer_costs(model) == [8 * 16 + 2 * 16 * 4]


@pytest.mark.parametrize(
    ("layout", "layers", "says"),
    [
        ({"pp": 4, "pp_schedule": "interleaved"}, 6, "makes 8 stages, but the model has 6 layers; lower --pp or take"),
        ({"pp": 8}, 6, "makes 8 stages, but the model has 6 layers; lower --pp"),
        ({"pp": 2, "pp_split": "3,2"}, 6, "--pp-split 3,2 adds up to 5 layers, but the model has 6"),
        ({"pp": 2, "pp_split": "2,2,2"}, 6, "names 3 stages, but --pp 2 with --pp-schedule 1f1b has 2"),
        ({"pp": 2, "pp_schedule": "interleaved", "pp_split": "2,2,2"}, 6, "has a multiple of 2; name so many"),
        (
            {"pp": 2, "pp_schedule": "zbv", "pp_split": "3,3"},
            6,
            "names 2 stages, but --pp 2 with --pp-schedule zbv has 4",
        ),
        ({"pp": 2, "pp_split": "6;0"}, 6, "must be the number of layers of each stage"),
        ({"pp": 2, "pp_split": "6,0"}, 6, "must be the number of layers of each stage"),
    ],
)
def test_layers_that_cannot_be_cut_so_are_refused(layout, layers, says):
    with pytest.raises(ValueError, match=r".") as error:
        layers_of_stages(tiny(layers), Config(layout=Layout(**layout)))
    assert says in str(error.value)


def test_a_split_is_read():
    assert read_split("6,6,5,3") == [6, 6, 5, 3]


def stage_numbers(schedule, pp, rank, layers=8):
    mesh = SimpleNamespace(pp_size=pp, pp_rank=rank, dp_size=1)
    config = Config(layout=Layout(pp=pp, pp_schedule=schedule), data=Data(batch_packs=8))
    return cut_stages(tiny(layers, tied=True), mesh, config)


def test_stages_hold_their_part_under_the_names_of_the_whole():
    whole = dict(tiny(8, tied=True).named_parameters())
    for schedule, pp in itertools.product(SCHEDULES, (2, 4)):
        held = [stage_numbers(schedule, pp, rank) for rank in range(pp)]
        stages = {number: stage for of_rank in held for number, stage in of_rank.items()}
        assert sorted(stages) == list(range(len(stages)))
        names = [name for number in sorted(stages) for name, _ in stages[number].named_parameters()]
        copy = names.pop(names.index("lm_head.weight"))  # the last stage's copy of the tied embedding
        assert sorted(names) == sorted(whole), (schedule, copy)
    assert list(stage_numbers("zbv", 2, 0)) == [0, 3]
    assert list(stage_numbers("interleaved", 2, 0)) == [0, 2]


def build(name, pp, rows):
    """Torch's own schedule object, on a rank of its own: it raises where the number of rows does not fit."""
    kind = SCHEDULES[name]
    per_rank = kind.stages or 2
    stages = []
    for index in range(per_rank):
        stage = PipelineStage.__new__(PipelineStage)
        stage.__dict__.update(
            stage_index=index * pp, num_stages=pp * per_rank, group_size=pp, group_rank=0, submod=torch.nn.Identity()
        )
        stages.append(stage)
    return kind.schedule(stages[0] if kind.stages == 1 else stages, n_microbatches=rows, loss_fn=max, scale_grads=False)


@pytest.mark.parametrize("name", SCHEDULES)
def test_rows_are_refused_where_torch_would_refuse_them(name):
    for pp, rows in itertools.product((2, 3, 4), range(1, 20)):
        config = Config(layout=Layout(pp=pp, pp_schedule=name), data=Data(batch_packs=2 * rows))
        try:
            build(name, pp, rows)
        except ValueError:
            with pytest.raises(ValueError, match="rows"):
                check_microbatches(config, dp_size=2)
        else:
            check_microbatches(config, dp_size=2)


def test_the_names_are_those_of_the_flag():
    assert tuple(SCHEDULES) == PP_SCHEDULES
    assert tuple(name for name in SCHEDULES if SCHEDULES[name].split) == SPLIT_BACKWARD
