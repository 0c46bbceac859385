"""Rows of packs in one pass of compiled code: every token read once and written with its label and position.

The maps are read where they lie: the kernel gets addresses (`Shard.place`), so a run of rows costs one call and no
Python object a pack. A token is 5 bytes read and 12 written, and the pass runs at the speed of memory. numpy needs nine
passes for the same (labels through a mask, positions through repeat and subtract) and is six times slower. The
interpreter is free for the thread that trains meanwhile.
"""

from typing import NamedTuple

import numba
import numpy as np
from numba.core import cgutils
from numba.extending import intrinsic

from formats.schema import IGNORE_INDEX, THD_SCHEMA

_IDS, _MASK, _LENS, _SLOTS = (
    THD_SCHEMA.get_field_index(name) for name in ("input_ids", "loss_mask", "seq_lens", "seq_lens_padded")
)

BLOCK = 1024
"""Tokens whose ids are copied before their labels are made from the same cache lines."""


@intrinsic
def _pointer(typing, address):
    """An integer address as what `numba.carray` takes."""

    def code(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return numba.types.voidptr(numba.types.int64), code


class RowPlan(NamedTuple):
    """How rows are laid out. Each pack takes `capacity` tokens; its slots are multiples of `align`, into which they are
    moved where `relaid`. Only tokens `first` to `stop` of each row are wanted (all where slots are re-laid). Padding
    has the id `pad_id`, in segments of at most `longest_tail`. No row's longest segment counts as shorter than
    `shortest_max`. Ids must be below `vocabulary`."""

    capacity: int
    align: int
    relaid: bool
    first: int
    stop: int
    longest_tail: int
    pad_id: int
    shortest_max: int
    vocabulary: int


@numba.njit(nogil=True, cache=True)
def fill_rows(places, plan, ids, labels, positions, cu_seqlens, seq_lens, max_seqlens):
    """Fill the first R rows of the buffers with K packs each.

    Args:
        places: int64[R, K, 2], `PackedDataset.place` of every pack; (0, 0) for none.
        plan: a `RowPlan`.
        ids, labels, positions: int32[≥ R, T], filled. Where the packs end short of T, nothing is written.
        cu_seqlens: int32[≥ R, S + 1], filled, T repeated at the end.
        seq_lens: int32[≥ R, S], filled: real tokens of each segment, 0 in padding.
        max_seqlens: int64[≥ R], filled: the longest segment of each row rounded up to a power of two, at most T.

    Returns: the first pack (of R · K) that is none, before which all rows are filled; -1 when all are packs.
    """
    tokens, packs = ids.shape[1], places.shape[1]
    for r in range(len(places)):
        cu_seqlens[r, 0] = 0
        segments, longest = 0, plan.shortest_max
        for k in range(packs):
            first = k * plan.capacity
            row = slice(first, first + plan.capacity)
            begin, stop = max(0, plan.first - first), min(plan.capacity, plan.stop - first)
            to = (ids[r, row], labels[r, row], positions[r, row], cu_seqlens[r], seq_lens[r])
            used = 0
            if places[r, k, 0] != 0:
                pack = _columns(places[r, k, 0], places[r, k, 1])
                documents = len(pack[3])
                used = _used(pack, plan)
                if used < 0 or segments + documents - (used - plan.capacity) // plan.longest_tail > seq_lens.shape[1]:
                    return r * packs + k
                if plan.relaid:
                    highest = _fill_relaid(pack, plan, first, to, segments)
                else:
                    highest = _fill_as_it_lies(pack, first, begin, stop, to, segments)
                if highest >= plan.vocabulary:
                    return r * packs + k
                segments += documents
                longest = max(longest, pack[2].max())
            segments = _fill_tail(used, first, begin, stop, plan, to, segments)
        cu_seqlens[r, segments + 1 :] = tokens
        seq_lens[r, segments:] = 0
        power = 1
        while power < -(-longest // plan.align) * plan.align:
            power *= 2
        max_seqlens[r] = min(tokens, power)
    return -1


@numba.njit(nogil=True, cache=True)
def _columns(place, row):
    """(input_ids, loss_mask, seq_lens, seq_lens_padded) of a row of a record batch; empty where an offset is not in
    the values."""
    table = numba.carray(_pointer(place), (6, 3), np.int64)
    ids = _bounds(table[_IDS], row)
    mask = _bounds(table[_MASK], row)
    lens = _bounds(table[_LENS], row)
    slots = _bounds(table[_SLOTS], row)
    return (
        numba.carray(_pointer(table[_IDS, 0] + 4 * ids[0]), ids[1], np.int32),
        numba.carray(_pointer(table[_MASK, 0] + mask[0]), mask[1], np.uint8),
        numba.carray(_pointer(table[_LENS, 0] + 4 * lens[0]), lens[1], np.int32),
        numba.carray(_pointer(table[_SLOTS, 0] + 4 * slots[0]), slots[1], np.int32),
    )


@numba.njit(nogil=True, cache=True)
def _bounds(column, row):
    """(first value, number of values) of a row."""
    offsets = numba.carray(_pointer(column[2]), row + 2, np.int32)
    first, stop = np.int64(offsets[row]), np.int64(offsets[row + 1])
    if 0 <= first <= stop <= column[1]:
        return first, stop - first
    return np.int64(0), np.int64(0)


@numba.njit(nogil=True, cache=True)
def _used(pack, plan):
    """Tokens that a pack takes of a row; -1 when lengths and slots do not make the pack, or do not fit."""
    ids, mask, lens, slots = pack
    if len(mask) != len(ids) or len(lens) != len(slots) or len(slots) == 0:
        return -1
    lies, used = 0, 0
    for length, slot in zip(lens, slots):  # noqa: B905 (numba knows no strict)
        if not 0 < length <= slot:
            return -1
        lies += slot
        used += (length + plan.align - 1) // plan.align * plan.align if plan.relaid else slot
    return used if lies == len(ids) and used <= plan.capacity else -1


@numba.njit(nogil=True, cache=True)
def _fill_as_it_lies(pack, first, begin, stop, to, segments):
    """Write tokens `begin` to `stop` of one pack, and the ends of all its slots, `first` tokens into the row; returns
    the highest of these ids (as uint32, so that a negative one is none of any vocabulary).

    The formulas are those of `formats.layout` (shift_labels, position_ids), fused. A label looks one token ahead and
    may do so across slots: the first token of a document is never a target.
    """
    ids, mask, lens, slots = pack
    row_ids, row_labels, row_positions, cu_seqlens, seq_lens = to
    stop = min(stop, len(ids))
    last = min(stop, len(ids) - 1)  # of the labels that look ahead
    highest = np.uint32(0)
    for block in range(begin, last, BLOCK):
        # Slices taken first: their indices cannot be negative, which lets the loop become vector instructions.
        here, ahead = slice(block, min(block + BLOCK, last)), slice(block + 1, min(block + BLOCK, last) + 1)
        from_ids, next_ids, next_mask, to_ids, to_labels = (
            ids[here],
            ids[ahead],
            mask[ahead],
            row_ids[here],
            row_labels[here],
        )
        for t in range(len(from_ids)):
            to_ids[t] = from_ids[t]
            to_labels[t] = next_ids[t] if next_mask[t] else IGNORE_INDEX
            highest = max(highest, np.uint32(from_ids[t]))
    if begin <= last < stop:
        row_ids[last] = ids[last]
        row_labels[last] = IGNORE_INDEX
        highest = max(highest, np.uint32(ids[last]))
    start = 0
    for s in range(len(slots)):
        _count(row_positions, start, slots[s], begin, stop)
        start += slots[s]
        seq_lens[segments + s] = lens[s]
        cu_seqlens[segments + s + 1] = first + start
    return highest


@numba.njit(nogil=True, cache=True)
def _count(row_positions, start, length, begin, stop):
    """Number the tokens of a segment at `start`, those between `begin` and `stop` of the pack."""
    skipped = min(max(begin - start, 0), length)
    to_positions = row_positions[start + skipped : start + min(max(stop - start, 0), length)]
    for t in range(len(to_positions)):
        to_positions[t] = skipped + t


@numba.njit(nogil=True, cache=True)
def _fill_relaid(pack, plan, first, to, segments):
    """`_fill_as_it_lies`, with every document moved from its slot into one of a multiple of the plan's alignment."""
    align = plan.align
    ids, mask, lens, slots = pack
    row_ids, row_labels, row_positions, cu_seqlens, seq_lens = to
    source = start = 0
    highest = np.uint32(0)
    for s in range(len(slots)):
        length = lens[s]
        room = (length + align - 1) // align * align
        row_ids[start : start + length] = ids[source : source + length]
        row_ids[start + length : start + room] = plan.pad_id
        to_labels, next_ids = row_labels[start : start + room], ids[source + 1 : source + length]
        next_mask = mask[source + 1 : source + length]
        for t in range(length - 1):
            to_labels[t] = next_ids[t] if next_mask[t] else IGNORE_INDEX
        to_labels[length - 1 :] = IGNORE_INDEX
        for t in range(source, source + length):
            highest = max(highest, np.uint32(ids[t]))
        _count(row_positions, start, room, 0, len(row_ids))
        source += slots[s]
        start += room
        seq_lens[segments + s] = length
        cu_seqlens[segments + s + 1] = first + start
    return highest


@numba.njit(nogil=True, cache=True)
def _fill_tail(start, first, begin, stop, plan, to, segments):
    """The padding from `start` of a pack on, in segments of its own; returns the row's number of segments."""
    row_ids, row_labels, row_positions, cu_seqlens, seq_lens = to
    capacity = len(row_ids)
    row_ids[max(start, begin) : max(stop, 0)] = plan.pad_id
    row_labels[max(start, begin) : max(stop, 0)] = IGNORE_INDEX
    while start < capacity:
        tail = min(plan.longest_tail, capacity - start)
        _count(row_positions, start, tail, begin, stop)
        start += tail
        seq_lens[segments] = 0
        segments += 1
        cu_seqlens[segments] = first + start
    return segments
