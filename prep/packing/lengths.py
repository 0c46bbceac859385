"""Document lengths → a checked histogram in units of the alignment.

Every planner but `greedy` and `ordered` works on the histogram alone, so its cost does not depend on the number of
documents. Lengths are read in place when they are contiguous int32 and the alignment is 1; everything else passes
through a small chunk buffer, so no kernel is compiled twice and no array of N elements is made.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numba import njit

# Up to this many units the histogram is a plain table (int32 counts, so at most 16 MiB); above, lengths are ranked by
# sorting, which costs two arrays of N elements but no table of the capacity's size.
TABLE_UNITS = 1 << 22
CHUNK = 1 << 16
MAX_CAPACITY = 2**31 - 1


@dataclass(frozen=True)
class Histogram:
    """Distinct lengths in units of `align`, decreasing.

    sizes: int64[D] units, strictly decreasing. counts: int64[D] documents of that size, all positive.
    capacity: units that a bin holds. num_docs: Σ counts. tokens: Σ real lengths.
    """

    sizes: np.ndarray
    counts: np.ndarray
    capacity: int
    num_docs: int
    tokens: int


def reduced(h: Histogram) -> Histogram:
    """The same problem in units of the sizes' greatest common divisor: shorter tables for whoever works by capacity."""
    divisor = int(np.gcd.reduce(h.sizes)) if h.sizes.size else 1
    return replace(h, sizes=h.sizes // divisor, capacity=h.capacity // divisor) if divisor > 1 else h


class Lengths:
    """The lengths as the kernels see them: int32 *keys* in chunks, and what a key means.

    A key is the length in units of `align`, or its rank among the distinct lengths when those are too large for a
    table. `table` is the number of possible keys; `keys_of_sizes` gives the key of each entry of `histogram.sizes`.
    """

    def __init__(self, lengths: np.ndarray, capacity: int, align: int) -> None:
        self.lengths = as_integers(lengths)
        self.align = positive("align", align)
        self.capacity = positive("capacity", capacity)
        if self.capacity > MAX_CAPACITY:
            raise ValueError(f"capacity {capacity} is over {MAX_CAPACITY}: positions in a pack are 32-bit; use less.")
        if self.align > self.capacity:
            raise ValueError(f"align {align} is over the capacity {capacity}: use a smaller alignment or larger packs.")
        if self.lengths.size > MAX_CAPACITY:
            raise ValueError(
                f"{self.lengths.size} documents are over {MAX_CAPACITY}: bin ids are 32-bit; plan in parts."
            )
        self.units = self.capacity // self.align
        self.ranks: np.ndarray | None = None
        self.histogram = self._count()

    def chunks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (first document, read-only int32 keys)."""
        if self.ranks is not None:
            yield 0, _readonly(self.ranks)
        else:
            yield from self._unit_chunks()

    def unit_chunks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (first document, read-only int32 lengths in units), whatever the keys are."""
        yield from self._unit_chunks()

    def _unit_chunks(self) -> Iterator[tuple[int, np.ndarray]]:
        x, align = self.lengths, self.align
        if x.dtype == np.int32 and align == 1 and x.flags.c_contiguous:
            if x.size:
                yield 0, _readonly(x)
            return
        for first in range(0, x.size, CHUNK):
            chunk = x[first : first + CHUNK]
            if align > 1:
                chunk = -(-chunk.astype(np.int64) // align)
            yield first, _readonly(np.ascontiguousarray(chunk, dtype=np.int32))

    def _count(self) -> Histogram:
        x = self.lengths
        in_place = x.dtype == np.int32 and self.align == 1 and x.flags.c_contiguous
        largest = self.units
        if not in_place or largest > TABLE_UNITS:
            largest = self._check()
        if largest > TABLE_UNITS:
            return self._rank()
        self.table = largest + 1
        counts = np.zeros(self.table, np.int32)
        for _, keys in self._unit_chunks():
            if count_keys(keys, counts):
                self._check()
        sizes, numbers = np.empty((2, min(self.table, x.size)), np.int64)
        distinct = _compact(counts, sizes, numbers)
        self.keys_of_sizes = sizes[:distinct]
        return self._histogram(sizes[:distinct], numbers[:distinct])

    def _rank(self) -> Histogram:
        units = self.lengths.astype(np.int64)
        units = -(-units // self.align)
        distinct, ranks, counts = np.unique(units, return_inverse=True, return_counts=True)
        self.ranks = ranks.astype(np.int32)
        self.table = distinct.size
        self.keys_of_sizes = np.arange(distinct.size)[::-1].copy()
        return self._histogram(distinct[::-1].copy(), counts[::-1].copy())

    def _histogram(self, sizes: np.ndarray, counts: np.ndarray) -> Histogram:
        if self.align == 1:
            tokens = int(sizes @ counts)
        else:
            tokens = sum(
                int(self.lengths[i : i + CHUNK].sum(dtype=np.int64)) for i in range(0, self.lengths.size, CHUNK)
            )
        return Histogram(sizes, counts, self.units, int(self.lengths.size), tokens)

    def _check(self) -> int:
        """The largest length in units; ValueError when any is out of range."""
        limit, x, largest = self.units * self.align, self.lengths, 0
        bad, first_bad = 0, -1
        for first in range(0, x.size, CHUNK):
            chunk = x[first : first + CHUNK]
            low, high = int(chunk.min()), int(chunk.max())
            largest = max(largest, high)
            if low < 1 or high > limit:
                wrong = np.flatnonzero((chunk < 1) | (chunk > limit))
                bad += wrong.size
                if first_bad < 0:
                    first_bad = first + int(wrong[0])
        if bad:
            raise ValueError(self._complaint(first_bad, bad))
        return -(-largest // self.align)

    def _complaint(self, first: int, bad: int) -> str:
        length, total = int(self.lengths[first]), self.lengths.size
        others = "it is the only one" if bad == 1 else f"{bad} of {total} documents are out of range"
        if length < 1:
            return f"document {first} has length {length}, under 1; {others}: leave empty documents out of the plan."
        aligned = "" if self.align == 1 else f" ({-(-length // self.align) * self.align} aligned to {self.align})"
        return (
            f"document {first} has length {length}{aligned}, over the capacity {self.capacity}; {others}: "
            "drop, truncate or cut them first, or use a larger capacity."
        )


@njit(cache=True, nogil=True)
def count_keys(keys, counts):
    """Adds the keys to `counts`; returns how many lie outside 1 … len(counts) − 1 (those are not counted)."""
    bad = 0
    top = np.uint32(counts.size - 1)
    for i in range(keys.size):
        key = np.uint32(keys[i])
        if np.uint32(key - np.uint32(1)) < top:
            counts[key] += 1
        else:
            bad += 1
    return bad


@njit(cache=True, nogil=True)
def _compact(counts, sizes, numbers):
    """Writes the keys with a count, in decreasing order, and their counts; returns how many there are."""
    found = 0
    for key in range(counts.size - 1, 0, -1):
        if counts[key]:
            sizes[found] = key
            numbers[found] = counts[key]
            found += 1
    return found


def as_integers(lengths: np.ndarray) -> np.ndarray:
    x = np.asarray(lengths)
    if x.ndim != 1:
        raise ValueError(f"lengths have shape {x.shape}: give one length per document, a one-dimensional array.")
    if x.size == 0:
        return np.zeros(0, np.int32)
    if x.dtype.kind not in "iu":
        raise ValueError(f"lengths are {x.dtype}, not integers: give token counts as an integer array.")
    return x


def positive(name: str, value: int) -> int:
    if value != int(value) or value < 1:
        raise ValueError(f"{name} is {value}: use a positive whole number.")
    return int(value)


def _readonly(x: np.ndarray) -> np.ndarray:
    """A read-only view: numba compiles kernels apart for writable and read-only arrays, so all are made alike."""
    view = x.view()
    view.flags.writeable = False
    return view
