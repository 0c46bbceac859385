"""`pack`: check the lengths, run one algorithm, bound the result."""

from collections.abc import Callable

import numpy as np

from prep.packing.best import best
from prep.packing.bfd import bfd
from prep.packing.bounds import lower_bound
from prep.packing.ffd import ffd
from prep.packing.greedy import greedy
from prep.packing.lengths import Lengths, reduced
from prep.packing.level import level
from prep.packing.optimal import optimal
from prep.packing.ordered import ordered
from prep.packing.placing import assign
from prep.packing.result import Packing
from prep.packing.rounding import Certificate


def _greedy(lengths: Lengths, max_docs: int, seed: int, time_limit: float | None) -> Packing:
    bin_ids, num_bins = greedy(lengths, max_docs)
    return _result(lengths, bin_ids, num_bins, lower_bound(lengths.histogram, max_docs, num_bins), "greedy")


def _ordered(lengths: Lengths, max_docs: int, seed: int, time_limit: float | None) -> Packing:
    bin_ids, num_bins = ordered(lengths, max_docs)
    return _result(lengths, bin_ids, num_bins, lower_bound(lengths.histogram, max_docs, num_bins), "ordered")


def _ffd(lengths: Lengths, max_docs: int, seed: int, time_limit: float | None) -> Packing:
    plan = ffd(lengths.histogram, max_docs)
    bin_ids = assign(lengths, plan, seed, textbook=seed == 0)
    return _result(lengths, bin_ids, plan.num_bins, lower_bound(lengths.histogram, max_docs, plan.num_bins), "ffd")


def _bfd(lengths: Lengths, max_docs: int, seed: int, time_limit: float | None) -> Packing:
    plan = bfd(lengths.histogram, max_docs)
    bound = lower_bound(lengths.histogram, max_docs, plan.num_bins)
    return _result(lengths, assign(lengths, plan, seed), plan.num_bins, bound, "bfd")


def _level(lengths: Lengths, max_docs: int, seed: int, time_limit: float | None) -> Packing:
    plan = bfd(lengths.histogram, max_docs)
    plan = level(lengths.histogram, max_docs, plan.num_bins) or plan
    bound = lower_bound(lengths.histogram, max_docs, plan.num_bins)
    return _result(lengths, assign(lengths, plan, seed), plan.num_bins, bound, "level")


def _best(lengths: Lengths, max_docs: int, seed: int, time_limit: float | None) -> Packing:
    plan, bound = best(reduced(lengths.histogram), max_docs)
    return _result(lengths, assign(lengths, plan, seed), plan.num_bins, bound, "best")


def _optimal(lengths: Lengths, max_docs: int, seed: int, time_limit: float | None) -> Packing:
    plan, certificate = optimal(reduced(lengths.histogram), max_docs, time_limit)
    bin_ids = assign(lengths, plan, seed)
    return _result(lengths, bin_ids, plan.num_bins, certificate.bound, "optimal", certificate)


ALGORITHMS: dict[str, Callable[[Lengths, int, int, float | None], Packing]] = {
    "greedy": _greedy,
    "ffd": _ffd,
    "bfd": _bfd,
    "best": _best,
    "optimal": _optimal,
    "ordered": _ordered,
    "level": _level,
}


def pack(
    lengths: np.ndarray,
    capacity: int,
    algo: str = "bfd",
    *,
    align: int = 1,
    max_docs: int | None = None,
    seed: int = 0,
    time_limit: float | None = None,
) -> Packing:
    """Packs documents into bins.

    lengths: integers [N] of any dtype, 1 … capacity; not copied when contiguous int32. capacity: tokens a bin holds.
    algo: one of `ALGORITHMS`. align: each document occupies its length rounded up to a multiple of it.
    max_docs: most documents in a bin. seed: which of equally long documents goes where (`ffd` with seed 0 is the
    textbook loop over the stably sorted list, any other seed keeps its bins and deals equal lengths out anew).
    time_limit: seconds after which `optimal` gives up with an error; it never changes a result.
    Raises ValueError for a length under 1 or over the capacity (naming the first one and how many there are), for
    an unknown algorithm and for parameters out of range.
    """
    if algo not in ALGORITHMS:
        raise ValueError(f"unknown packing algorithm {algo!r}: use one of {', '.join(ALGORITHMS)}.")
    if max_docs is not None and max_docs < 1:
        raise ValueError(f"max_docs is {max_docs}: use at least 1, or None for no limit.")
    checked = Lengths(lengths, capacity, align)
    limit = max(checked.lengths.size, 1) if max_docs is None else min(max_docs, max(checked.lengths.size, 1))
    return ALGORITHMS[algo](checked, limit, seed, time_limit)


def _result(
    lengths: Lengths, bin_ids: np.ndarray, num_bins: int, bound: int, algo: str, certificate: Certificate | None = None
) -> Packing:
    fill = lengths.histogram.tokens / (num_bins * lengths.capacity) if num_bins else 1.0
    return Packing(bin_ids, int(num_bins), bound, fill, algo, certificate)
