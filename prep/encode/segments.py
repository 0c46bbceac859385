"""Many rows as one flat array with offsets, as the Arrow lists of a store hold them."""

from collections.abc import Sequence

import numpy as np


def bounds_of(sizes: np.ndarray | Sequence[int]) -> np.ndarray:
    """Sizes of N things that lie one after the other → where each begins and the last ends, int64[N+1]."""
    bounds = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=bounds[1:])
    return bounds


def flatten(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids → (flat int32[T], offsets int64[N+1])."""
    return (np.concatenate(rows) if rows else np.empty(0, np.int32)), bounds_of([len(row) for row in rows])


def segment_sums(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Sum of values (int32, none negative) in each `offsets[i]:offsets[i+1]`, int64[N]."""
    sums = np.zeros(len(offsets) - 1, np.int64)
    filled = offsets[1:] > offsets[:-1]  # `reduceat` knows no empty segments
    if filled.any():
        # Sums that cannot overflow are made without turning every value into an int64 first.
        kind = np.int32 if int(values.max()) * len(values) < 1 << 31 else np.int64
        sums[filled] = np.add.reduceat(values, offsets[:-1][filled], dtype=kind)
    return sums


def segment_any(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Whether any of values (uint8) in each `offsets[i]:offsets[i+1]` is not 0, bool[N]."""
    found = np.zeros(len(offsets) - 1, bool)
    filled = offsets[1:] > offsets[:-1]
    if filled.any():
        found[filled] = np.maximum.reduceat(values, offsets[:-1][filled])
    return found
