"""The pack plan: which piece of which document lies in which slot of which pack. Pure; lengths only."""

from dataclasses import dataclass

import numpy as np

from formats.layout import slot_alignment
from formats.order import permutation
from formats.schema import ALIGNMENTS, MAX_CAPACITY
from prep.packing import cut, pack

OVERLONG = ("error", "drop", "truncate", "split")


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
    long = lengths > capacity
    none = np.empty(0, np.int64)
    dropped = truncated = split = none
    doc, start, length = rows, np.zeros(len(rows), np.int64), lengths
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
    sizes = np.diff(offsets)
    sequence = np.argsort(members[offsets[:-1]], kind="stable")
    if options.order == "shuffle":
        sequence = sequence[permutation(len(sequence), options.seed, 0)]
    moved = np.concatenate([[0], np.cumsum(sizes[sequence])])
    slots = members[np.repeat(offsets[:-1][sequence] - moved[:-1], sizes[sequence]) + np.arange(len(members))]
    return Plan(doc[slots], start[slots], length[slots], moved, packing.lower_bound, dropped, truncated, split)
