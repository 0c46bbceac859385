"""Patterns: rows of "so many bins hold exactly these sizes", and how they become a plan."""

from dataclasses import dataclass

import numpy as np

from prep.packing.lengths import Histogram
from prep.packing.placing import Plan


@dataclass(frozen=True)
class Patterns:
    """Row r: times[r] bins that hold per_bin[e] documents of size index[e] each, for e in ptr[r] … ptr[r + 1] − 1.

    times: int64[R] > 0, ptr: int64[R + 1], index: int32[E], per_bin: int32[E]; an index occurs once in a row.
    """

    times: np.ndarray
    ptr: np.ndarray
    index: np.ndarray
    per_bin: np.ndarray

    @property
    def num_bins(self) -> int:
        return int(self.times.sum())

    def __add__(self, other: "Patterns") -> "Patterns":
        return Patterns(
            np.concatenate([self.times, other.times]),
            np.concatenate([self.ptr, self.ptr[-1] + other.ptr[1:]]),
            np.concatenate([self.index, other.index]),
            np.concatenate([self.per_bin, other.per_bin]),
        )

    def used(self, num_sizes: int) -> np.ndarray:
        """int64[num_sizes], documents of each size in all the bins."""
        times = np.repeat(self.times, np.diff(self.ptr))
        out = np.zeros(num_sizes, np.int64)
        np.add.at(out, self.index, times * self.per_bin)
        return out

    def dense(self, num_sizes: int) -> np.ndarray:
        """int32[R, num_sizes], documents of each size in one bin."""
        out = np.zeros((self.times.size, num_sizes), np.int32)
        out[np.repeat(np.arange(self.times.size), np.diff(self.ptr)), self.index] = self.per_bin
        return out

    def plan(self, h: Histogram) -> Plan:
        """The plan that numbers the bins by row. Raises AssertionError unless the rows hold exactly the histogram."""
        assert np.array_equal(self.used(h.sizes.size), h.counts), "patterns do not hold each document exactly once"
        entries = np.diff(self.ptr)
        first_bin = np.cumsum(self.times) - self.times
        by_size = np.argsort(self.index, kind="stable")
        ptr = np.zeros(h.sizes.size + 1, np.int64)
        np.cumsum(np.bincount(self.index, minlength=h.sizes.size), out=ptr[1:])
        return Plan(
            ptr,
            np.repeat(first_bin, entries)[by_size].astype(np.int32),
            np.repeat(self.times, entries)[by_size].astype(np.int32),
            self.per_bin[by_size].astype(np.int32),
            self.num_bins,
        )


def from_dense(rows: np.ndarray, times: np.ndarray) -> Patterns:
    """Patterns of `rows` int[R, D] used `times` int[R]; rows used 0 times or empty are left out."""
    keep = (times > 0) & rows.any(axis=1)
    row, index = np.nonzero(rows[keep])
    ptr = np.zeros(int(keep.sum()) + 1, np.int64)
    np.cumsum(np.bincount(row, minlength=ptr.size - 1), out=ptr[1:])
    return Patterns(times[keep].astype(np.int64), ptr, index.astype(np.int32), rows[keep][row, index].astype(np.int32))


def trimmed(rows: np.ndarray, times: np.ndarray, counts: np.ndarray) -> Patterns:
    """As many of each row as `counts` int64[D] still allow, in the given order of the rows."""
    left = counts.copy()
    allowed = np.zeros(times.size, np.int64)
    for r in np.flatnonzero(times > 0):
        held = np.flatnonzero(rows[r])
        if held.size:
            allowed[r] = min(int(times[r]), int((left[held] // rows[r, held]).min()))
            left[held] -= allowed[r] * rows[r, held]
    return from_dense(rows, allowed)


def from_plan(plan: Plan) -> Patterns:
    """The rows of a plan: one for each longest range of bins that every placement treats alike."""
    if plan.num_bins == 0:
        return from_dense(np.zeros((0, 1), np.int32), np.zeros(0, np.int64))
    start, end = plan.start.astype(np.int64), plan.start.astype(np.int64) + plan.bins
    edges = np.unique(np.concatenate([start, end]))
    first, last = np.searchsorted(edges, start), np.searchsorted(edges, end)
    spans = last - first
    size = np.repeat(np.arange(plan.ptr.size - 1), np.diff(plan.ptr))
    row = np.repeat(first - (np.cumsum(spans) - spans), spans) + np.arange(int(spans.sum()))
    by_row = np.argsort(row, kind="stable")
    ptr = np.zeros(edges.size, np.int64)
    np.cumsum(np.bincount(row, minlength=edges.size - 1), out=ptr[1:])
    return Patterns(
        np.diff(edges),
        ptr,
        np.repeat(size, spans)[by_row].astype(np.int32),
        np.repeat(plan.per_bin, spans)[by_row].astype(np.int32),
    )
