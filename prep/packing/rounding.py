"""A packing from the linear relaxation: round its basis, pack the rest.

The whole part of every basic pattern is used, fractions over a threshold are tried rounded up, and what is left,
less than a bin per distinct length, is packed by best fit and by exact completion (Wäscher & Gau, "Heuristics for the
integer one-dimensional cutting stock problem", OR Spektrum 18, 1996, compare such roundings).
"""

import time
from dataclasses import dataclass, replace

import numpy as np

from prep.packing.bfd import bfd
from prep.packing.completion import complete
from prep.packing.lengths import Histogram
from prep.packing.lp import Relaxation, work_per_step
from prep.packing.patterns import Patterns, from_plan, trimmed

ROUND_UP_FROM = (1.0, 0.9, 0.75, 0.6, 0.5)
# The knapsack keeps a byte per (piece, documents, room) to trace its choice.
MOST_TRACE_BYTES = 1 << 28
STEPS_BETWEEN_LOOKS_AT_THE_CLOCK = 64


@dataclass(frozen=True)
class Certificate:
    """What is proven of a packing of `bins` bins: no packing has fewer than `bound`.

    relaxation: value of the linear relaxation reached, None when it was not run. steps, columns: its simplex steps and
    rows. converged: its optimum is reached, so that more work would not raise the bound.
    """

    bins: int
    bound: int
    relaxation: float | None = None
    steps: int = 0
    columns: int = 0
    converged: bool = False

    def __str__(self) -> str:
        if self.bins == self.bound:
            text = f"{self.bins} bins, proven optimal"
        else:
            gap = 100 * (self.bins / self.bound - 1)
            text = f"{self.bins} bins, no packing has fewer than {self.bound} (gap {gap:.4f} %)"
        if self.relaxation is None:
            return f"{text}; bound by dual feasible functions"
        end = "converged" if self.converged else "stopped at its work limit"
        lp = f"column generation on {self.columns} lengths {end} after {self.steps} steps at {self.relaxation:.2f}"
        return f"{text}; {lp}"


def improve(
    h: Histogram, max_docs: int, known: Patterns, bound: int, work: int, deadline: float | None = None
) -> tuple[Patterns, Certificate]:
    """The better of `known` and the rounded relaxation, and the better of `bound` and the relaxation's bound.

    work: operations granted to column generation; it is left out when they do not suffice for two steps per length.
    """
    if known.num_bins == bound:
        return known, Certificate(known.num_bins, bound)
    step_work, trace_bytes = work_per_step(h.sizes, h.counts, h.capacity, max_docs)
    most_steps = work // step_work
    if trace_bytes > MOST_TRACE_BYTES or most_steps < 2 * h.sizes.size:
        return known, Certificate(known.num_bins, bound)
    lp = Relaxation(h.sizes, h.counts, h.capacity, max_docs, known.dense(h.sizes.size))
    while not lp.finished and lp.steps < most_steps:
        if deadline is not None and time.monotonic() > deadline:
            raise ValueError("the time limit ended before column generation did: raise it or use algo='best'.")
        lp.run(min(most_steps - lp.steps, STEPS_BETWEEN_LOOKS_AT_THE_CLOCK))
    bound = max(bound, lp.bound())
    found = known
    for threshold in ROUND_UP_FROM:
        if found.num_bins > bound:
            found = min(found, _rounded(h, max_docs, lp, threshold), key=lambda p: p.num_bins)
    certificate = Certificate(found.num_bins, bound, lp.value, lp.steps, h.sizes.size, lp.finished)
    return found, certificate


def _rounded(h: Histogram, max_docs: int, lp: Relaxation, threshold: float) -> Patterns:
    """The basis with fractions ≥ threshold rounded up (trimmed to the documents there are), and the rest packed."""
    rows = np.maximum(lp.patterns, 0)
    # 1e-4 is far above the surplus that the relaxation is perturbed by, and a missing bin is packed with the rest.
    whole = np.floor(lp.times + 1e-4)
    times = whole + (lp.times - whole >= threshold)
    used = trimmed(rows, times.astype(np.int64), h.counts)
    left = replace(h, counts=h.counts - used.used(h.sizes.size))
    packings = [from_plan(bfd(left, max_docs))]
    packings += [complete(left, max_docs, leaves=1000, patient=patient) for patient in (False, True)]
    return used + min(packings, key=lambda p: p.num_bins)
