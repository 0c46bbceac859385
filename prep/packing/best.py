"""The best of several packers, none of them slow: first fit, best fit, exact completion, and the LP where it is cheap.

The runs stop as soon as a packing meets the proven bound.
"""

import numpy as np

from prep.packing.bfd import bfd
from prep.packing.bounds import lower_bound
from prep.packing.completion import complete
from prep.packing.ffd import ffd
from prep.packing.lengths import Histogram
from prep.packing.patterns import from_plan
from prep.packing.placing import Plan
from prep.packing.rounding import improve

# (leaves, patient) of the completions tried: more leaves help where few documents fill a bin, patience where many
# bins can be filled exactly, and neither is always better. Where `max_docs` binds, all of them again with a price on
# places: filling by room alone then packs up to a sixth more bins (20,000 documents, at most 6 a bin).
COMPLETIONS = ((100, False), (1000, True), (100, True), (1000, False))
# Simplex and knapsack operations that the LP may take, about half a second.
LP_WORK = 10**9


def best(h: Histogram, max_docs: int) -> tuple[Plan, int]:
    """(plan, proven bound); never more bins than `ffd` or `bfd`."""
    plan = bfd(h, max_docs)
    bound = lower_bound(h, max_docs, plan.num_bins)
    if plan.num_bins > bound:
        plan = min(plan, ffd(h, max_docs), key=_bins)
    for place in places(h, max_docs):
        for leaves, patient in COMPLETIONS:
            if plan.num_bins == bound:
                return plan, bound
            plan = min(plan, complete(h, max_docs, leaves=leaves, patient=patient, place=place).plan(h), key=_bins)
    if plan.num_bins > bound:
        patterns, certificate = improve(h, max_docs, from_plan(plan), bound, LP_WORK)
        plan, bound = min(plan, patterns.plan(h), key=_bins), certificate.bound
    return plan, bound


def places(h: Histogram, max_docs: int) -> tuple[int, ...]:
    """What a place for a document may be worth in room, see `complete`: nothing, and where a bin could hold more than
    `max_docs`, so that places can run out before room does, an eighth of its share of a bin and all of it."""
    sizes, counts = h.sizes[::-1], h.counts[::-1]
    docs = np.cumsum(counts)  # from the smallest
    last = int(np.searchsorted(docs, max_docs + 1))
    if last == docs.size:
        return (0,)
    smaller = int(docs[last - 1]) if last else 0
    least = int((sizes * counts)[:last].sum()) + (max_docs + 1 - smaller) * int(sizes[last])
    share = h.capacity // max_docs
    return (0, max(1, share // 8), max(1, share)) if least <= h.capacity else (0,)


def _bins(plan: Plan) -> int:
    return plan.num_bins
