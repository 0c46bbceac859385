"""Pipeline parallelism, the cut: which layers stand in which stage, and which stages a rank holds.

A stage is a `Decoder` that lacks the modules of the others, so parameters keep their names (`layers.7.…`) and files and
checkpoints know nothing of stages. How stages run is told in `train.parallel.pipeline`.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.pipelining.schedules import (
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from formats.order import accumulation
from formats.stages import EMBEDDING_OVER_HEAD, split_by_cost
from train.config import Config
from train.mesh import Mesh
from train.model.config import ModelConfig
from train.model.decoder import Decoder


@dataclass(frozen=True)
class PipelineSchedule:
    """A schedule of `torch.distributed.pipelining`. `stages` are the stages of a rank (0: as many as --pp-split makes,
    else 2); `v_shaped` says that rank r holds stages r and 2·pp − 1 − r instead of r, r + pp, r + 2·pp, …; `split`
    that the backward is run in two parts, gradients of inputs first and those of weights when there is time."""

    schedule: type
    stages: int = 0
    v_shaped: bool = False
    split: bool = False


SCHEDULES = {
    "gpipe": PipelineSchedule(ScheduleGPipe, stages=1),
    "1f1b": PipelineSchedule(Schedule1F1B, stages=1),
    "interleaved": PipelineSchedule(ScheduleInterleaved1F1B),
    "interleaved-zb": PipelineSchedule(ScheduleInterleavedZeroBubble, split=True),
    "zbv": PipelineSchedule(ScheduleZBVZeroBubble, stages=2, v_shaped=True, split=True),
    "dualpipev": PipelineSchedule(ScheduleDualPipeV, stages=2, v_shaped=True, split=True),
}
"""By the names of `--pp-schedule` (`train.config.PP_SCHEDULES`). The first keeps, until the backwards begin, all rows'
activations, and in the last stage the gradient of the head's weight for each of them; others at most as many as there
are stages."""


def cut_stages(model: Decoder, mesh: Mesh, config: Config) -> dict[int, Decoder]:
    """The stages of this rank, by number: decoders that share the modules of `model` and lack those of other stages.

    With tied embeddings the head of the last stage gets a weight of its own, which follows the embedding's
    (`Pipeline`).

    Raises: ValueError when the layers, the packs of a step or `--pp-split` do not fit the schedule.
    """
    layout, size = config.layout, mesh.pp_size
    schedule = SCHEDULES[layout.pp_schedule]
    check_microbatches(config, mesh.dp_size)
    layers = layers_of_stages(model, config)
    last = len(layers) - 1
    mine = [mesh.pp_rank, last - mesh.pp_rank] if schedule.v_shaped else range(mesh.pp_rank, len(layers), size)
    return {number: _stage(model, layers[number], first=number == 0, last=number == last) for number in mine}


def _stage(model: Decoder, layers: range, *, first: bool, last: bool) -> Decoder:
    stage = Decoder.__new__(Decoder)
    nn.Module.__init__(stage)
    stage.config = model.config
    stage.embed_tokens = model.embed_tokens if first else None
    blocks = list(model.layers.children())
    stage.layers = nn.ModuleDict({str(i): blocks[i] for i in layers})
    stage.norm = stage.lm_head = None
    if last:
        stage.norm, stage.lm_head = model.norm, model.lm_head
        if model.lm_head.weight is None:  # tied to the embedding of another stage: a copy, on the same device (meta)
            stage.lm_head.weight = nn.Parameter(torch.empty_like(model.embed_tokens.weight))
    return stage


def check_microbatches(config: Config, dp_size: int) -> None:
    """Raise a ValueError when a step has not the number of rows that the schedule asks for."""
    name, size = config.layout.pp_schedule, config.layout.pp
    rows = accumulation(config.data.batch_packs, config.data.micro_packs, dp_size)
    made = f"--batch-packs {config.data.batch_packs} makes {rows} rows a rank and step"
    way = "change --batch-packs or --micro-packs, or take --pp-schedule gpipe, which has no such condition"
    least = {"1f1b": size, "dualpipev": 2 * size}.get(name, 1)
    if rows < least:
        raise ValueError(f"--pp-schedule {name} over --pp {size} needs at least {least} rows, {made}: {way}")
    if name.startswith("interleaved") and rows > size and rows % (rows // size):
        raise ValueError(
            f"--pp-schedule {name} over --pp {size} needs a multiple of {rows // size} rows here (the rounds of "
            f"{size}), {made}: {way}"
        )


def layers_of_stages(model: Decoder, config: Config) -> list[range]:
    """For each stage the layers in it: `--pp-split`, or as even in cost as whole layers allow.

    Raises: ValueError when `--pp-split` is not a split of these layers into these stages, or layers are too few.
    """
    layout, layers = config.layout, model.config.num_layers
    name, per_rank = layout.pp_schedule, SCHEDULES[layout.pp_schedule].stages
    if layout.pp_split is None:
        stages = layout.pp * (per_rank or 2)
        if stages > layers:
            raise ValueError(
                f"--pp {layout.pp} with --pp-schedule {name} makes {stages} stages, but the model has {layers} layers; "
                f"lower --pp"
                + (" or take --pp-schedule 1f1b, which has one stage a rank" if stages > layout.pp else "")
            )
        head = head_cost(model.config)
        sizes = split_by_cost(layer_costs(model), stages, EMBEDDING_OVER_HEAD * head, head)
    else:
        sizes = read_split(layout.pp_split)
        wanted = f"a multiple of {layout.pp}" if not per_rank else f"{layout.pp * per_rank}"
        if len(sizes) % layout.pp or (per_rank and len(sizes) != layout.pp * per_rank):
            raise ValueError(
                f"--pp-split {layout.pp_split} names {len(sizes)} stages, but --pp {layout.pp} with --pp-schedule "
                f"{name} has {wanted}; name so many"
            )
        if sum(sizes) != layers:
            raise ValueError(
                f"--pp-split {layout.pp_split} adds up to {sum(sizes)} layers, but the model has {layers}; "
                f"name {layers} in all"
            )
    starts = [sum(sizes[:s]) for s in range(len(sizes) + 1)]
    return [range(start, stop) for start, stop in itertools.pairwise(starts)]


def read_split(text: str) -> list[int]:
    """`6,6,5,3` as numbers.

    Raises: ValueError for anything but numbers above 0 with commas between them.
    """
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1:
        raise ValueError(f"--pp-split {text} must be the number of layers of each stage, 1 or more, as in 6,6,5,3")
    return sizes


def layer_costs(model: Decoder) -> list[float]:
    """For each layer what it multiplies per token: the elements of its matrices, of those of experts the share that a
    token visits. Attention between tokens is left out: it depends on the documents, and falls on all layers alike."""
    moe = model.config.moe
    visited = moe.top_k / moe.num_experts if moe else 0.0

    def cost(parameter: nn.Parameter) -> float:
        return parameter.numel() * {2: 1.0, 3: visited}.get(parameter.ndim, 0.0)

    return [sum(map(cost, block.parameters())) for block in model.layers.children()]


def head_cost(config: ModelConfig) -> float:
    """The same of the head, whose chunked loss multiplies as often as a layer does (forward and two gradients)."""
    return float(config.vocab_size * config.hidden_size)
