"""The promises that hold for all algorithms; what each of them is stands in test_textbook.py."""

import tracemalloc
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packing_cases import check, instances, limits

from prep.packing import ALGORITHMS, pack
from prep.packing import bfd as bfd_module
from prep.packing import lengths as lengths_module

HISTOGRAM = ("ffd", "bfd", "level", "best", "optimal")  # planned on the histogram alone


def contents(packing, lengths):
    """The bins as a multiset of multisets of lengths."""
    bins = [[] for _ in range(packing.num_bins)]
    for b, size in zip(packing.bin_ids.tolist(), np.asarray(lengths).tolist(), strict=True):
        bins[b].append(size)
    return Counter(tuple(sorted(b)) for b in bins)


@pytest.mark.parametrize("algo", ALGORITHMS)
@given(instance=instances(), max_docs=limits, align=st.sampled_from([1, 2, 5]), seed=st.integers(0, 3))
@settings(max_examples=40)
def test_valid(algo, instance, max_docs, align, seed):
    lengths, capacity = instance
    capacity *= align
    lengths = np.maximum(1, lengths * align - np.arange(lengths.size, dtype=np.int32) % align)
    packing = pack(lengths, capacity, algo, align=align, max_docs=max_docs, seed=seed)
    check(packing, lengths, capacity, align, max_docs)
    if max_docs is not None:
        assert packing.lower_bound >= -(-len(lengths) // max_docs)


@pytest.mark.parametrize("algo", HISTOGRAM)
@given(instance=instances(), max_docs=limits, data=st.data())
@settings(max_examples=40)
def test_permuting_the_input_changes_nothing_but_ids(algo, instance, max_docs, data):
    lengths, capacity = instance
    shuffled = lengths[np.array(data.draw(st.permutations(range(lengths.size))), np.int64)]
    a = pack(lengths, capacity, algo, max_docs=max_docs)
    b = pack(shuffled, capacity, algo, max_docs=max_docs)
    assert contents(a, lengths) == contents(b, shuffled)
    assert a.lower_bound == b.lower_bound


@pytest.mark.parametrize("algo", HISTOGRAM)
@given(instance=instances(), seed=st.integers(-5, 2**63))
@settings(max_examples=25)
def test_seed_only_deals_equal_lengths_out_anew(algo, instance, seed):
    lengths, capacity = instance
    a, b = pack(lengths, capacity, algo), pack(lengths, capacity, algo, seed=seed)
    assert contents(a, lengths) == contents(b, lengths)
    np.testing.assert_array_equal(b.bin_ids, pack(lengths, capacity, algo, seed=seed).bin_ids)


@given(instances())
def test_better_algorithms_are_never_worse(instance):
    lengths, capacity = instance
    bins = {algo: pack(lengths, capacity, algo).num_bins for algo in ALGORITHMS}
    assert bins["best"] <= min(bins["ffd"], bins["bfd"])
    assert bins["optimal"] <= bins["best"]
    assert bins["level"] <= bins["bfd"]


@pytest.mark.parametrize("algo", ["bfd", "best"])
def test_neighbours_do_not_share_a_pack_and_seeds_differ(algo):
    lengths = np.full(10_000, 100, np.int32)
    a, b = pack(lengths, 1000, algo, seed=0).bin_ids, pack(lengths, 1000, algo, seed=1).bin_ids
    assert not np.any(a[1:] == a[:-1])
    assert not np.array_equal(a, b)


@given(instances(), st.integers(0, 2))
def test_members(instance, seed):
    lengths, capacity = instance
    packing = pack(lengths, capacity, "bfd", seed=seed)
    offsets, indices = packing.members()
    assert offsets.dtype == np.int64
    assert indices.dtype == np.int64
    assert offsets.shape == (packing.num_bins + 1,)
    for b in range(packing.num_bins):
        np.testing.assert_array_equal(indices[offsets[b] : offsets[b + 1]], np.flatnonzero(packing.bin_ids == b))


def test_threads_do_not_change_the_result():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 2049, 50_000).astype(np.int32)
    alone = {algo: pack(lengths, 2048, algo).bin_ids for algo in ("bfd", "ffd", "level", "ordered")}
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda algo: (algo, pack(lengths, 2048, algo).bin_ids), list(alone) * 3))
    for algo, ids in results:
        np.testing.assert_array_equal(ids, alone[algo])


# ---- input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algo", ALGORITHMS)
@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", ">i4"])
def test_every_integer_dtype(algo, dtype):
    values = np.random.default_rng(1).integers(1, 101, 300)
    expected = pack(values.astype(np.int32), 100, algo)
    np.testing.assert_array_equal(pack(values.astype(dtype), 100, algo).bin_ids, expected.bin_ids)


def test_strided_read_only_and_list_input():
    values = np.random.default_rng(2).integers(1, 101, 1000).astype(np.int32)
    expected = pack(values, 100).bin_ids
    strided = np.repeat(values, 2)[::2]
    assert not strided.flags.c_contiguous
    frozen = values.copy()
    frozen.flags.writeable = False
    for same in (strided, frozen, values.tolist()):
        np.testing.assert_array_equal(pack(same, 100).bin_ids, expected)


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.int64])
def test_chunks_are_seamless(dtype, monkeypatch):
    values = np.random.default_rng(3).integers(1, 101, 5000).astype(dtype)
    expected = {algo: pack(values, 104, algo, align=8).bin_ids for algo in ALGORITHMS}
    monkeypatch.setattr(lengths_module, "CHUNK", 7)
    for algo, ids in expected.items():
        np.testing.assert_array_equal(pack(values, 104, algo, align=8).bin_ids, ids)


