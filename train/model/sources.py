"""Which tensor of the safetensors files holds which parameter, and how it lies there."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from train.model.config import ModelConfig
from train.model.decoder import Decoder
from train.model.families import FAMILIES
from train.model.family import Family

Window = tuple[slice, ...]


@dataclass(frozen=True)
class Source:
    """Where a parameter stands in the files: `rows` rows, every `step`-th from `start` on, of the `total_rows` that the
    tensor `name` has along `dim` (a dim of the parameter); `transposed` tensors have their last two dims swapped.

    With `experts` there is a tensor for each of them, `name.format(expert)`, and the parameter is their stack.
    """

    name: str
    rows: int
    total_rows: int
    start: int = 0
    step: int = 1
    dim: int = 0
    transposed: bool = False
    experts: int = 0

    @property
    def names(self) -> list[str]:
        """The tensors that hold the parameter, or parts of it."""
        return [self.name.format(expert) for expert in range(self.experts)] if self.experts else [self.name]

    def shape(self, parameter: torch.Size) -> list[int]:
        """Shape of a tensor of the files, from the shape of the whole parameter."""
        shape = list(parameter[1:] if self.experts else parameter)
        if not self.experts:
            shape[self.dim] = self.total_rows
        return shape[:-2] + shape[:-3:-1] if self.transposed else shape

    def of(self, tensor: Tensor) -> Tensor:
        """The view of a whole tensor of the files that is the parameter (of one expert, where each has its own)."""
        tensor = tensor.mT if self.transposed else tensor
        if self.experts or self.rows == self.total_rows:
            return tensor
        stop = self.start + (self.rows - 1) * self.step + 1
        return tensor[(slice(None),) * self.dim + (slice(self.start, stop, self.step),)]

    def reads(self, window: Window) -> Iterator[tuple[int | None, str, Window, int]]:
        """What to read for the part `window` of the parameter: (row of the part, or None for all of it; tensor; window
        of the tensor; every how many rows along `dim`)."""
        if self.experts:
            for row, expert in enumerate(range(window[0].start, window[0].stop)):
                yield row, self.name.format(expert), window[1:], 1
            return
        part = list(window)
        first, last = (self.start + self.step * x for x in (window[self.dim].start, window[self.dim].stop - 1))
        part[self.dim] = slice(first, last + 1)
        yield None, self.name, tuple(part[:-2] + part[:-3:-1] if self.transposed else part), self.step


@cache
def weight_sources(config: ModelConfig, *, stacked: bool = False) -> dict[str, Source]:
    """For every parameter of `Decoder(config)`, by its name: where the safetensors files hold it.

    Published files have a tensor for each expert; `stacked` are those that transformers 5 writes on request
    (`save_original_format=False`), whose names are also those of its modules.
    """
    family = FAMILIES[config.family]
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Decoder(config).state_dict().items()}
    blocks: dict[str, dict[str, torch.Size]] = {}
    for name, shape in shapes.items():
        if name.startswith("layers."):
            _, layer, inner = name.split(".", 2)
            blocks.setdefault(layer, {})[inner] = shape
    sources = {}
    for name, shape in shapes.items():
        if name.startswith("layers."):
            _, layer, inner = name.split(".", 2)
            sources[name] = _in_block(family, stacked, f"model.layers.{layer}.", inner, blocks[layer])
        else:
            theirs = name if name.startswith("lm_head.") else f"model.{name}"
            sources[name] = Source(theirs, shape[0], shape[0])
    return sources


def _in_block(family: Family, stacked: bool, prefix: str, ours: str, shapes: dict[str, torch.Size]) -> Source:
    """The source of the parameter `ours` of a block whose parameters have these `shapes`."""
    table = family.block | (family.stacked if stacked else {})
    if ours in table:  # a parameter by its whole name
        theirs, parts = table[ours], family.fused.get(table[ours], (ours,))
        name = prefix + theirs
    else:
        module, kind = ours.rsplit(".", 1)
        theirs = table[module]
        parts = [f"{part}.{kind}" for part in family.fused.get(theirs, (module,))]
        name = f"{prefix}{theirs}.{kind}"
    shape = shapes[ours]
    if "{}" in theirs:
        return Source(name, shape[1], shape[1], experts=shape[0])
    dim = 1 if ours.startswith("mlp.experts.") else 0  # experts lie side by side, their rows are the next dim
    rows = [shapes[part][dim] for part in parts]
    position = parts.index(ours)
    interleaved = theirs in family.interleaved
    return Source(
        name,
        rows[position],
        sum(rows),
        start=position if interleaved else sum(rows[:position]),
        step=len(parts) if interleaved else 1,
        dim=dim,
        transposed=theirs in family.transposed,
    )
