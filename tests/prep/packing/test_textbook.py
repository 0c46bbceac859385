"""Every algorithm against the slow loop of the textbook."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from packing_cases import aligned, check, instances, limits

from prep.packing import bfd as bfd_module
from prep.packing import completion as completion_module
from prep.packing import ffd as ffd_module
from prep.packing import lengths as lengths_module
from prep.packing import level as level_module
from prep.packing import pack


def textbook(sizes, capacity, max_docs, order, choose):
    """Documents in `order`, each into the bin that `choose` names among [(bin, room)] with room, else a new one."""
    room, docs, ids = [], [], np.empty(len(sizes), np.int32)
    for d in order:
        able = [(b, r) for b, r in enumerate(room) if r >= sizes[d] and (max_docs is None or docs[b] < max_docs)]
        b = choose(able, len(room))
        if b is None:
            b = len(room)
            room.append(capacity)
            docs.append(0)
        room[b] -= sizes[d]
        docs[b] += 1
        ids[d] = b
    return ids, len(room)


def first(able, _):
    return able[0][0] if able else None


def fullest(able, _):
    return min(able, key=lambda x: x[1])[0] if able else None


def newest_only(able, bins):
    return bins - 1 if able and able[-1][0] == bins - 1 else None


def decreasing(sizes):
    return np.argsort(-np.asarray(sizes), kind="stable")


@given(instances(largest=10_000), limits, st.sampled_from([1, 2, 3, 8]))
def test_ffd_is_the_textbook_loop(instance, max_docs, align):
    lengths, capacity = instance
    capacity *= align
    lengths = np.maximum(1, lengths * align - np.arange(lengths.size, dtype=np.int32) % align)
    sizes = aligned(lengths, align)
    ids, bins = textbook(sizes, capacity, max_docs, decreasing(sizes), first)
    packing = pack(lengths, capacity, "ffd", align=align, max_docs=max_docs)
    np.testing.assert_array_equal(packing.bin_ids, ids)
    assert packing.num_bins == bins


@given(instances(), limits)
def test_ffd_with_many_bins_to_a_leaf(instance, max_docs):
    lengths, capacity = instance
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ffd_module, "MOST_LEAVES", 4)
        packing = pack(lengths, capacity, "ffd", max_docs=max_docs)
    ids, _ = textbook(lengths, capacity, max_docs, decreasing(lengths), first)
    np.testing.assert_array_equal(packing.bin_ids, ids)


@given(instances(largest=10_000))
def test_bfd_has_the_bins_of_the_textbook_loop(instance):
    lengths, capacity = instance
    _, bins = textbook(lengths, capacity, None, decreasing(lengths), fullest)
    assert pack(lengths, capacity, "bfd").num_bins == bins


@given(instances(), limits)
def test_bfd_and_completion_with_coarse_levels(instance, max_docs):
    lengths, capacity = instance
    fine = [pack(lengths, capacity, algo, max_docs=max_docs) for algo in ("bfd", "best")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bfd_module, "MOST_LEVELS", 4)
        patch.setattr(completion_module, "MOST_LEVELS", 4)
        for one, algo in zip(fine, ("bfd", "best"), strict=True):
            coarse = pack(lengths, capacity, algo, max_docs=max_docs)
            check(coarse, lengths, capacity, max_docs=max_docs)
            if max_docs is None:
                assert coarse.num_bins == one.num_bins


@given(instances(), limits)
def test_greedy_is_next_fit(instance, max_docs):
    lengths, capacity = instance
    ids, bins = textbook(lengths, capacity, max_docs, range(len(lengths)), newest_only)
    packing = pack(lengths, capacity, "greedy", max_docs=max_docs)
    np.testing.assert_array_equal(packing.bin_ids, ids)
    assert packing.num_bins == bins


@given(st.lists(st.integers(20, 60), max_size=400), limits)
def test_ordered_is_best_fit_among_the_newest_bins(lengths, max_docs):
    window = 64

    def fullest_of_window(able, bins):
        able = [(b, r) for b, r in able if b >= bins - window]
        # Among equally full bins the window's slot decides.
        return min(able, key=lambda x: (x[1], x[0] % window))[0] if able else None

    ids, bins = textbook(lengths, 64, max_docs, range(len(lengths)), fullest_of_window)
    packing = pack(lengths, 64, "ordered", max_docs=max_docs)
    np.testing.assert_array_equal(packing.bin_ids, ids)
    assert packing.num_bins == bins
    newest = np.maximum.accumulate(ids) if len(ids) else ids
    assert np.all(newest - ids < window)


@pytest.mark.parametrize("capacity", [100, 1000, 10_000, 300_000])
def test_first_and_best_fit_on_many_levels(capacity):
    rng = np.random.default_rng(capacity)
    for low, high in ((1, capacity), (capacity // 20, capacity // 2), (capacity // 5, capacity // 3)):
        lengths = rng.integers(low, high + 1, 400).astype(np.int32)
        ids, _ = textbook(lengths, capacity, None, decreasing(lengths), first)
        np.testing.assert_array_equal(pack(lengths, capacity, "ffd").bin_ids, ids)
        _, bins = textbook(lengths, capacity, None, decreasing(lengths), fullest)
        assert pack(lengths, capacity, "bfd").num_bins == bins


@given(instances(), limits, st.integers(1, 40))
def test_level_places_long_documents_in_the_bin_of_least_cost(instance, max_docs, bins):
    lengths, capacity = instance
    h = lengths_module.Lengths(lengths, capacity, 1).histogram
    room, held, ids = np.full(bins, capacity, np.int32), np.zeros(bins, np.int32), np.empty(lengths.size, np.int32)
    found = level_module._by_cost(h.sizes, h.counts, max_docs or 1000, ids, room, held)
    cost, left, docs, expected = [0] * bins, [capacity] * bins, [0] * bins, []
    for size in sorted(lengths.tolist(), reverse=True):
        able = [(cost[b], b) for b in range(bins) if left[b] >= size and docs[b] < (max_docs or 1000)]
        if not able:
            break
        b = min(able)[1]
        cost[b] += size * size
        left[b] -= size
        docs[b] += 1
        expected.append(b)
    assert found == (len(expected) == lengths.size)
    if found:
        assert ids.tolist() == expected
