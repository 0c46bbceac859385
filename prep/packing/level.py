"""Membership with the cost in mind: packs of nearly equal Σ s² at the bin count of a given packing.

Attention costs Σ s² of a pack, and best fit makes packs unlike each other: the first hold one long document, the last
only short ones. Here the number of bins is fixed first; documents go by decreasing length into the bin of the least
Σ s² that has room (the LPT rule of Graham, 1969, on squares), and only the last few per cent of the tokens, the
shortest documents, fill the bins by best fit. When they do not fit into that number of bins, a larger share is left to
best fit, so no pack is ever lost.
"""

from dataclasses import replace

import numpy as np
from numba import njit

from prep.packing.bfd import bfd
from prep.packing.lengths import Histogram
from prep.packing.placing import Plan

# Shares of the tokens left to best fit, tried in turn.
FILLING = (0.02, 0.04, 0.08, 0.16, 0.32, 0.64)


def level(h: Histogram, max_docs: int, num_bins: int) -> Plan | None:
    """A plan of at most `num_bins` bins of nearly equal Σ s²; None when no share of FILLING gets by with so few."""
    if num_bins == 0:
        return None
    tokens = np.cumsum((h.sizes * h.counts)[::-1])[::-1]  # of this size and all smaller ones
    for share in FILLING:
        long = int(np.searchsorted(-tokens, -share * tokens[0], side="right"))
        docs = int(h.counts[:long].sum())
        bins = np.empty(docs, np.int32)
        room, held = np.full(num_bins, h.capacity, np.int32), np.zeros(num_bins, np.int32)
        if not _by_cost(h.sizes[:long], h.counts[:long], max_docs, bins, room, held):
            continue
        rest = bfd(replace(h, sizes=h.sizes[long:], counts=h.counts[long:]), max_docs, room, held)
        if rest.num_bins == num_bins:
            one = np.ones(docs, np.int32)
            start, bins = np.concatenate([bins, rest.start]), np.concatenate([one, rest.bins])
            filled = np.zeros(num_bins + 1, np.int64)
            np.add.at(filled, start, 1)
            np.add.at(filled, start + bins, -1)
            # Best fit may leave a bin empty: number the others anew.
            number = np.cumsum(np.cumsum(filled)[:-1] > 0)
            ptr = np.concatenate([[0], np.cumsum(h.counts[:long]), docs + rest.ptr[1:]])
            per_bin = np.concatenate([one, rest.per_bin])
            return Plan(ptr, (number[start] - 1).astype(np.int32), bins, per_bin, int(number[-1]))
    return None


@njit(cache=True, nogil=True)
def _by_cost(sizes, counts, max_docs, bins, room, held):
    """Places all documents, or returns False. A bin without room waits until the documents are small enough."""
    num_bins = room.size
    cost, need = np.zeros(num_bins, np.int64), np.empty(num_bins, np.int64)
    ready, waiting = np.arange(num_bins).astype(np.int32), np.empty(num_bins, np.int32)  # heaps: least cost, most room
    num_ready, num_waiting, done = num_bins, 0, 0
    for i in range(sizes.size):
        size = sizes[i]
        while num_waiting > 0 and room[waiting[0]] >= size:
            ready[num_ready] = waiting[0]
            _up(ready, cost, num_ready)
            num_ready += 1
            num_waiting -= 1
            waiting[0] = waiting[num_waiting]
            _down(waiting, need, num_waiting)
        for _ in range(counts[i]):
            while num_ready > 0 and room[ready[0]] < size:
                b = ready[0]
                num_ready -= 1
                ready[0] = ready[num_ready]
                _down(ready, cost, num_ready)
                need[b] = -np.int64(room[b])
                waiting[num_waiting] = b
                _up(waiting, need, num_waiting)
                num_waiting += 1
            if num_ready == 0:
                return False
            b = ready[0]
            bins[done] = b
            done += 1
            room[b] -= size
            held[b] += 1
            cost[b] += size * size
            if held[b] == max_docs:
                room[b] = 0
                num_ready -= 1
                ready[0] = ready[num_ready]
            _down(ready, cost, num_ready)
    return True


@njit(cache=True, nogil=True, forceinline=True)
def _before(cost, a, b):
    return cost[a] < cost[b] or (cost[a] == cost[b] and a < b)


@njit(cache=True, nogil=True, forceinline=True)
def _up(heap, cost, at):
    while at > 0 and _before(cost, heap[at], heap[(at - 1) >> 1]):
        heap[at], heap[(at - 1) >> 1] = heap[(at - 1) >> 1], heap[at]
        at = (at - 1) >> 1


@njit(cache=True, nogil=True, forceinline=True)
def _down(heap, cost, size):
    at = 0
    while True:
        child = 2 * at + 1
        if child >= size:
            return
        if child + 1 < size and _before(cost, heap[child + 1], heap[child]):
            child += 1
        if not _before(cost, heap[child], heap[at]):
            return
        heap[at], heap[child] = heap[child], heap[at]
        at = child
