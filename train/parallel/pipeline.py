"""Pipeline parallelism, the run: what a rank holds of a model that is cut into stages, and how rows pass through it.

Only hidden states travel (and their gradients): every rank of the pipeline reads the same packs with its own loader and
makes ids, positions, segments and labels itself, so no mask is ever sent, and a row's segments may be anything, host
numbers included. A row costs a rank 17 bytes a token of host memory for that.

A step's rows are its microbatches. `torch.distributed.pipelining` orders them; it is told nothing but a row's number.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage
from torch.distributed.tensor import DTensor

from train.config import Config
from train.mesh import Mesh
from train.model.decoder import Decoder
from train.parallel.pp import SCHEDULES
from train.precision import cast_dtypes
from train.row import MicroBatch


class Pipeline(nn.Module):
    """The stages of one rank as one module: its parameters and their names are those of the whole model that stand on
    this rank, each once.

    Tied embeddings: the first stage has the tensor. The head of the last one works on a copy that is no parameter of
    this module, neither trained nor saved: it is filled before the rows of a step and its gradient is added to the
    embedding's after them, both over the pipeline's ranks, shard by shard. So the norm of the gradients counts it once.
    """

    def __init__(self, stages: dict[int, Decoder], mesh: Mesh, config: Config):
        super().__init__()
        self._schedule_kind = SCHEDULES[config.layout.pp_schedule]
        self._stages = stages  # a dict: torch does not see modules in it, they are registered below
        self._count = mesh.pp_size * len(stages)
        self._group, self._size, self._rank = mesh.root.get_group("pp"), mesh.pp_size, mesh.pp_rank
        self._device = torch.device(mesh.root.device_type)
        self._stream_ranks = mesh.tp_size if config.layout.sp else 1  # among which a row's tokens are shared out
        self._name = config.layout.pp_schedule
        self._param_dtype, self._reduce_dtype = cast_dtypes(config.model, mesh.root.device_type)
        self.config = next(iter(stages.values())).config
        self.embed_tokens = self._first.embed_tokens if self._first else None
        self.layers = nn.ModuleDict({name: b for stage in stages.values() for name, b in stage.layers.items()})
        self.norm = self._last.norm if self._last else None
        self.lm_head = self._last.lm_head if self._last and not self.config.tied_embeddings else None

        self._check_tied_copy()

        self._rows: list[MicroBatch] = []
        self._target_tokens = 1
        self._schedule: Any = None
        for stage in stages.values():
            # Before FSDP's own hook, which would move the row's number to the GPU.
            stage.register_forward_pre_hook(self._give_row, with_kwargs=True, prepend=True)

    @property
    def _first(self) -> Decoder | None:
        return self._stages.get(0)

    @property
    def _last(self) -> Decoder | None:
        return self._stages.get(self._count - 1)

    def summary(self) -> str:
        """What to know of it at the start of a run; collective over the ranks of the pipeline."""
        weights, gradients = kept_bytes(self, self._param_dtype, self._reduce_dtype)
        facts = {number: len(stage.layers) for number, stage in self._stages.items()}, weights + gradients
        of_ranks: list[Any] = [None] * self._size
        dist.all_gather_object(of_ranks, facts, group=self._group)
        layers = dict(sorted(item for stages, _ in of_ranks for item in stages.items()))
        kept = max(kept for _, kept in of_ranks) / 2**30
        return (
            f"pipeline {self._name}: stages of {', '.join(map(str, layers.values()))} layers; a rank keeps its weights "
            f"and their gradients whole until all rows of a step are through, at most {kept:.2f} GiB besides its shards"
        )

    def _give_row(self, stage: nn.Module, hidden: tuple[Tensor, ...], named: dict[str, Tensor]) -> tuple[tuple, dict]:
        """Turn a stage's call (hidden states, row=number) into the decoder's."""
        row = self._rows[int(named["row"])]
        first = hidden[0] if hidden else row.input_ids
        return (first, row.position_ids, row.segments, row.labels), {}

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        """What torch does to all tensors of a module (`to_empty`, `to`) reaches them through the stages: FSDP's part of
        a stage must see it, and so must the copy of a tied embedding."""
        for stage in self._stages.values():
            stage._apply(fn, recurse)
        return self

    def accumulate_gradients(self, rows: Iterable[MicroBatch], target_tokens: int) -> Tensor:
        """Forward and backward over the rows of a step, gradients summed over them and reduced once; returns the
        loss over `target_tokens` on the ranks of the last stage, 0 on others: float64 scalar."""
        self._take_rows(rows)
        self._target_tokens = max(1, target_tokens)
        if self._schedule is None:
            self._schedule = self._build_schedule()
        self._fill_tied_copy()
        numbers, losses = torch.arange(len(self._rows)), []
        self._schedule.step(row=numbers, target=numbers, losses=losses, return_outputs=False)
        self._add_tied_gradient()
        self._rows = []
        if self._last is None:
            return torch.zeros((), dtype=torch.float64, device=self._device)
        return torch.stack(losses).double().sum()

    def _take_rows(self, rows: Iterable[MicroBatch]) -> None:
        # The loader's buffers are filled again while the first rows still wait for their backward.
        self._rows = [row.clone() for row in rows]

    def _build_schedule(self) -> Any:
        """The schedule for rows like those of this step: their number and length never change in a run."""
        # Shapes are told, or torch would run the first row through all stages to find out, with all side effects.
        hidden = self._empty_hidden("meta").requires_grad_()
        wide = torch.promote_types(hidden.dtype, torch.float32)
        loss = torch.empty((), dtype=wide, device="meta", requires_grad=True)
        stages = [
            PipelineStage(
                stage,
                number,
                self._count,
                self._device,
                input_args=() if stage is self._first else (hidden,),
                output_args=(loss,) if stage is self._last else (hidden,),
                group=self._group,
            )
            for number, stage in self._stages.items()
        ]
        options = {"n_microbatches": len(self._rows), "loss_fn": self._mean_loss, "scale_grads": False}
        single = self._schedule_kind.stages == 1
        return self._schedule_kind.schedule(stages[0] if single else stages, **options)

    def _empty_hidden(self, device: torch.device | str) -> Tensor:
        """What travels between two stages for a row: the tokens of this rank's stream."""
        tokens = len(self._rows[0].position_ids) // self._stream_ranks
        dtype = self._param_dtype or next(self.parameters()).dtype
        return torch.empty(tokens, self.config.hidden_size, dtype=dtype, device=device)

    def _mean_loss(self, loss: Tensor, number: Tensor) -> Tensor:
        return loss / self._target_tokens

    @torch.no_grad()
    def evaluate(self, rows: Iterable[MicroBatch]) -> Tensor:
        """The summed loss of `rows` on the ranks of the last stage, 0 on others: float64 scalar.

        All rows pass a stage before the rank's next stage begins. A rank that sends and receives over the same pair of
        ranks sends after it has received all, so that neither waits for the other.
        """
        self._take_rows(rows)
        self._fill_tied_copy()
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        local: list[Tensor] = []  # outputs of a stage whose next one is on this rank
        sends = []
        for number, stage in self._stages.items():
            outputs = []
            before, after = self._rank_of(number - 1), self._rank_of(number + 1)
            for i in range(len(self._rows)):
                hidden = ()
                if stage is not self._first:
                    hidden = (local.pop(0) if before == self._rank else self._receive(before),)
                out = stage(*hidden, row=i)
                if stage is self._last:
                    total += out
                elif after == self._rank:
                    local.append(out)
                else:
                    outputs.append(out)
                    if before != after:
                        sends.append(dist.isend(out, group=self._group, group_dst=after))
            if before == after:
                sends += [dist.isend(out, group=self._group, group_dst=after) for out in outputs]
        for send in sends:
            send.wait()
        for stage in self._stages.values():
            for module in stage.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
        self._rows = []
        return total

    def _receive(self, source: int) -> Tensor:
        hidden = self._empty_hidden(self._device)
        dist.recv(hidden, group=self._group, group_src=source)
        return hidden

    def _rank_of(self, number: int) -> int | None:
        """Which rank of the pipeline holds stage `number`; None for no stage."""
        if not 0 <= number < self._count:
            return None
        if self._schedule_kind.v_shaped:
            return min(number, self._count - 1 - number)
        return number % self._size

    def _check_tied_copy(self) -> None:
        if not self.config.tied_embeddings:
            return
        mine = [_local(self._first.embed_tokens.weight).shape] if self._first else []
        mine += [_local(self._last.lm_head.weight).shape] if self._last else []
        of_ranks: list[Any] = [None] * self._size
        dist.all_gather_object(of_ranks, mine, group=self._group)
        if len({shape for shapes in of_ranks for shape in shapes}) > 1:
            raise ValueError(
                "the embedding is tied to the head, which another pipeline stage has: --tp-plan must give embed_tokens "
                "and lm_head the same style"
            )

    @torch.no_grad()
    def _fill_tied_copy(self) -> None:
        if self.config.tied_embeddings:
            weight = _local(self._first.embed_tokens.weight) if self._first else None
            self._pass_on(weight, 0, _local(self._last.lm_head.weight) if self._last else None, self._count - 1)

    @torch.no_grad()
    def _add_tied_gradient(self) -> None:
        if not self.config.tied_embeddings:
            return
        copied = total = received = None
        if self._last:
            copied, self._last.lm_head.weight.grad = _local(self._last.lm_head.weight.grad), None
        if self._first:
            total = _local(self._first.embed_tokens.weight.grad)
            received = torch.empty_like(total)
        self._pass_on(copied, self._count - 1, received, 0)
        if self._first:
            total += received

    def _pass_on(self, value: Tensor | None, source: int, into: Tensor | None, target: int) -> None:
        """Copy `value`, which the rank of stage `source` has, to `into` on the rank of stage `target`."""
        if value is not None and into is not None:
            into.copy_(value)
        elif value is not None and value.numel():
            dist.send(value.contiguous(), group=self._group, group_dst=self._rank_of(target))
        elif into is not None and into.numel():
            dist.recv(into, group=self._group, group_src=self._rank_of(source))


def kept_bytes(model: nn.Module, param_dtype: torch.dtype | None, reduce_dtype: torch.dtype | None) -> tuple[int, int]:
    """Bytes of the weights and of the gradients of this rank before FSDP cuts them; 0 where it cuts nothing. The types
    are those of mixed precision, None for that of the parameters."""
    weights = gradients = 0
    for parameter in model.parameters():
        if isinstance(parameter, DTensor):
            mesh, numel = parameter.device_mesh, parameter.numel()
            for axis, placement in zip(mesh.mesh_dim_names, parameter.placements, strict=True):
                if axis in ("tp", "ep") and placement.is_shard():
                    numel //= mesh[axis].size()
            weights += numel * (param_dtype or parameter.dtype).itemsize
            gradients += numel * (reduce_dtype or parameter.dtype).itemsize
    return weights, gradients


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
