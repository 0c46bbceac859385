"""What `pack` returns."""

from dataclasses import dataclass

import numpy as np
from numba import njit

from prep.packing.rounding import Certificate


@dataclass(frozen=True)
class Packing:
    """A packing of N documents.

    bin_ids: int32[N], the bin of each document, 0 … num_bins − 1, every bin used.
    lower_bound: proven, no packing of these aligned lengths has fewer bins.
    fill: Σ real lengths / (num_bins · capacity); 1.0 when there is nothing to pack.
    certificate: how `optimal` proved its bound, printable; None for the other algorithms.
    """

    bin_ids: np.ndarray
    num_bins: int
    lower_bound: int
    fill: float
    algo: str
    certificate: Certificate | None = None

    @property
    def gap(self) -> float:
        """Bins over the proven bound, as a fraction of it: 0.0 is proven optimal."""
        return self.num_bins / self.lower_bound - 1 if self.lower_bound else 0.0

    def members(self) -> tuple[np.ndarray, np.ndarray]:
        """(offsets int64[num_bins + 1], indices int64[N]): bin b holds indices[offsets[b]:offsets[b + 1]].

        The documents of a bin stand in input order (a stable counting sort by bin).
        """
        offsets = np.zeros(self.num_bins + 1, np.int64)
        indices = np.empty(self.bin_ids.size, np.int64)
        _group(self.bin_ids, offsets, indices)
        return offsets, indices


@njit(cache=True, nogil=True)
def _group(bin_ids, offsets, indices):
    for b in bin_ids:
        offsets[b + 1] += 1
    for b in range(1, offsets.size):
        offsets[b] += offsets[b - 1]
    place = offsets[:-1].copy()
    for i in range(bin_ids.size):
        b = bin_ids[i]
        indices[place[b]] = i
        place[b] += 1
