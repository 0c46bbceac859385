"""Cutting loses nothing and cuts nothing in vain."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prep.packing import cut, cut_stream, pack

lengths_and_capacity = st.tuples(st.lists(st.integers(0, 50), max_size=40), st.integers(1, 12))


def pieces(triple):
    doc, start, length = triple
    assert (doc.dtype, start.dtype, length.dtype) == (np.int64, np.int64, np.int32)
    return list(zip(doc.tolist(), start.tolist(), length.tolist(), strict=True))


def covers(found, lengths):
    tokens = [(d, t) for d, start, length in found for t in range(start, start + length)]
    return tokens == [(d, t) for d, n in enumerate(lengths) for t in range(n)]  # once each, in order


@given(lengths_and_capacity)
def test_cut_covers_every_token_once_with_the_fewest_pieces(case):
    lengths, capacity = case
    found = pieces(cut(np.array(lengths, np.int64), capacity))
    assert covers(found, lengths)
    assert all(0 < length <= capacity for _, _, length in found)
    assert len(found) == sum(-(-n // capacity) for n in lengths)


@given(lengths_and_capacity, st.sampled_from([1, 2, 3]))
def test_cut_stream_fills_every_bin_but_the_last(case, align):
    lengths, capacity = case
    capacity *= align
    triple = cut_stream(np.array(lengths, np.int32), capacity, align=align)
    found = pieces(triple)
    assert covers(found, lengths)
    packing = pack(triple[2], capacity, "greedy", align=align)
    load = np.bincount(packing.bin_ids, -(-triple[2] // align) * align, minlength=packing.num_bins)
    assert np.all(load[:-1] == capacity)
    assert packing.num_bins == -(-sum(-(-n // align) * align for n in lengths) // capacity)


def test_literal():
    assert pieces(cut([5, 9, 0, 4], 4)) == [(0, 0, 4), (0, 4, 1), (1, 0, 4), (1, 4, 4), (1, 8, 1), (3, 0, 4)]
    assert pieces(cut_stream([5, 9, 0, 4], 4)) == [
        (0, 0, 4), (0, 4, 1), (1, 0, 3), (1, 3, 4), (1, 7, 2), (3, 0, 2), (3, 2, 2),
    ]  # fmt: skip


def test_lengths_of_one_huge_document():
    doc, start, length = cut(np.array([3 * 2**31]), 2**31 - 1)
    assert doc.tolist() == [0, 0, 0, 0]
    assert start.tolist() == [0, 2**31 - 1, 2**32 - 2, 3 * 2**31 - 3]
    assert length.tolist() == [2**31 - 1, 2**31 - 1, 2**31 - 1, 3]


@pytest.mark.parametrize("function", [cut, cut_stream])
def test_bad_input(function):
    with pytest.raises(ValueError, match=r"document 1 has length -2; 1 lengths are negative"):
        function([1, -2], 4)
    with pytest.raises(ValueError, match="capacity is 0"):
        function([1], 0)
    with pytest.raises(ValueError, match="not integers"):
        function([0.5], 4)


def test_stream_needs_a_capacity_of_whole_slots():
    with pytest.raises(ValueError, match="capacity 10 is not a multiple of align 4"):
        cut_stream([1], 10, align=4)
