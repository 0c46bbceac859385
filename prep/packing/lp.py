"""The linear relaxation of cutting stock by column generation, and a bound from it that needs no trust in floats.

Gilmore & Gomory, "A linear programming approach to the cutting-stock problem" (Operations Research 9, 1961): minimise
the number of bins over patterns (how many documents of each size one bin holds) and let a knapsack over the dual
prices name the next pattern, until none is worth more than one bin. The master is a revised simplex with a dense
inverse of the basis; the knapsack is dynamic programming over the capacity, bounded by the counts. Prices are smoothed
towards those of the best bound so far (Wentges, 1997), which starts at size / capacity and saves most iterations.

The bound is Farley's (1990) in integers: any prices y ≥ 0 prove ⌈Σ count·y / V⌉ bins, where V is the most that one bin
can hold in prices. y is scaled and rounded down to int64 and V computed exactly on the rounded prices, so rounding
errors of the simplex can weaken the bound but never make it wrong.
"""

from math import fsum

import numpy as np
from numba import njit

SCALE = 1 << 30
SMOOTHING = 0.7


class Relaxation:
    """The relaxation for `counts[i]` > 0 documents of `sizes[i]` (int64[D], decreasing), solved in slices of steps.

    patterns: int32[D, D], row j is basic variable j (−1 in a row of zeros is a surplus of that size). times: float64[D]
    ≥ 0, its value. prices: float64[D] ≥ 0, those of the best bound. steps: simplex steps taken. finished: the optimum
    is reached, or lies within the ceiling of the bound.
    """

    def __init__(self, sizes: np.ndarray, counts: np.ndarray, capacity: int, max_docs: int, pool: np.ndarray) -> None:
        """pool: int32[P, D], known patterns; they are priced before the knapsack is asked."""
        self.sizes, self.counts, self.capacity, self.pool = sizes, counts, capacity, pool
        most = np.minimum(np.minimum(capacity // sizes, max_docs), counts)
        self.pieces = _pieces(sizes, most)
        self.layers = _layers(sizes, most, capacity, max_docs)
        self.patterns = np.diag(most).astype(np.int32)
        self.prices = sizes / capacity
        self.steps, self.finished = 0, False
        self._inverse = np.diag(1.0 / most)
        # A tiny surplus, different for each size, keeps the ratio test from ties, and so the simplex from standing
        # still on degenerate bases.
        self.times = (counts + 1e-6 * np.arange(1, counts.size + 1) / counts.size) / most
        # The best bound in floats, and whether the pool is exhausted. All float sums are in a fixed order (no BLAS, no
        # fastmath), so the steps are the same on every machine.
        self._state = np.array([fsum(counts * self.prices), 0.0])

    @property
    def value(self) -> float:
        """Bins that the basis uses, fractions and all."""
        return float(self.times[self.patterns.max(axis=1) > 0].sum())

    def run(self, most_steps: int) -> None:
        steps, self.finished = _simplex(
            self.counts, self.capacity, self.layers, self.pieces, self.patterns, self._inverse, self.times, self.prices,
            self.pool, self._state, most_steps,
        )  # fmt: skip
        self.steps += steps

    def bound(self) -> int:
        """⌈Σ count·y / V⌉ for the integer prices y = ⌊prices · 2³⁰⌋."""
        return price_bound(self.counts, self.capacity, self.layers, self.pieces, self.prices)


def price_bound(counts: np.ndarray, capacity: int, layers: int, pieces: np.ndarray, prices: np.ndarray) -> int:
    """The bound that any `prices` (float64[D], cut to 0 … 1) prove, in exact integers."""
    y = np.floor(np.clip(prices, 0.0, 1.0) * SCALE).astype(np.int64)
    value = np.zeros((2, layers + 1, capacity + 1), np.int64)
    last = _knapsack(pieces, y, value, np.empty((1, 1, 1), np.bool_), False)
    total = sum(int(c) * int(v) for c, v in zip(counts, y, strict=True))
    worth = int(value[last, layers, capacity])
    return -(-total // worth) if worth else 0


def work_per_step(sizes: np.ndarray, counts: np.ndarray, capacity: int, max_docs: int) -> tuple[int, int]:
    """(operations of one simplex step, bytes of the knapsack's trace)."""
    most = np.minimum(np.minimum(capacity // sizes, max_docs), counts)
    pieces = int(np.floor(np.log2(most)).sum()) + most.size
    cells = pieces * (_layers(sizes, most, capacity, max_docs) + 1) * (capacity + 1)
    return cells + sizes.size**2, cells


def _layers(sizes: np.ndarray, most: np.ndarray, capacity: int, max_docs: int) -> int:
    """Documents that the knapsack has to count: `max_docs`, or none when no bin can hold more than that anyway."""
    weight = np.cumsum((sizes * most)[::-1])  # of the smallest documents
    whole = int(np.searchsorted(weight, capacity, side="right"))
    docs = int(most[::-1][:whole].sum())
    if whole < sizes.size:
        docs += (capacity - (int(weight[whole - 1]) if whole else 0)) // int(sizes[::-1][whole])
    return max_docs if max_docs < docs else 0


def _pieces(sizes: np.ndarray, most: np.ndarray) -> np.ndarray:
    """int64[P, 3] (size index, documents, weight): 0 … most documents of a size as sums of binary pieces."""
    rows = []
    for i, (size, left) in enumerate(zip(sizes.tolist(), most.tolist(), strict=True)):
        k = 1
        while left > 0:
            take = min(k, left)
            rows.append((i, take, take * size))
            left -= take
            k *= 2
    return np.array(rows, np.int64)


@njit(cache=True, nogil=True)
def _simplex(counts, capacity, layers, pieces, patterns, inverse, times, center, pool, state, most_steps):
    D = counts.size
    value = np.zeros((2, layers + 1, capacity + 1))
    taken = np.empty((pieces.shape[0], layers + 1, capacity + 1), np.bool_)
    column = np.zeros(D, np.int32)
    direction = np.empty(D)
    separation = np.empty(D)
    prices = np.empty(D)
    best_bound, pool_done = state[0], state[1] > 0.0
    smoothing = SMOOTHING
    step = 0
    while step < most_steps:
        for i in range(D):
            prices[i] = 0.0
        for j in range(D):
            if _is_pattern(patterns, j):
                for i in range(D):
                    prices[i] += inverse[j, i]
        if not pool_done:
            worth = _best_of(pool, prices, column)
            pool_done = worth <= 1.0 + 1e-7
        if pool_done:
            objective = 0.0
            for j in range(D):
                if _is_pattern(patterns, j):
                    objective += times[j]
            while True:
                for i in range(D):
                    separation[i] = smoothing * center[i] + (1.0 - smoothing) * max(prices[i], 0.0)
                last = _knapsack(pieces, separation, value, taken, True)
                _trace(pieces, taken, layers, capacity, column)
                most = value[last, layers, capacity]
                bound, worth = 0.0, 0.0
                for i in range(D):
                    bound += counts[i] * separation[i]
                    worth += column[i] * prices[i]
                if most > 0 and bound / most > best_bound:
                    best_bound = bound / most
                    for i in range(D):
                        center[i] = separation[i] / most
                if objective <= np.ceil(best_bound - 1e-6) + 1e-5:
                    return step, True
                if worth > 1.0 + 1e-9:
                    smoothing = SMOOTHING
                    break
                if smoothing == 0.0:
                    break
                smoothing = 0.0 if smoothing < 0.2 else smoothing - 0.3
            if worth <= 1.0 + 1e-9:
                # No pattern is worth more than a bin; a negative price asks for a surplus of that size.
                surplus = np.argmin(prices)
                if prices[surplus] > -1e-9:
                    return step, True
                column[:] = 0
                column[surplus] = -1
        _pivot(column, inverse, times, patterns, direction)
        step += 1
    state[0] = best_bound
    state[1] = 1.0 if pool_done else 0.0
    return step, False


@njit(cache=True, nogil=True)
def _best_of(pool, prices, column):
    """Fills `column` with the pool's pattern of the highest price; returns the price."""
    best, who = -1.0, 0
    for p in range(pool.shape[0]):
        total = 0.0
        for i in range(prices.size):
            total += pool[p, i] * prices[i]
        if total > best:
            best, who = total, p
    if pool.shape[0]:
        column[:] = pool[who]
    return best


@njit(cache=True, nogil=True, forceinline=True)
def _is_pattern(patterns, j):
    for i in range(patterns.shape[1]):
        if patterns[j, i] < 0:
            return False
        if patterns[j, i] > 0:
            return True
    return False


@njit(cache=True, nogil=True)
def _pivot(column, inverse, times, patterns, direction):
    D = times.size
    direction[:] = 0.0
    for i in range(D):
        if column[i]:
            for j in range(D):
                direction[j] += inverse[j, i] * column[i]
    leave, ratio = -1, np.inf
    for j in range(D):
        if direction[j] > 1e-9 and times[j] < ratio * direction[j]:
            leave, ratio = j, times[j] / direction[j]
    row = inverse[leave]
    for i in range(D):
        row[i] /= direction[leave]
    for j in range(D):
        factor = direction[j]
        if j != leave and factor != 0.0:
            times[j] = times[j] - ratio * factor
            other = inverse[j]
            for i in range(D):
                other[i] -= factor * row[i]
    times[leave] = ratio
    patterns[leave] = column


@njit(cache=True, nogil=True)
def _knapsack(pieces, prices, value, taken, trace):
    """Best price for every room and number of documents; returns which of the two tables holds the result."""
    layers, rooms = value.shape[1], value.shape[2]
    old = 0
    value[0] = 0
    for p in range(pieces.shape[0]):
        i, docs, weight = pieces[p]
        price = prices[i] * docs
        new = 1 - old
        for layer in range(layers):
            below = layer if layers == 1 else layer - docs
            before, after = value[old, layer], value[new, layer]
            if below < 0:
                after[:] = before
                if trace:
                    taken[p, layer] = False
                continue
            source = value[old, below]
            for room in range(min(weight, rooms)):
                after[room] = before[room]
            for room in range(weight, rooms):
                after[room] = max(before[room], source[room - weight] + price)
            if trace:
                mark = taken[p, layer]
                for room in range(rooms):
                    mark[room] = after[room] > before[room]
        old = new
    return old


@njit(cache=True, nogil=True)
def _trace(pieces, taken, layer, room, column):
    """Fills `column` with the pattern behind the best price."""
    column[:] = 0
    for p in range(pieces.shape[0] - 1, -1, -1):
        if taken[p, layer, room]:
            i, docs, weight = pieces[p]
            column[i] += docs
            room -= weight
            if taken.shape[1] > 1:
                layer -= docs
