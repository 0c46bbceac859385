"""As near to the optimum as a fixed amount of work allows, with a proof of how near.

`best` first, then completion with many more leaves, then column generation to the end (`lp.py`, `rounding.py`). All
limits are counted work, so the result is the same on every machine; a time limit can only abort.
"""

import itertools
import time

from prep.packing.best import best, places
from prep.packing.completion import complete
from prep.packing.lengths import Histogram
from prep.packing.patterns import from_plan
from prep.packing.placing import Plan
from prep.packing.rounding import Certificate, improve

LEAVES = 20_000
# Simplex and knapsack operations, about ten seconds.
LP_WORK = 10**10


def optimal(h: Histogram, max_docs: int, time_limit: float | None) -> tuple[Plan, Certificate]:
    """(plan, certificate); never more bins than `best`. ValueError when `time_limit` seconds do not suffice."""
    deadline = None if time_limit is None else time.monotonic() + time_limit
    plan, bound = best(h, max_docs)
    for place, patient in itertools.product(places(h, max_docs), (True, False)):
        if plan.num_bins > bound:
            patterns = complete(h, max_docs, leaves=LEAVES, patient=patient, place=place)
            plan = min(plan, patterns.plan(h), key=lambda p: p.num_bins)
    patterns, certificate = improve(h, max_docs, from_plan(plan), bound, LP_WORK, deadline)
    return patterns.plan(h), certificate
