"""The best of several packers, none of them slow: first fit, best fit, exact completion, and the LP where it is cheap.

The runs stop as soon as a packing meets the proven bound.
"""

from prep.packing.bfd import bfd
from prep.packing.bounds import lower_bound
from prep.packing.completion import complete
from prep.packing.ffd import ffd
from prep.packing.lengths import Histogram
from prep.packing.patterns import from_plan
from prep.packing.placing import Plan
from prep.packing.rounding import improve

# (leaves, patient) of the completions tried: more leaves help where few documents fill a bin, patience where many
# bins can be filled exactly, and neither is always better.
COMPLETIONS = ((100, False), (1000, True), (100, True), (1000, False))
# Simplex and knapsack operations that the LP may take, about half a second.
LP_WORK = 10**9


def best(h: Histogram, max_docs: int) -> tuple[Plan, int]:
    """(plan, proven bound); never more bins than `ffd` or `bfd`."""
    plan = bfd(h, max_docs)
    bound = lower_bound(h, max_docs, plan.num_bins)
    if plan.num_bins > bound:
        plan = min(plan, ffd(h, max_docs), key=_bins)
    for leaves, patient in COMPLETIONS:
        if plan.num_bins == bound:
            return plan, bound
        plan = min(plan, complete(h, max_docs, leaves=leaves, patient=patient).plan(h), key=_bins)
    if plan.num_bins > bound:
        patterns, certificate = improve(h, max_docs, from_plan(plan), bound, LP_WORK)
        plan, bound = min(plan, patterns.plan(h), key=_bins), certificate.bound
    return plan, bound


def _bins(plan: Plan) -> int:
    return plan.num_bins
