"""The pack plan: which piece of which document lies in which slot of which pack. Pure; lengths only."""

from dataclasses import dataclass

import numpy as np

from formats.layout import align_up, slot_alignment
from formats.order import permutation
from formats.schema import ALIGNMENTS, MAX_CAPACITY, ORDERS
from prep.packing import ALGORITHMS, cut, cut_stream, pack
from prep.packing.balance import cost_order
from prep.packing.rounding import Certificate

STREAM = "split"
"""The algorithm that is none: all documents in one stream, cut at every capacity (classic pretraining)."""


@dataclass(frozen=True)
class PackOptions:
    """What decides the packs of a given store. `seq_len` is the capacity in tokens.

    drop_last: leave out the remainder that every packing ends with: the one pack with the fewest tokens, unless it is
    full or the only one.
    """

    seq_len: int
    algo: str = "bfd"
    cp: int = 1
    format: str = "thd"
    order: str = "cost"
    seed: int = 0
    overlong: str = "error"
    max_docs: int | None = None
    drop_last: bool = False

    @property
    def align(self) -> int:
        return slot_alignment(self.cp)

    def check(self) -> None:
        """Raise a ValueError for what can never work, before any other work is done."""
        if not 1 <= self.seq_len <= MAX_CAPACITY:
            raise ValueError(f"--seq-len {self.seq_len} is not between 1 and {MAX_CAPACITY}")
        if self.algo not in (*ALGORITHMS, STREAM):
            raise ValueError(f"--algo {self.algo} is none of {', '.join((*ALGORITHMS, STREAM))}")
        if self.algo == STREAM and (self.max_docs or self.overlong != "error"):
            raise ValueError(f"--algo {STREAM} cuts wherever a pack is full: leave out --max-docs and --overlong")
        if self.order not in ORDERS:
            raise ValueError(f"--order {self.order} is none of {', '.join(ORDERS)}")
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
    last_pack: rows of documents with a piece in the pack that `drop_last` left out, int64.
    block: packs that a trainer must keep together when it permutes a cost-balanced order; 0 for other orders.
    certificate: what `optimal` found and proved, to be printed; None for the other algorithms.
    """

    doc: np.ndarray
    start: np.ndarray
    length: np.ndarray
    offsets: np.ndarray
    lower_bound: int
    dropped: np.ndarray
    truncated: np.ndarray
    split: np.ndarray
    last_pack: np.ndarray
    block: int = 0
    certificate: Certificate | None = None

    @property
    def num_packs(self) -> int:
        return len(self.offsets) - 1


def make_plan(lengths: np.ndarray, rows: np.ndarray, options: PackOptions) -> Plan:
    """Plan the packs of documents of `lengths` (int32[N]) that are rows `rows` (int64[N]) of the store.

    Packs come in the order of their first document (`input`), permuted by the seed (`shuffle`), or in blocks of like
    attention cost (`cost`, see `prep.packing.balance`); documents inside a pack are in store order. `lengths` over the
    capacity are a ValueError unless `options.overlong` says what to do with them.
    """
    none = np.empty(0, np.int64)
    dropped = truncated = split = none
    certificate = None
    if options.algo == STREAM:
        piece_of, start, length = cut_stream(lengths, options.seq_len, align=options.align)
        doc, split = rows[piece_of], rows[np.unique(piece_of[start > 0])]
        aligned = align_up(length, options.align)
        before = np.cumsum(aligned, dtype=np.int64) - aligned
        offsets = np.append(np.flatnonzero(before % options.seq_len == 0), len(length))
        members, bound = np.arange(len(length)), len(offsets) - 1  # every pack but one is full
    else:
        doc, start, length = rows, np.zeros(len(rows), np.int64), lengths
        long = lengths > options.seq_len
        if long.any():
            if options.overlong == "error":
                raise ValueError(
                    f"{long.sum()} of {len(lengths)} documents are longer than --seq-len {options.seq_len} (the longest"
                    f" has {lengths.max()} tokens); say what to do with them, --overlong drop|truncate|split, or "
                    "take a larger --seq-len"
                )
            if options.overlong == "drop":
                dropped = rows[long]
                doc, start, length = rows[~long], start[~long], lengths[~long]
            elif options.overlong == "truncate":
                truncated = rows[long]
                length = np.minimum(lengths, options.seq_len)
            else:
                split = rows[long]
                piece_of, start, length = cut(lengths, options.seq_len)
                doc = rows[piece_of]
        limits = {"align": options.align, "max_docs": options.max_docs, "seed": options.seed}
        packing = pack(length, options.seq_len, algo=options.algo, **limits)
        (offsets, members), bound, certificate = packing.members(), packing.lower_bound, packing.certificate
    last_pack = none
    if options.drop_last and len(offsets) > 2:
        members, offsets, left_out = _drop_last(members, offsets, length, options)
        last_pack = np.unique(doc[left_out])
        # Were the rest packable in fewer than bound − 1 packs, everything would be in fewer than bound.
        bound -= len(left_out) > 0
    slots, offsets, block = _sequence(members, offsets, length, options)
    cuts = (dropped, truncated, split, last_pack)
    return Plan(doc[slots], start[slots], length[slots], offsets, bound, *cuts, block, certificate)


def _drop_last(members, offsets, length, options: PackOptions):
    """(members, offsets) without the pack that holds the fewest tokens (the last of equals), unless it is full; and the
    members that it held."""
    room = np.add.reduceat(align_up(length[members], options.align), offsets[:-1], dtype=np.int64)
    least = len(room) - 1 - int(np.argmin(room[::-1]))
    if room[least] == options.seq_len:
        return members, offsets, members[:0]
    low, high = offsets[least], offsets[least + 1]
    rest = np.concatenate([members[:low], members[high:]])
    return rest, np.concatenate([offsets[:least], offsets[least + 1 :] - (high - low)]), members[low:high]


def _sequence(
    members: np.ndarray, offsets: np.ndarray, length: np.ndarray, options: PackOptions
) -> tuple[np.ndarray, np.ndarray, int]:
    """Put bins in training order: (members, offsets) as `Packing.members` gives them → the same, reordered, and the
    block that a cost-balanced order keeps together (0 for others)."""
    sizes, block = np.diff(offsets), 0
    sequence = np.argsort(members[offsets[:-1]], kind="stable")
    if options.order == "shuffle":
        sequence = sequence[permutation(len(sequence), options.seed, 0)]
    elif options.order == "cost" and len(sequence):
        sum_sq = np.add.reduceat(length[members].astype(np.int64) ** 2, offsets[:-1])[sequence]
        order, block = cost_order(sum_sq, options.seed)
        sequence = sequence[order]
    moved = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes[sequence])])
    where = np.repeat(offsets[:-1][sequence] - moved[:-1], sizes[sequence]) + np.arange(len(members))
    return members[where], moved, block
