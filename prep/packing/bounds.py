"""Proven lower bounds on the number of bins.

L2 of Martello & Toth, "Lower bounds and reduction procedures for the bin packing problem" (Discrete Applied
Mathematics 28, 1990): for every threshold a ≤ C/2, documents over C − a stand alone, those over C/2 stand in different
bins, and what the documents of size a … C/2 need beyond the room beside the latter needs bins of its own.
"""

import numpy as np

from prep.packing.lengths import Histogram


def lower_bound(h: Histogram, max_docs: int | None = None) -> int:
    """The larger of L2 and ⌈N / max_docs⌉. O(D) on the histogram; never under ⌈Σ sizes / capacity⌉."""
    if h.num_docs == 0:
        return 0
    bound = l2(h.sizes, h.counts, h.capacity)
    if max_docs is not None:
        bound = max(bound, -(-h.num_docs // max_docs))
    return bound


def l2(sizes: np.ndarray, counts: np.ndarray, capacity: int) -> int:
    """Martello & Toth's L2 for `counts[i]` documents of `sizes[i]` (int64, sizes strictly decreasing)."""
    number = np.concatenate([[0], np.cumsum(counts)])  # number[i], weight[i]: of the i largest sizes
    weight = np.concatenate([[0], np.cumsum(sizes * counts)])
    half = int(np.searchsorted(-sizes, -(capacity // 2), side="left"))  # sizes[:half] > capacity / 2
    # Only thresholds equal to a size change anything; a = 0 is covered by the smallest size.
    last = np.arange(half, sizes.size) + 1
    if last.size == 0:
        return int(number[half])
    alone = np.searchsorted(-sizes, -(capacity - sizes[half:]), side="left")  # sizes[:alone] > capacity − a
    alone = np.minimum(alone, half)
    room = (number[half] - number[alone]) * capacity - (weight[half] - weight[alone])
    extra = np.maximum(0, -((room - (weight[last] - weight[half])) // capacity))
    return int(number[half] + extra.max())
