"""Best-fit decreasing on the length histogram.

The rule is the textbook's: documents by decreasing length, each into the fullest bin that still has room. On a
histogram the bins are *groups* of consecutive identical bins, kept in one list per amount of room, and a size is
placed a group at a time: the fullest group with room takes as many documents per bin as fit (after its first document
a bin is the fullest one with room itself, so it would receive the next one too). The histogram view is that of Krell
et al., "Efficient sequence packing without cross-contamination" (arXiv 2107.02027), whose SPFHP keeps lists of bins.

The work depends on the distinct lengths, not on the number of documents: 0.2 ms for the 2,048 lengths of a chat set.
"""

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from prep.packing.lengths import Histogram
from prep.packing.placing import Plan

# Lists are kept for up to this many amounts of room; beyond it a list covers a power of two of them and is searched.
MOST_LEVELS = 1 << 20
START, BINS, ROOM, DOCS, NEXT = range(5)
NONE_OPEN = np.empty(0, np.int32)


def bfd(h: Histogram, max_docs: int, room: np.ndarray = NONE_OPEN, held: np.ndarray = NONE_OPEN) -> Plan:
    """The plan of best-fit decreasing; `max_docs`: most documents in a bin.

    room, held: int32[B], what bins 0 … B − 1 that are already open have left and how many documents they hold.
    """
    shift = max(0, h.capacity.bit_length() - MOST_LEVELS.bit_length() + 1)
    levels = (h.capacity >> shift) + 1
    distinct = h.sizes.size
    groups = np.empty((4 * distinct + 2 + room.size, 5), np.int32)
    head = np.empty(levels, np.int32)
    placements = 4 * distinct + 64
    while True:
        # Bit l of `occupied`: level l has a group. Bit w of `summary`: word w of `occupied` is not 0.
        occupied, summary = np.zeros((levels >> 6) + 1, np.uint64), np.zeros((levels >> 12) + 1, np.uint64)
        ptr, (start, bins, per_bin) = np.empty(distinct + 1, np.int64), np.empty((3, placements), np.int32)
        _open(room, held, max_docs, shift, groups, head, occupied, summary)
        used, num_bins = _best_fit(
            h.sizes, h.counts, h.capacity, max_docs, shift, room.size, groups, head, occupied, summary,
            ptr, start, bins, per_bin,
        )  # fmt: skip
        if used >= 0:
            return Plan(ptr, start[:used], bins[:used], per_bin[:used], num_bins)
        placements *= 4


