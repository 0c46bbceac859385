"""Filling one bin after another as completely as possible (minimum bin slack).

Each bin begins with the largest document left; the rest of it takes the documents that leave the least room, found
by a depth-first search over the sizes in decreasing order that stops at an exact fit or after a number of leaves. That
is MBS' of Fleszar & Hindi, "New heuristics for one-dimensional bin-packing" (Computers & Operations Research 29,
2002), after Gupta & Ho (1999), here on the histogram: a pattern is used as often as the counts allow, so there are
about as many searches as distinct lengths, not as bins.

Where the number of documents in a bin is limited, a bin that is full of long ones wastes places as one that is full of
short ones wastes room: `place` is what an empty place counts beside the empty room.

With `patient` a bin is closed only when it leaves at most a tolerance, which starts at nothing and doubles once no
document is left that can begin such a bin: exact fits are taken while there is most choice.
"""

import numpy as np
from numba import njit

from prep.packing.lengths import Histogram
from prep.packing.patterns import Patterns

MOST_LEVELS = 1 << 20


def complete(h: Histogram, max_docs: int, *, leaves: int, patient: bool, place: int = 0) -> Patterns:
    """Packs the histogram (counts may be 0). leaves: fillings tried for one bin. place: room that each document counts
    for which a bin could hold beyond its own, up to `max_docs`. Deterministic."""
    shift = max(0, h.capacity.bit_length() - MOST_LEVELS.bit_length() + 1)
    # table[room >> shift]: the first size that fits into some room of that level.
    top = (np.arange((h.capacity >> shift) + 1) << shift) + (1 << shift) - 1
    table = np.searchsorted(-h.sizes, -top, side="left").astype(np.int32)
    rows, entries = 2 * h.sizes.size + 16, 8 * h.sizes.size + 64
    while True:
        times, ptr = np.empty(rows, np.int64), np.zeros(rows + 1, np.int64)
        index, per_bin = np.empty(entries, np.int32), np.empty(entries, np.int32)
        used = _complete(
            h.sizes, h.counts.copy(), h.capacity, max_docs, leaves, patient, place, table, shift,
            times, ptr, index, per_bin,
        )  # fmt: skip
        if used >= 0:
            return Patterns(times[:used], ptr[: used + 1], index[: ptr[used]], per_bin[: ptr[used]])
        rows, entries = 4 * rows, 4 * entries


@njit(cache=True, nogil=True)
def _complete(sizes, left, capacity, max_docs, leaves, patient, place, table, shift, times, ptr, index, per_bin):
    """Returns the rows used, or −1 when the pattern arrays are too small."""
    D = sizes.size
    after = np.arange(D + 1)  # union-find: the next size that is not used up
    for i in range(D):
        if left[i] == 0:
            after[i] = i + 1
    deepest = 0
    last = D - 1
    while last >= 0 and left[last] == 0:
        last -= 1
    if last >= 0:
        deepest = min(max_docs, capacity // sizes[last])
    stack, best = np.empty(deepest + 1, np.int64), np.empty(deepest + 1, np.int64)
    room = np.empty(deepest + 2, np.int64)
    held = np.zeros(D + 1, np.int64)
    rows = 0
    tolerance = 0 if patient else capacity + place * max_docs
    while True:
        seed = _next(after, 0)
        if seed == D:
            return rows
        while seed < D:
            while left[last] == 0:
                last -= 1
            depth, slack = _search(
                sizes, left, after, table, shift, capacity, max_docs, leaves, place, seed, sizes[last],
                stack, best, room, held,
            )  # fmt: skip
            if slack > tolerance:
                seed = _next(after, seed + 1)
                continue
            if rows == times.size or ptr[rows] + depth > index.size:
                return -1
            for d in range(depth):
                held[best[d]] += 1
            repeat = left[seed]
            for d in range(depth):
                repeat = min(repeat, left[best[d]] // held[best[d]])
            at = ptr[rows]
            for d in range(depth):
                i = best[d]
                if held[i]:
                    index[at] = i
                    per_bin[at] = held[i]
                    at += 1
                    left[i] -= repeat * held[i]
                    held[i] = 0
                    if left[i] == 0:
                        after[i] = i + 1
            times[rows] = repeat
            rows += 1
            ptr[rows] = at
            seed = _next(after, seed)
        tolerance = 2 * tolerance + 1


@njit(cache=True, nogil=True)
def _search(
    sizes, left, after, table, shift, capacity, max_docs, leaves, place, seed, smallest, stack, best, room, held
):  # fmt: skip
    """The fullest bin found that begins with `seed`: its sizes in best[:depth]. Returns (depth, room left)."""
    D = sizes.size
    stack[0] = seed
    held[seed] = 1
    room[1] = capacity - sizes[seed]
    depth, from_size = 1, seed
    best_depth, least = 0, capacity + place * max_docs + 1
    while True:
        i = D
        if depth < max_docs and room[depth] >= smallest:
            i = max(np.int64(table[room[depth] >> shift]), from_size)
            while i < D and (sizes[i] > room[depth] or left[i] <= held[i]):
                i = _next(after, i + 1) if after[i] == i else _next(after, i)
        if i == D:
            # Nothing more fits: a leaf. Then back up to the last document that can be exchanged for a smaller one.
            leaves -= 1
            slack = room[depth] + place * (max_docs - depth)
            if slack < least:
                best_depth, least = depth, slack
                best[:depth] = stack[:depth]
            if least == 0 or leaves <= 0:
                break
            while i == D and depth > 1:
                depth -= 1
                held[stack[depth]] -= 1
                i = _next(after, stack[depth] + 1)
                while i < D and left[i] <= held[i]:
                    i = _next(after, i + 1)
            if i == D:
                break
        stack[depth] = i
        held[i] += 1
        room[depth + 1] = room[depth] - sizes[i]
        depth += 1
        from_size = i
    for d in range(depth):
        held[stack[d]] = 0
    return best_depth, least


@njit(cache=True, nogil=True, forceinline=True)
def _next(after, i):
    """The first size ≥ i that is not used up, or D (path halving)."""
    while after[i] != i:
        after[i] = after[after[i]]
        i = after[i]
    return i
