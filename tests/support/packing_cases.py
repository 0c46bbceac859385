"""Lengths to pack, drawn by hypothesis, and what holds for every packing of them."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import strategies as st


@st.composite
def instances(draw, largest=100):
    """(lengths, capacity): all sizes, or few distinct sizes in great numbers, or only small or only large ones."""
    # Capacities of more than a word and of more than a word of words of the planner's bitmaps, but mostly small ones.
    capacity = draw(st.one_of(st.integers(1, 60), st.integers(1, 60), st.integers(1, largest)))
    kind = draw(st.sampled_from(["any", "few", "small", "large"]))
    if kind == "few":
        sizes = draw(st.lists(st.integers(1, capacity), min_size=1, max_size=4))
        lengths = [s for s in sizes for _ in range(draw(st.integers(0, 40)))]
        lengths = draw(st.permutations(lengths)) if len(lengths) < 50 else lengths
    else:
        low = capacity // 2 if kind == "large" else 1
        high = max(low, capacity // 4) if kind == "small" else capacity
        lengths = draw(st.lists(st.integers(max(1, low), max(1, high)), max_size=70))
    return np.array(lengths, np.int32), capacity


limits = st.one_of(st.none(), st.integers(1, 6))


def aligned(lengths, align):
    return -(-np.asarray(lengths, np.int64) // align) * align


def check(packing, lengths, capacity, align=1, max_docs=None):
    ids = packing.bin_ids
    assert ids.dtype == np.int32
    assert ids.shape == (len(lengths),)
    load = Counter()
    docs = Counter(ids.tolist())
    for b, size in zip(ids.tolist(), aligned(lengths, align).tolist(), strict=True):
        load[b] += size
    assert set(load) == set(range(packing.num_bins))
    assert all(v <= capacity for v in load.values())
    assert max_docs is None or all(v <= max_docs for v in docs.values())
    assert packing.lower_bound <= packing.num_bins
    if len(lengths):
        assert packing.fill == pytest.approx(int(np.sum(lengths)) / (packing.num_bins * capacity), abs=1e-12)
