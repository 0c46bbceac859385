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
    size_room = 4 * h.sizes.size + 64
    while True:
        ptr = np.empty(h.sizes.size + 1, np.int64)
        start, bins, per_bin = np.empty((3, size_room), np.int32)
        used, num_bins = _best_fit(
            h.sizes, h.counts, h.capacity, max_docs, room, held, shift, levels, ptr, start, bins, per_bin
        )
        if used >= 0:
            return Plan(ptr, start[:used], bins[:used], per_bin[:used], num_bins)
        size_room *= 4


@njit(cache=True, nogil=True)
def _best_fit(sizes, counts, capacity, max_docs, room, held, shift, levels, ptr, start, bins, per_bin):
    """Returns (placements used, bins), or (−1, −1) when the placement arrays are too small."""
    groups = np.empty((3 * sizes.size + 2 + room.size, 5), np.int32)
    head = np.empty(levels, np.int32)
    occupied = np.zeros((levels >> 6) + 1, np.uint64)
    summary = np.zeros((levels >> 12) + 1, np.uint64)
    smallest = sizes[sizes.size - 1] if sizes.size else 0
    num_groups = room.size
    num_bins = np.int64(room.size)
    for b in range(room.size):
        groups[b, START] = b
        groups[b, BINS] = 1
        groups[b, ROOM] = room[b]
        groups[b, DOCS] = held[b]
        if room[b] >= smallest and held[b] < max_docs:
            _put(head, occupied, summary, groups, shift, b)
    used = 0
    for i in range(sizes.size):
        size, left = sizes[i], counts[i]
        ptr[i] = used
        while left > 0:
            if used == start.size:
                return -1, -1
            group = _fullest(head, occupied, summary, groups, shift, size)
            if group < 0:
                # Nothing open has room: open all the bins that this size still needs.
                per = min(capacity // size, max_docs)
                group = num_groups
                num_groups += 1
                groups[group, START] = num_bins
                groups[group, BINS] = -(-left // per)
                groups[group, ROOM] = capacity
                groups[group, DOCS] = 0
                num_bins += groups[group, BINS]
            else:
                _take_out(head, occupied, summary, groups, shift, group)
            per = min(groups[group, ROOM] // size, max_docs - groups[group, DOCS])
            full = min(np.int64(groups[group, BINS]), left // per)
            if full == 0:
                per = left
                full = 1
            start[used] = groups[group, START]
            bins[used] = full
            per_bin[used] = per
            used += 1
            left -= full * per
            if full < groups[group, BINS]:
                rest = num_groups
                num_groups += 1
                groups[rest, START] = groups[group, START] + full
                groups[rest, BINS] = groups[group, BINS] - full
                groups[rest, ROOM] = groups[group, ROOM]
                groups[rest, DOCS] = groups[group, DOCS]
                _put(head, occupied, summary, groups, shift, rest)
                groups[group, BINS] = full
            groups[group, ROOM] -= per * size
            groups[group, DOCS] += per
            if groups[group, ROOM] >= smallest and groups[group, DOCS] < max_docs:
                _put(head, occupied, summary, groups, shift, group)
    ptr[sizes.size] = used
    return used, num_bins


@njit(cache=True, nogil=True)
def _put(head, occupied, summary, groups, shift, group):
    level = groups[group, ROOM] >> shift
    word, bit = level >> 6, np.uint64(1) << np.uint64(level & 63)
    groups[group, NEXT] = head[level] if occupied[word] & bit else -1
    head[level] = group
    occupied[word] |= bit
    summary[word >> 6] |= np.uint64(1) << np.uint64(word & 63)


@njit(cache=True, nogil=True)
def _take_out(head, occupied, summary, groups, shift, group):
    level = groups[group, ROOM] >> shift
    if head[level] != group:
        at = head[level]
        while groups[at, NEXT] != group:
            at = groups[at, NEXT]
        groups[at, NEXT] = groups[group, NEXT]
        return
    head[level] = groups[group, NEXT]
    if head[level] < 0:
        word = level >> 6
        occupied[word] &= ~(np.uint64(1) << np.uint64(level & 63))
        if occupied[word] == 0:
            summary[word >> 6] &= ~(np.uint64(1) << np.uint64(word & 63))


@njit(cache=True, nogil=True)
def _fullest(head, occupied, summary, groups, shift, size):
    """The group with the least room ≥ size, or −1."""
    level = _next_level(occupied, summary, size >> shift)
    while level >= 0:
        best = head[level]
        if shift == 0:
            return best
        at, best = best, -1
        while at >= 0:
            if groups[at, ROOM] >= size and (best < 0 or groups[at, ROOM] < groups[best, ROOM]):
                best = at
            at = groups[at, NEXT]
        if best >= 0:
            return best
        level = _next_level(occupied, summary, level + 1)
    return -1


@njit(cache=True, nogil=True)
def _next_level(occupied, summary, level):
    """The first occupied level ≥ level, or −1: a bitmap of levels under a bitmap of its words."""
    word = level >> 6
    if word >= occupied.size:
        return -1
    bits = occupied[word] >> np.uint64(level & 63)
    if bits:
        return level + _trailing_zeros(bits)
    word += 1
    group = word >> 6
    if group >= summary.size:
        return -1
    bits = (summary[group] >> np.uint64(word & 63)) << np.uint64(word & 63)
    while bits == 0:
        group += 1
        if group == summary.size:
            return -1
        bits = summary[group]
    word = (group << 6) + _trailing_zeros(bits)
    return (word << 6) + _trailing_zeros(occupied[word])


@intrinsic
def _trailing_zeros(typingctx, x):
    """Index of the lowest set bit of a uint64 that is not 0, as int64: one instruction."""

    def codegen(context, builder, signature, args):
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), codegen
