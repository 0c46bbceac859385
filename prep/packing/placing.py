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
    words = np.empty(lengths.table, np.uint64)
    cursors = np.empty((lengths.table, 4), np.int32)
    _begin(
        lengths.keys_of_sizes, h.counts, plan.ptr, plan.start, plan.bins, plan.per_bin, np.uint64(seed % 2**64),
        textbook, words, cursors,
    )  # fmt: skip
    for first, keys in lengths.chunks():
        _deal(keys, words, cursors, plan.start, plan.bins, plan.per_bin, textbook, out[first : first + keys.size])
    return out


@njit(cache=True, nogil=True)
def _begin(keys, counts, ptr, start, bins, per_bin, seed, textbook, words, cursors):
    """Sets each length's word and cursor (placement, round, first placement, end) to its first document's place."""
    for i in range(keys.size):
        key = keys[i]
        place, skip = ptr[i], np.int64(0)
        cursors[key, 2] = place
        cursors[key, 3] = ptr[i + 1]
        if not textbook:
            skip = np.int64(_hash(seed, np.uint64(key)) % np.uint64(counts[i]))
            while skip >= np.int64(bins[place]) * per_bin[place]:
                skip -= np.int64(bins[place]) * per_bin[place]
                place += 1
        cursors[key, 0] = place
        if _fills(bins[place], per_bin[place], textbook):
            cursors[key, 1] = skip // per_bin[place]
            done = skip - np.int64(cursors[key, 1]) * per_bin[place]
            words[key] = _word(start[place] + cursors[key, 1], per_bin[place] - done, np.uint64(0))
        else:
            cursors[key, 1] = skip // bins[place]
            done = skip - np.int64(cursors[key, 1]) * bins[place]
            words[key] = _word(start[place] + done, bins[place] - done, STEP)


@njit(cache=True, nogil=True)
def _deal(keys, words, cursors, start, bins, per_bin, textbook, out):
    for i in range(keys.size):
        key = keys[i]
        word = words[key]
        out[i] = np.int32(word & LOW)
        word = word - ONE_LEFT + ((word >> STEP_SHIFT) & BIT)
        if word < ONE_LEFT:
            # The next round of the placement, else the first of the next placement, cyclically.
            place, turn = cursors[key, 0], cursors[key, 1] + 1
            fills = _fills(bins[place], per_bin[place], textbook)
            if turn == (bins[place] if fills else per_bin[place]):
                turn = 0
                place += 1
                if place == cursors[key, 3]:
                    place = cursors[key, 2]
                cursors[key, 0] = place
                fills = _fills(bins[place], per_bin[place], textbook)
            cursors[key, 1] = turn
            if fills:
                word = _word(start[place] + turn, per_bin[place], np.uint64(0))
            else:
                word = _word(start[place], bins[place], STEP)
        words[key] = word


@njit(cache=True, nogil=True, forceinline=True)
def _fills(bins, per_bin, textbook):
    """Whether a round is one bin filled with all its documents, rather than one document for every bin."""
    return bins == 1 or (textbook and per_bin > 1)


@njit(cache=True, nogil=True, forceinline=True)
def _word(first, left, step):
    return np.uint64(first) | step | (np.uint64(left) << LEFT_SHIFT)


@njit(cache=True, nogil=True, forceinline=True)
def _hash(seed, key):
    """splitmix64 of seed and key (Steele, Lea & Flood, 2014)."""
    z = seed + (key + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
