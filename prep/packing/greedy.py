"""Next-fit in input order: one open bin, closed as soon as a document does not fit.

The packing of torchtune and of NeMo AutoModel's THD collator. It keeps the order and wastes up to half of the tokens.
"""

import numpy as np
from numba import njit

from prep.packing.lengths import Lengths


def greedy(lengths: Lengths, max_docs: int) -> tuple[np.ndarray, int]:
    """(bin ids int32[N], number of bins). `max_docs`: most documents in a bin."""
    out = np.empty(lengths.lengths.size, np.int32)
    state = np.array([0, 0, max_docs], np.int64)  # open bin, its room, documents it may still take
    state[:2] = -1, 0
    for first, units in lengths.unit_chunks():
        _next_fit(units, lengths.units, max_docs, state, out[first : first + units.size])
    return out, int(state[0]) + 1


@njit(cache=True, nogil=True)
def _next_fit(units, capacity, max_docs, state, out):
    current, room, docs = state[0], state[1], state[2]
    for i in range(units.size):
        size = np.int64(units[i])
        if size > room or docs == 0:
            current += 1
            room = capacity
            docs = max_docs
        room -= size
        docs -= 1
        out[i] = current
    state[0], state[1], state[2] = current, room, docs
