"""How a row is cut over context-parallel ranks: host arithmetic, one rank's part of one row.

*Contiguous*: rank r holds the r-th of cp equal runs of the row, wherever documents begin and end; any shards can be cut
so. *Zigzag*: every slot is cut into 2·cp chunks and rank r holds chunks r and 2·cp−1−r of each, which gives every rank
the same attention work; it needs slots aligned to 2·cp. *Mixed*: long slots zigzag, the rest of the row contiguous
(`train.pieces`); it needs the same alignment.

Labels and positions are made on the whole row before it is cut, so that a label may stand on another rank than its
token.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from formats.layout import contiguous_slice, cu_seqlens, slot_alignment, zigzag_indices
from formats.manifest import Manifest
from train.pieces import Pieces

PER_TOKEN = ("input_ids", "labels", "position_ids")


@dataclass(frozen=True)
class Cut:
    """Which part of every row is this rank's: part `rank` of `size`. `sequence` tensor ranks take the same part and cut
    it once more inside the model (sequence parallelism)."""

    size: int = 1
    rank: int = 0
    kind: Literal["contiguous", "zigzag", "mixed"] = "contiguous"
    sequence: int = 1

    @property
    def align(self) -> int:
        """What every slot must be a multiple of."""
        return 1 if self.kind == "contiguous" else slot_alignment(self.size)

    @property
    def multiple(self) -> int:
        """What the length of a segment of padding must be a multiple of."""
        return max(self.size, self.align)

    @property
    def row_multiple(self) -> int:
        """What the length of a row must be a multiple of."""
        return math.lcm(self.multiple, self.size * self.sequence)

    def held(self, tokens: int) -> tuple[int, int]:
        """(first, stop) of a row of so many tokens: what must be filled of it for this rank's part."""
        if self.kind != "contiguous":
            return 0, tokens
        held = contiguous_slice(tokens, self.size, self.rank)
        return held.start, held.stop

    def buffers(self, row: dict[str, torch.Tensor], *, pinned: bool) -> dict[str, torch.Tensor]:
        """Tensors for this rank's part of a row that lies in the buffers `row`, to be completed by `fill`.

        A contiguous part is a view of the row, of which no more is read and filled (`held`). Chunks are taken from a
        row that each rank fills whole, at the speed of memory.
        """

        def empty(length: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.empty(length, dtype=dtype, pin_memory=pinned)

        tokens, ends = len(row["input_ids"]), len(row["cu_seqlens"])
        if self.kind == "contiguous":
            held = contiguous_slice(tokens, self.size, self.rank)
            part = {name: row[name][held] for name in PER_TOKEN}
            return part | {"cu_seqlens": empty(ends), "row_cu_seqlens": row["cu_seqlens"]}
        part = {name: empty(tokens // self.size, row[name].dtype) for name in PER_TOKEN}
        if self.kind == "mixed":
            return part | {"cu_seqlens": empty(ends), "row_cu_seqlens": row["cu_seqlens"]}
        part |= {"cu_seqlens": empty(2 * ends - 1), "row_cu_seqlens": row["cu_seqlens"]}
        keys = tokens // (2 * self.size) * (2 * self.size + 1)
        return part | {"cu_seqlens_k": empty(2 * ends - 1), "key_rows": empty(keys)}

    def fill(self, row: dict[str, np.ndarray], part: dict[str, np.ndarray]) -> dict[str, Any]:
        """Complete this rank's `part` of a filled `row` (arrays over the same buffers); returns the fields of
        `train.attention.interface.Part` that the host keeps."""
        if self.kind == "zigzag":
            _fill_zigzag(row, part, self.size, self.rank)
            return {}
        if self.kind == "mixed":
            pieces = Pieces.of(row["cu_seqlens"], self.size)
            positions = pieces.positions(self.rank)
            for name in PER_TOKEN:
                np.take(row[name], positions, out=part[name], mode="clip")
            part["cu_seqlens"][:] = cu_seqlens(pieces.held[self.rank])
            return {"pieces": pieces}
        ends, tokens = row["cu_seqlens"], len(row["input_ids"])
        held = contiguous_slice(tokens, self.size, self.rank)
        np.clip(ends, held.start, held.stop, out=part["cu_seqlens"])
        part["cu_seqlens"] -= held.start
        begins = np.arange(self.size) * (tokens // self.size)
        return {"first_keys": tuple(ends[np.searchsorted(ends, begins, side="right") - 1].tolist())}


WHOLE = Cut()


def choose_cut(method: str, size: int, rank: int, manifest: Manifest, sequence: int = 1, attention: str = "cpu") -> Cut:
    """The cut for the context-parallel `method` over shards of this manifest: mixed for a ring, zigzag for that of
    Transformer Engine (the slots of both are re-laid where they are not aligned), zigzag where all keys are gathered
    and every slot is aligned to it, else contiguous."""
    if size == 1:
        return Cut(sequence=sequence)
    zigzag = Cut(size, rank, "zigzag", sequence)
    if method == "ring":
        return zigzag if attention == "te" else Cut(size, rank, "mixed", sequence)
    aligned = manifest.align % zigzag.align == 0 and manifest.capacity % zigzag.align == 0
    return zigzag if method == "gather" and aligned else Cut(size, rank, sequence=sequence)


def _fill_zigzag(row: dict[str, np.ndarray], part: dict[str, np.ndarray], size: int, rank: int) -> None:
    """Take the rank's two chunks of every slot; segment 2s and 2s+1 of the part are those of slot s.

    Both attend to their document from its start, so their keys overlap. One varlen call wants the keys of each segment
    in a run of its own: `key_rows` says for each of these keys where it stands among the tokens of all ranks, one rank
    after the other. The row grows by 1/(2·cp) through it, and the order of the ranks is undone in the same copy.
    """
    slots = np.diff(row["cu_seqlens"]).astype(np.int64)
    starts, chunks = row["cu_seqlens"][:-1], slots // (2 * size)
    held = [zigzag_indices(slots, size, r) for r in range(size)]
    for name in PER_TOKEN:
        np.take(row[name], held[rank], out=part[name], mode="clip")
    part["cu_seqlens"][:] = cu_seqlens(np.repeat(chunks, 2))
    lengths = np.stack([(rank + 1) * chunks, (2 * size - rank) * chunks], axis=1).ravel()
    part["cu_seqlens_k"][:] = cu_seqlens(lengths)
    gathered = np.empty(len(row["input_ids"]), np.int32)
    gathered[np.concatenate(held)] = np.arange(len(gathered), dtype=np.int32)
    first = np.repeat(np.repeat(starts, 2) - part["cu_seqlens_k"][:-1], lengths)
    np.take(gathered, first + np.arange(len(first)), out=part["key_rows"], mode="clip")
