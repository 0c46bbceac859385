"""A plan of the histogram → the bin of every document, in one streaming pass.

A plan is a list of *placements*: `start, bins, per_bin` says that `per_bin` documents of one size lie in each of the
bins start … start + bins − 1. The placements of size i are rows ptr[i] … ptr[i + 1] − 1 and hold exactly its count.
The pass keeps one 64-bit word per length (documents left before the next jump, the step, the next bin), so a document
costs one load, one store and no division, and nothing of N elements is made but the result.
"""

from dataclasses import dataclass

import numpy as np
from numba import njit

from prep.packing.lengths import Lengths

# The word of a length: bin (low 32 bits), step 0 or 1 (bit 32), documents left at this step (high 31 bits).
STEP = np.uint64(1 << 32)
ONE_LEFT = np.uint64(1 << 33)
LOW = np.uint64((1 << 32) - 1)
STEP_SHIFT, LEFT_SHIFT, BIT = np.uint64(32), np.uint64(33), np.uint64(1)


@dataclass(frozen=True)
class Plan:
    """ptr: int64[D + 1]; start, bins, per_bin: int32[P] in the order of the histogram's sizes; num_bins."""

    ptr: np.ndarray
    start: np.ndarray
    bins: np.ndarray
    per_bin: np.ndarray
    num_bins: int


def assign(lengths: Lengths, plan: Plan, seed: int, *, textbook: bool = False) -> np.ndarray:
    """int32[N], the bin of each document.

    Documents of one length are dealt out in input order: one to each bin of a placement before any of them gets a
    second one, and beginning at an offset that is a hash of (seed, length). So neighbours of the input do not share
    a pack. With `textbook` the first document goes to the first place and a bin is filled before the next one, as
    the loop over the sorted list would.
    """
    h = lengths.histogram
    out = np.empty(h.num_docs, np.int32)
    words, cursors = np.empty(lengths.table, np.uint64), np.empty((lengths.table, 4), np.int32)
    rounds, turns = np.empty(plan.start.size, np.uint64), np.empty(plan.start.size, np.int32)
    _begin(
        lengths.keys_of_sizes, h.counts, plan.ptr, plan.start, plan.bins, plan.per_bin, np.uint64(seed % 2**64),
        textbook, rounds, turns, words, cursors,
    )  # fmt: skip
    for first, keys in lengths.chunks():
        _deal(keys, words, cursors, rounds, turns, out[first : first + keys.size])
    return out


@njit(cache=True, nogil=True)
def _begin(keys, counts, ptr, start, bins, per_bin, seed, textbook, rounds, turns, words, cursors):
    """Sets each placement's first word and number of rounds, each length's word and cursor to its first document.

    A round deals one document to every bin of the placement; or, for a single bin and with `textbook`, all its
    documents to one bin, and the next round is the next bin. cursors: placement, round, first placement, end.
    """
    for p in range(start.size):
        if bins[p] == 1 or (textbook and per_bin[p] > 1):
            rounds[p] = np.uint64(start[p]) | (np.uint64(per_bin[p]) << LEFT_SHIFT)
            turns[p] = bins[p]
        else:
            rounds[p] = np.uint64(start[p]) | STEP | (np.uint64(bins[p]) << LEFT_SHIFT)
            turns[p] = per_bin[p]
    for i in range(keys.size):
        key, place, turn = keys[i], ptr[i], np.uint64(0)
        word = rounds[place]
        if not textbook:
            skip = np.int64(_hash(seed, np.uint64(key)) % np.uint64(counts[i]))
            while skip >= np.int64(bins[place]) * per_bin[place]:
                skip -= np.int64(bins[place]) * per_bin[place]
                place += 1
            word = rounds[place]
            each = word >> LEFT_SHIFT
            turn = np.uint64(skip) // each
            done = np.uint64(skip) - turn * each
            word = word - done * ONE_LEFT + (done if word & STEP else turn)
        words[key] = word
        cursors[key, 0] = place
        cursors[key, 1] = turn
        cursors[key, 2] = ptr[i]
        cursors[key, 3] = ptr[i + 1]


@njit(cache=True, nogil=True)
def _deal(keys, words, cursors, rounds, turns, out):
    for i in range(keys.size):
        key = np.uint32(keys[i])
        word = words[key]
        out[i] = np.int32(word & LOW)
        word = word - ONE_LEFT + ((word >> STEP_SHIFT) & BIT)
        if word < ONE_LEFT:
            # The next round of the placement, else the first of the next placement, cyclically.
            place, turn = np.uint32(cursors[key, 0]), cursors[key, 1] + np.int32(1)
            if turn == turns[place]:
                turn = np.int32(0)
                place += np.uint32(1)
                if place == np.uint32(cursors[key, 3]):
                    place = np.uint32(cursors[key, 2])
                cursors[key, 0] = np.int32(place)
            cursors[key, 1] = turn
            word = rounds[place]
            if not word & STEP:
                word += np.uint64(turn)
        words[key] = word


@njit(cache=True, nogil=True, forceinline=True)
def _hash(seed, key):
    """splitmix64 of seed and key (Steele, Lea & Flood, 2014)."""
    z = seed + (key + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