def test_int32_is_read_in_place():
    values = np.arange(1, 1001, dtype=np.int32)
    chunks = list(lengths_module.Lengths(values, 1000, 1).chunks())
    assert len(chunks) == 1
    assert np.shares_memory(chunks[0][1], values)
    assert values.flags.writeable


def test_nothing_of_n_elements_but_the_result():
    values = np.random.default_rng(4).integers(1, 2049, 4_000_000).astype(np.int32)
    pack(values[:1000], 2048)
    tracemalloc.start()
    pack(values, 2048)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < values.nbytes + 2_000_000


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_no_document_and_one(algo):
    empty = pack(np.zeros(0, np.int32), 8, algo)
    assert (empty.num_bins, empty.lower_bound, empty.fill, empty.gap) == (0, 0, 1.0, 0.0)
    assert [x.tolist() for x in empty.members()] == [[0], []]
    assert pack([], 8, algo, max_docs=3).num_bins == 0
    one = pack([3], 8, algo)
    assert (one.bin_ids.tolist(), one.num_bins, one.lower_bound, one.fill) == ([0], 1, 1, 3 / 8)


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_capacity_one_and_the_largest(algo):
    assert pack([1, 1, 1], 1, algo).num_bins == 3
    huge = 2**31 - 1
    lengths = np.array([huge, 1, huge // 2, huge - 1, huge // 2 + 1, 2**30, 5_000_000], np.int64)
    for dtype in (np.int32, np.int64):
        packing = pack(lengths.astype(dtype), huge, algo)
        check(packing, lengths, huge)
        if algo in HISTOGRAM:
            assert packing.num_bins == 4
    check(pack(lengths[1:3], huge, algo, align=128), lengths[1:3], huge, align=128)


@given(instances(largest=50), limits)
def test_lengths_too_large_for_a_table(instance, max_docs):
    lengths, capacity = instance
    scaled = lengths.astype(np.int64) * 5_000_011
    for algo in ("ffd", "bfd", "best"):
        packing = pack(scaled, capacity * 5_000_011, algo, max_docs=max_docs)
        check(packing, scaled, capacity * 5_000_011, max_docs=max_docs)
        assert packing.num_bins == pack(lengths, capacity, algo, max_docs=max_docs).num_bins


@pytest.mark.parametrize(
    ("lengths", "options", "message"),
    [
        ([4, 9, 3, 10], {}, r"document 1 has length 9, over the capacity 8; 2 of 4 documents"),
        ([4, 9, 3], {}, r"document 1 has length 9, over the capacity 8; it is the only one"),
        ([4, 0, 9], {}, r"document 1 has length 0, under 1; 2 of 3"),
        ([4, -3], {}, r"document 1 has length -3, under 1"),
        (np.array([2**40, 1]), {}, r"document 0 has length 1099511627776, over"),
        (np.array([2**63], np.uint64), {}, r"document 0 has length 9223372036854775808, over"),
        ([4, 7], {"align": 5}, r"document 1 has length 7 \(10 aligned to 5\), over the capacity 8"),
        ([1.5, 2.0], {}, r"lengths are float64, not integers"),
        ([[1, 2]], {}, r"lengths have shape \(1, 2\)"),
        ([1], {"algo": "bdf"}, r"unknown packing algorithm 'bdf': use one of greedy, ffd, bfd"),
        ([1], {"align": 0}, r"align is 0"),
        ([1], {"align": 9}, r"align 9 is over the capacity 8"),
        ([1], {"max_docs": 0}, r"max_docs is 0"),
        ([1], {"capacity": 0}, r"capacity is 0"),
        ([1], {"capacity": 2**31}, r"capacity 2147483648 is over 2147483647"),
    ],
)
def test_bad_input_says_what_to_change(lengths, options, message):
    with pytest.raises(ValueError, match=message):
        pack(lengths, options.pop("capacity", 8), **options)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_the_first_offender_is_found_in_any_chunk(dtype, monkeypatch):
    monkeypatch.setattr(lengths_module, "CHUNK", 10)
    lengths = np.ones(100, dtype)
    lengths[[57, 80]] = 9
    with pytest.raises(ValueError, match=r"document 57 has length 9, over the capacity 8; 2 of 100"):
        pack(lengths, 8)


@given(instances(), limits, st.data())
def test_bins_that_are_open_already_are_filled_first(instance, max_docs, data):
    lengths, capacity = instance
    room = np.array(data.draw(st.lists(st.integers(0, capacity), max_size=5)), np.int32)
    held = np.array([data.draw(st.integers(0, (max_docs or 9))) for _ in room], np.int32)
    h = lengths_module.Lengths(lengths, capacity, 1).histogram
    most = max_docs or 1000
    plan = bfd_module.bfd(h, most, room, held)
    size = np.repeat(h.sizes, np.diff(plan.ptr))
    load, docs = np.zeros(plan.num_bins, np.int64), np.zeros(plan.num_bins, np.int64)
    for s, start, bins, per_bin in zip(size, plan.start, plan.bins, plan.per_bin, strict=True):
        load[start : start + bins] += per_bin * s
        docs[start : start + bins] += per_bin
    limit = np.full(plan.num_bins, capacity)
    limit[: room.size] = room
    docs[: room.size] += held
    assert np.all(load <= limit)
    assert docs.max(initial=0) <= max(most, held.max(initial=0))
    assert load.sum() == lengths.sum()
    assert plan.num_bins <= room.size + bfd_module.bfd(h, most).num_bins
