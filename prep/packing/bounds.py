"""Proven lower bounds on the number of bins.

L2 of Martello & Toth, "Lower bounds and reduction procedures for the bin packing problem" (Discrete Applied
Mathematics 28, 1990): for every threshold a ≤ C/2, documents over C − a stand alone, those over C/2 stand in different
bins, and what the documents of size a … C/2 need beyond the room beside the latter needs bins of its own.

Beside it the dual feasible functions u_k of Fekete & Schepers, "New classes of fast lower bounds for bin packing
problems" (Mathematical Programming 91, 2001), which see what L2 does not: that three documents just over a third of
the capacity never share a bin.
"""

import numpy as np

from prep.packing.lengths import Histogram

MOST_K = 30


def lower_bound(h: Histogram, max_docs: int) -> int:
    """The largest of L2, the bounds by u_1 … u_30 and ⌈N / max_docs⌉; O(D) numpy operations on the histogram."""
    if h.num_docs == 0:
        return 0
    return max(
        -(-h.num_docs // max_docs),
        l2(h.sizes, h.counts, h.capacity),
        fekete_schepers(h.sizes, h.counts, h.capacity),
    )


def l2(sizes: np.ndarray, counts: np.ndarray, capacity: int) -> int:
    """Martello & Toth's L2 for `counts[i]` documents of `sizes[i]` (int64, sizes strictly decreasing)."""
    number = np.zeros(sizes.size + 1, np.int64)  # number[i], weight[i]: of the i largest sizes
    weight = np.zeros(sizes.size + 1, np.int64)
    np.cumsum(counts, out=number[1:])
    np.cumsum(sizes * counts, out=weight[1:])
    half = int(np.searchsorted(-sizes, -(capacity // 2), side="left"))  # sizes[:half] > capacity / 2
    if half == sizes.size:
        return int(number[half])
    # Only thresholds equal to a size change anything, and the smallest size covers a = 0.
    alone = np.searchsorted(-sizes, sizes[half:] - capacity, side="left")  # sizes[:alone] > capacity − a
    alone = np.minimum(alone, half)
    room = (number[half] - number[alone]) * capacity - (weight[half] - weight[alone])
    extra = -((room - (weight[half + 1 :] - weight[half])) // capacity)
    return int(number[half] + max(0, int(extra.max())))


def fekete_schepers(sizes: np.ndarray, counts: np.ndarray, capacity: int) -> int:
    """max over k ≤ 30 of ⌈Σ count · u_k(size)⌉, u_k(x) = x where (k+1)·x is whole, else ⌊(k+1)·x⌋ / k, x = size/C."""
    best = 0
    for k in range(1, MOST_K + 1):
        scaled = (k + 1) * sizes
        whole, rest = np.divmod(scaled, capacity)
        exact = rest == 0
        # Σ over sizes with a whole multiple of count·size / C, plus Σ over the others of count·whole / k.
        a, b = int((counts * sizes)[exact].sum()), int((counts * whole)[~exact].sum())
        best = max(best, -(-(a * k + b * capacity) // (k * capacity)))
    return best
