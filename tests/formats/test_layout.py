"""Layout functions against literal examples and slow loops."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formats import layout
from formats.schema import IGNORE_INDEX
from make_shards import random_packs

X = IGNORE_INDEX


def a(*values, dtype=np.int32):
    return np.array(values, dtype)


def test_literal_row():
    seq_lens, slots = a(3, 1, 4), a(4, 4, 4)
    np.testing.assert_array_equal(layout.cu_seqlens(slots), [0, 4, 8, 12])
    np.testing.assert_array_equal(layout.position_ids(slots), [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3])
    np.testing.assert_array_equal(layout.sequence_ids(seq_lens, slots, 14), [1, 1, 1, 0, 2, 0, 0, 0, 3, 3, 3, 3, 0, 0])
    ids = a(10, 11, 12, 0, 20, 0, 0, 0, 30, 31, 32, 33)
    mask = a(0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 1, 1, dtype=np.uint8)
    np.testing.assert_array_equal(layout.shift_labels(ids, mask), [11, 12, X, X, X, X, X, X, X, 32, 33, X])
    got = layout.thd_to_seqid(ids, mask, seq_lens, slots, capacity=14, pad_id=0)
    np.testing.assert_array_equal(got[0], [10, 11, 12, 0, 20, 0, 0, 0, 30, 31, 32, 33, 0, 0])
    np.testing.assert_array_equal(got[1], [1, 1, 1, 0, 2, 0, 0, 0, 3, 3, 3, 3, 0, 0])
    np.testing.assert_array_equal(got[2], [0, 1, 2, 0, 0, 0, 1, 2, 0, 1, 2, 3, 0, 1])
    np.testing.assert_array_equal(got[3], [X, 11, 12, X, X, X, X, X, X, X, 32, 33, X, X])


def test_padding_of_the_last_slot_and_the_tail_are_one_run_of_positions():
    got = layout.thd_to_seqid(a(5, 6, 0, 0), a(0, 1, 0, 0, dtype=np.uint8), a(2), a(4), capacity=8, pad_id=0)
    np.testing.assert_array_equal(got[2], [0, 1, 0, 1, 2, 3, 4, 5])


@pytest.mark.parametrize(("cp", "align"), [(1, 1), (2, 4), (3, 6), (4, 8), (8, 16)])
def test_slot_alignment(cp, align):
    assert layout.slot_alignment(cp) == align


def test_zigzag_of_two_slots_over_two_ranks():
    slots = a(8, 4)
    np.testing.assert_array_equal(layout.zigzag_indices(slots, 2, 0), [0, 1, 6, 7, 8, 11])
    np.testing.assert_array_equal(layout.zigzag_indices(slots, 2, 1), [2, 3, 4, 5, 9, 10])
    with pytest.raises(ValueError, match=r"slot 1 of 4 tokens is not a multiple of 8; pack with --cp 4"):
        layout.zigzag_indices(slots, 4, 0)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.sampled_from([1, 2, 3, 4]))
def test_zigzag_ranks_share_a_row_and_its_causal_work_equally(chunks, cp):
    slots = np.array(chunks) * 2 * cp
    parts = [layout.zigzag_indices(slots, cp, r) for r in range(cp)]
    assert sorted(np.concatenate(parts).tolist()) == list(range(slots.sum()))
    position = layout.position_ids(slots)
    assert len({int((position[p] + 1).sum()) for p in parts}) == 1


def test_contiguous_slices():
    assert [layout.contiguous_slice(12, 3, r) for r in range(3)] == [slice(0, 4), slice(4, 8), slice(8, 12)]
    with pytest.raises(ValueError, match="13 tokens cannot be cut into 3"):
        layout.contiguous_slice(13, 3, 0)


def test_tail_segments():
    np.testing.assert_array_equal(layout.tail_segments(300, 128), [128, 128, 44])
    np.testing.assert_array_equal(layout.tail_segments(256, 128), [128, 128])
    assert len(layout.tail_segments(0, 128)) == 0


@settings(max_examples=60)
@given(st.integers(0, 2**32), st.sampled_from([1, 2, 4, 8, 16]), st.integers(32, 96))
def test_conversions_are_exact_and_labels_follow_the_loop(seed, align, capacity):
    row = random_packs(np.random.default_rng(seed), 1, capacity, align, 50)[0]
    ids, mask, seq_lens, slots = row[:4]
    seqid = layout.thd_to_seqid(ids, mask, seq_lens, slots, capacity=capacity, pad_id=0)
    assert all(len(c) == capacity and c.dtype == np.int32 for c in seqid)
    back = layout.seqid_to_thd(seqid[0], seqid[1], seqid[3], align=align)
    for got, wanted in zip(back, (ids, mask, seq_lens, slots), strict=True):
        np.testing.assert_array_equal(got, wanted)
        assert got.dtype == wanted.dtype

    labels, start = np.full(len(ids), X), 0
    for n, slot in zip(seq_lens, slots, strict=True):
        for t in range(start, start + n - 1):
            if mask[t + 1]:
                labels[t] = ids[t + 1]
        start += slot
    out = np.empty(len(ids), np.int64)
    assert layout.shift_labels(ids, mask, out=out) is out
    np.testing.assert_array_equal(out, labels)
    np.testing.assert_array_equal(layout.shift_labels(ids, mask), labels)


GOOD = dict(ids=[1, 2, 3, 0, 4, 5, 6, 7], mask=[0, 1, 1, 0, 0, 1, 1, 1], lens=[3, 4], slots=[4, 4])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"mask": [1, 1, 1, 0, 0, 1, 1, 1]}, "slot 0: the first token of a document is a target"),
        ({"mask": [0, 1, 1, 0, 1, 1, 1, 1]}, "slot 1: the first token of a document is a target"),
        ({"mask": [0, 1, 1, 1, 0, 1, 1, 1]}, "slot 0: padding is a target"),
        ({"mask": [0, 1, 1, 2, 0, 1, 1, 1]}, "other than 0 and 1"),
        ({"lens": [0, 4]}, "slot 0: 0 tokens in a slot of 4"),
        ({"lens": [5, 4]}, "slot 0: 5 tokens in a slot of 4"),
        ({"slots": [3, 5]}, "slot 0: 3 tokens are not a multiple of align 4"),
        ({"slots": [4, 8]}, "slots sum to 12, but there are 8 ids"),
        ({"lens": [], "slots": []}, "need equally many, at least one"),
        ({"capacity": 7}, "8 tokens are more than the capacity 7"),
    ],
)
def test_check_thd_names_the_broken_invariant(change, message):
    row = {**GOOD, **change}
    arguments = (a(*row["ids"]), a(*row["mask"], dtype=np.uint8), a(*row["lens"]), a(*row["slots"]))
    options = dict(capacity=row.get("capacity", 8), align=4)
    if message is None:
        layout.check_thd(*arguments, **options)
    else:
        with pytest.raises(ValueError, match=message):
            layout.check_thd(*arguments, **options)


@pytest.mark.parametrize(
    "numbers",
    [
        [1, 1, 2, 2, 0, 0, 0, 0],  # the second slot begins inside the first
        [2, 2, 2, 0, 1, 1, 0, 0],
        [1, 1, 0, 1, 2, 2, 0, 0],
        [0, 1, 1, 0, 2, 2, 0, 0],
        [1, 1, 1, 1, 1, 2, 2, 2],  # more slots than room
    ],
)
def test_documents_that_do_not_lie_in_their_slots_are_no_pack(numbers):
    with pytest.raises(ValueError, match="does not number documents 1, 2, 3 … in slots aligned to 4"):
        layout.seqid_to_thd(np.arange(8, dtype=np.int32), a(*numbers), np.full(8, X, np.int32), align=4)
