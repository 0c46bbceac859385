"""The pack plan: which piece of which document lies in which slot of which pack. Pure; lengths only."""

from dataclasses import dataclass

import numpy as np

from formats.layout import slot_alignment
from formats.order import permutation
from formats.schema import ALIGNMENTS, MAX_CAPACITY
from prep.packing import ALGORITHMS, cut, cut_stream, pack

STREAM = "split"
"""The algorithm that is none: all documents in one stream, cut at every capacity (classic pretraining)."""


@dataclass(frozen=True)
class PackOptions:
    """What decides the packs of a given store. `seq_len` is the capacity in tokens."""

    seq_len: int
    algo: str = "bfd"
    cp: int = 1
    format: str = "thd"
    order: str = "shuffle"
    seed: int = 0
    overlong: str = "error"
    max_docs: int | None = None

    @property
    def align(self) -> int:
        return slot_alignment(self.cp)

    def check(self) -> None:
        """Raise a ValueError for what can never work, before any other work is done."""
        if not 1 <= self.seq_len <= MAX_CAPACITY:
            raise ValueError(f"--seq-len {self.seq_len} is not between 1 and {MAX_CAPACITY}")
        if self.algo not in (*ALGORITHMS, STREAM):
            raise ValueError(f"--algo {self.algo} is none of {', '.join((*ALGORITHMS, STREAM))}")
        if self.algo == STREAM and (self.cp > 1 or self.max_docs or self.overlong != "error"):
            raise ValueError(
                f"--algo {STREAM} cuts wherever a pack is full, so it knows no --cp (any --cp can train on such packs "
                "by methods that cut the pack), no --max-docs and no --overlong; leave them out"
            )
        if self.align not in (1, *ALIGNMENTS):
            raise ValueError(f"--cp {self.cp} is none of 1, 2, 4, … {ALIGNMENTS[-1] // 2} (a power of two)")
        if self.seq_len % self.align:
            below = self.seq_len // self.align * self.align
            raise ValueError(
                f"--seq-len {self.seq_len} is not a multiple of 2·cp = {self.align}; "
                f"take {f'{below} or ' if below else ''}{below + self.align}, or another --cp"
            )


@dataclass(frozen=True)
class Plan:
    """Slots in training order. Slot i holds tokens [start, start + length) of document `doc`.

    doc: int64[P], rows of the document store. start: int64[P]. length: int32[P], real tokens.
    offsets: int64[N + 1]; pack n is slots offsets[n] … offsets[n + 1].
    lower_bound: proven, no packing of these pieces has fewer packs.
    dropped, truncated: rows of documents over the capacity that were dropped or cut short, int64.
    split: rows of documents that were cut into several pieces, int64.
    block: packs that a trainer must keep together when it permutes a cost-balanced order; 0 for other orders.
    """

    doc: np.ndarray
    start: np.ndarray
    length: np.ndarray
    offsets: np.ndarray
    lower_bound: int
    dropped: np.ndarray
    truncated: np.ndarray
    split: np.ndarray
    block: int = 0

    @property
    def num_packs(self) -> int:
        return len(self.offsets) - 1


def make_plan(lengths: np.ndarray, rows: np.ndarray, options: PackOptions) -> Plan:
    """Plan the packs of documents of `lengths` (int32[N]) that are rows `rows` (int64[N]) of the store.

    Packs come in the order of their first document (`input`), or permuted by the seed; documents inside a pack are
    in store order. `lengths` over the capacity are a ValueError unless `options.overlong` says what to do with them.
    """
    capacity = options.seq_len
    none = np.empty(0, np.int64)
    if options.algo == STREAM:
        piece_of, start, length = cut_stream(lengths, capacity)
        before = np.cumsum(length, dtype=np.int64) - length
        offsets = np.append(np.flatnonzero(before % capacity == 0), len(length))
        split = rows[np.unique(piece_of[start > 0])]
        slots, offsets = _sequence(np.arange(len(length)), offsets, options)
        bound = len(offsets) - 1  # every pack but one is full
        return Plan(rows[piece_of][slots], start[slots], length[slots], offsets, bound, none, none, split)

    dropped = truncated = split = none
    doc, start, length = rows, np.zeros(len(rows), np.int64), lengths
    long = lengths > capacity
    if long.any():
        if options.overlong == "error":
            raise ValueError(
                f"{long.sum()} of {len(lengths)} documents are longer than --seq-len {capacity} (the longest has "
                f"{lengths.max()} tokens); say what to do with them, --overlong drop|truncate|split, or take a larger "
                "--seq-len"
            )
        if options.overlong == "drop":
            dropped = rows[long]
            doc, start, length = rows[~long], start[~long], lengths[~long]
        elif options.overlong == "truncate":
            truncated = rows[long]
            length = np.minimum(lengths, capacity)
        else:
            split = rows[long]
            piece_of, start, length = cut(lengths, capacity)
            doc = rows[piece_of]
    packing = pack(
        length, capacity, algo=options.algo, align=options.align, max_docs=options.max_docs, seed=options.seed
    )
    offsets, members = packing.members()
    slots, offsets = _sequence(members, offsets, options)
    return Plan(doc[slots], start[slots], length[slots], offsets, packing.lower_bound, dropped, truncated, split)


def _sequence(members: np.ndarray, offsets: np.ndarray, options: PackOptions) -> tuple[np.ndarray, np.ndarray]:
    """Put bins in training order: (members, offsets) as `Packing.members` gives them → the same, reordered."""
    sizes = np.diff(offsets)
    sequence = np.argsort(members[offsets[:-1]], kind="stable")
    if options.order == "shuffle":
        sequence = sequence[permutation(len(sequence), options.seed, 0)]
    moved = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes[sequence])])
    where = np.repeat(offsets[:-1][sequence] - moved[:-1], sizes[sequence]) + np.arange(len(members))
    return members[where], moved
