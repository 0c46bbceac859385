"""Lengths → bins: the packing planner. Pure numpy and numba, no I/O.

>>> from prep.packing import pack
>>> p = pack([5, 3, 4, 4], capacity=8, algo="ffd")
>>> p.num_bins, p.lower_bound, p.fill
(2, 2, 1.0)
"""

from prep.packing.oversize import cut, cut_stream
from prep.packing.planner import ALGORITHMS, pack
from prep.packing.result import Packing

__all__ = ["ALGORITHMS", "Packing", "cut", "cut_stream", "pack"]