@njit(cache=True, nogil=True)
def _best_fit(
    sizes, counts, capacity, max_docs, shift, num_bins, groups, head, occupied, summary, ptr, start, bins, per_bin
):
    """Returns (placements used, bins), or (−1, −1) when the placement arrays are too small.

    One function on purpose: numba counts a reference for every array that is handed on, which tripled the time.
    """
    num_groups, used = num_bins, 0
    smallest = sizes[sizes.size - 1] if sizes.size else 0
    for i in range(sizes.size):
        size, left = sizes[i], counts[i]
        ptr[i] = used
        while left > 0:
            if used == start.size:
                return -1, -1
            # The first level ≥ the size that has a group, or −1.
            level = size >> shift
            word = level >> 6
            bits = occupied[word] >> np.uint64(level & 63)
            if bits:
                level += _trailing_zeros(bits)
            else:
                word += 1
                upper = word >> 6
                if upper < summary.size:
                    bits = (summary[upper] >> np.uint64(word & 63)) << np.uint64(word & 63)
                while bits == 0 and upper + 1 < summary.size:
                    upper += 1
                    bits = summary[upper]
                level = -1
                if bits:
                    word = (upper << 6) + _trailing_zeros(bits)
                    level = (word << 6) + _trailing_zeros(occupied[word])
            group, before = np.int64(-1), np.int64(-1)
            if level >= 0:
                group = np.int64(head[level])
                if shift:
                    level, group, before = _fullest_of_levels(head, occupied, groups, shift, level, size)
            if group < 0:
                # Nothing open has room: a new group of as many full bins as this size can fill, or one bin.
                per = min(capacity // size, max_docs)
                full = left // per
                if full == 0:
                    per, full = left, np.int64(1)
                group = num_groups
                num_groups += 1
                groups[group, START] = num_bins
                groups[group, BINS] = full
                groups[group, ROOM] = capacity
                groups[group, DOCS] = 0
                num_bins += full
            else:
                # One document per bin is by far the commonest case and needs no division.
                per, full = np.int64(1), min(np.int64(groups[group, BINS]), left)
                if groups[group, ROOM] >= 2 * size:
                    per = min(groups[group, ROOM] // size, max_docs - groups[group, DOCS])
                    full = min(np.int64(groups[group, BINS]), left // per)
                    if full == 0:
                        per, full = left, np.int64(1)
                if full == groups[group, BINS]:
                    # The whole group leaves its list.
                    if before >= 0:
                        groups[before, NEXT] = groups[group, NEXT]
                    else:
                        head[level] = groups[group, NEXT]
                        if head[level] < 0:
                            word = level >> 6
                            occupied[word] &= ~(np.uint64(1) << np.uint64(level & 63))
                            if occupied[word] == 0:
                                summary[word >> 6] &= ~(np.uint64(1) << np.uint64(word & 63))
                else:
                    # Its first bins become a group of their own.
                    rest, group = group, np.int64(num_groups)
                    num_groups += 1
                    groups[group, START] = groups[rest, START]
                    groups[group, BINS] = full
                    groups[group, ROOM] = groups[rest, ROOM]
                    groups[group, DOCS] = groups[rest, DOCS]
                    groups[rest, START] += full
                    groups[rest, BINS] -= full
            start[used] = groups[group, START]
            bins[used] = full
            per_bin[used] = per
            used += 1
            left -= full * per
            groups[group, DOCS] += per
            groups[group, ROOM] -= per * size
            if groups[group, ROOM] >= smallest and groups[group, DOCS] < max_docs:
                level = np.int64(groups[group, ROOM]) >> shift
                word, bit = level >> 6, np.uint64(1) << np.uint64(level & 63)
                groups[group, NEXT] = head[level] if occupied[word] & bit else -1
                head[level] = group
                occupied[word] |= bit
                summary[word >> 6] |= np.uint64(1) << np.uint64(word & 63)
    ptr[sizes.size] = used
    return used, num_bins


@njit(cache=True, nogil=True)
def _open(room, held, max_docs, shift, groups, head, occupied, summary):
    """Bin b as group b, listed by its room."""
    for b in range(room.size):
        groups[b, START] = b
        groups[b, BINS] = 1
        groups[b, ROOM] = room[b]
        groups[b, DOCS] = held[b]
        if room[b] > 0 and held[b] < max_docs:
            level = np.int64(room[b]) >> shift
            word, bit = level >> 6, np.uint64(1) << np.uint64(level & 63)
            groups[b, NEXT] = head[level] if occupied[word] & bit else -1
            head[level] = b
            occupied[word] |= bit
            summary[word >> 6] |= np.uint64(1) << np.uint64(word & 63)


@njit(cache=True, nogil=True)
def _fullest_of_levels(head, occupied, groups, shift, level, size):
    """(level, group with the least room ≥ size, the one before it in the list or −1); group −1 when there is none."""
    while level >> 6 < occupied.size:
        if occupied[level >> 6] >> np.uint64(level & 63) & np.uint64(1):
            best, before_best, before, at = -1, -1, -1, np.int64(head[level])
            while at >= 0:
                if groups[at, ROOM] >= size and (best < 0 or groups[at, ROOM] < groups[best, ROOM]):
                    best, before_best = at, before
                before, at = at, np.int64(groups[at, NEXT])
            if best >= 0:
                return level, best, before_best
        level += 1
        while level >> 6 < occupied.size and level & 63 == 0 and occupied[level >> 6] == 0:
            level += 64
    return -1, -1, -1


@intrinsic
def _trailing_zeros(typingctx, x):
    """Index of the lowest set bit of a uint64 that is not 0, as int64: one instruction."""

    def codegen(context, builder, signature, args):
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), codegen
