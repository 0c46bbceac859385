"""Best fit among the last few bins, in input order: for curricula and streams.

A document goes to the fullest of the WINDOW newest bins that has room, else to a new bin, which closes the oldest.
Bins are numbered as they are opened, so a document never lies WINDOW or more bins before one that precedes it in the
input, and a stream needs only the window in memory. Online best fit (Johnson et al., 1974) with bounded space.
"""

import numpy as np
from numba import njit

from prep.packing.lengths import Lengths

WINDOW = 64


def ordered(lengths: Lengths, max_docs: int) -> tuple[np.ndarray, int]:
    """(bin ids int32[N], number of bins). `max_docs`: most documents in a bin."""
    out = np.empty(lengths.histogram.num_docs, np.int32)
    room, docs = np.full(WINDOW, -1, np.int32), np.zeros(WINDOW, np.int32)
    num_bins = 0
    for first, units in lengths.unit_chunks():
        num_bins = _best_of_window(
            units, lengths.units, max_docs, room, docs, num_bins, out[first : first + units.size]
        )
    return out, num_bins


@njit(cache=True, nogil=True)
def _best_of_window(units, capacity, max_docs, room, docs, num_bins, out):
    """Bin b lives in slot b mod WINDOW; a closed or unopened slot has room −1."""
    window = room.size
    for i in range(units.size):
        size = units[i]
        least, slot = capacity + 1, -1
        for k in range(window):
            if size <= room[k] < least:
                least, slot = room[k], k
        if slot < 0:
            slot = num_bins % window
            room[slot] = capacity
            docs[slot] = 0
            num_bins += 1
        newest = num_bins - 1
        out[i] = newest - (newest - slot) % window
        room[slot] -= size
        docs[slot] += 1
        if docs[slot] == max_docs:
            room[slot] = -1
    return num_bins
