"""Proven lower bounds on the number of bins.

L2 of Martello & Toth, "Lower bounds and reduction procedures for the bin packing problem" (Discrete Applied
Mathematics 28, 1990): for every threshold a ≤ C/2, documents over C − a stand alone, those over C/2 stand in different
bins, and what the documents of size a … C/2 need beyond the room beside the latter needs bins of its own.

Beside it the dual feasible functions u_k of Fekete & Schepers, "New classes of fast lower bounds for bin packing
problems" (Mathematical Programming 91, 2001), which see what L2 does not: that three documents just over a third of
the capacity never share a bin.
"""

import numpy as np
from numba import njit

from prep.packing.lengths import Histogram

MOST_K = 20


def lower_bound(h: Histogram, max_docs: int, known: int | None = None) -> int:
    """The largest of ⌈N / max_docs⌉, L2 and the bounds by u_1 … u_20. O(D).

    known: the bins of a packing; when L2 meets them it is the optimum, and nothing else is computed.
    """
    if h.num_docs == 0:
        return 0
    bound = max(-(-h.num_docs // max_docs), l2(h.sizes, h.counts, h.capacity))
    if bound == known:
        return bound
    return max(bound, fekete_schepers(h.sizes, h.counts, h.capacity))


def l2(sizes: np.ndarray, counts: np.ndarray, capacity: int) -> int:
    """Martello & Toth's L2 for `counts[i]` documents of `sizes[i]` (int64, sizes strictly decreasing)."""
    return int(_l2(sizes, counts, capacity))


def fekete_schepers(sizes: np.ndarray, counts: np.ndarray, capacity: int) -> int:
    """max over k ≤ 20 of ⌈Σ count · u_k(size)⌉, u_k(x) = x where (k+1)·x is whole, else ⌊(k+1)·x⌋ / k, x = size/C."""
    exact, floors = np.zeros(MOST_K + 1, np.int64), np.zeros(MOST_K + 1, np.int64)
    _sums(sizes, counts, capacity, exact, floors)
    # Python's integers: Σ count · size · k may pass 2⁶³.
    return max(-(-(int(exact[k]) * k + int(floors[k]) * capacity) // (k * capacity)) for k in range(1, MOST_K + 1))


@njit(cache=True, nogil=True)
def _l2(sizes, counts, capacity):
    # Sizes 0 … half − 1 are over C / 2; only thresholds equal to a size at most C / 2 change anything, and the
    # smallest of them covers a = 0. `alone` counts the sizes over C − a, which grow fewer as a falls.
    half, number, weight = 0, np.int64(0), np.int64(0)
    while half < sizes.size and 2 * sizes[half] > capacity:
        number += counts[half]
        weight += counts[half] * sizes[half]
        half += 1
    alone, alone_number, alone_weight = half, number, weight
    most, small = np.int64(0), np.int64(0)
    for i in range(half, sizes.size):
        small += counts[i] * sizes[i]
        while alone > 0 and sizes[alone - 1] <= capacity - sizes[i]:
            alone -= 1
            alone_number -= counts[alone]
            alone_weight -= counts[alone] * sizes[alone]
        room = (number - alone_number) * capacity - (weight - alone_weight)
        most = max(most, small - room)
    return number + (most + capacity - 1) // capacity


@njit(cache=True, nogil=True)
def _sums(sizes, counts, capacity, exact, floors):
    """exact[k]: Σ count · size where (k + 1)·size is a multiple of C; floors[k]: Σ count · ⌊(k + 1)·size / C⌋ else."""
    # (k + 1) · size = whole · C + rest, carried along without a division; the inner loop is vector code.
    whole, rest, weight = sizes // capacity, sizes % capacity, counts * sizes
    for k in range(1, exact.size):
        sum_exact, sum_floors = np.int64(0), np.int64(0)
        for i in range(sizes.size):
            r = rest[i] + sizes[i]
            over = np.int64(r >= capacity)
            r -= capacity * over
            w = whole[i] + over
            rest[i], whole[i] = r, w
            sum_exact += weight[i] if r == 0 else np.int64(0)
            sum_floors += np.int64(0) if r == 0 else counts[i] * w
        exact[k], floors[k] = sum_exact, sum_floors
