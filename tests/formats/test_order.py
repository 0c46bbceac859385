"""The order of packs and who reads which: tested over grids."""

import numpy as np
import pytest

from formats import order

MIXED = [13, 1, 23, 24, 3, 17, 18, 19, 3, 4, 20, 21, 22, 26, 2, 11, 12, 13, 0, 5, 6, 7, 1, 1, 8, 9]
PINNED = [1, 8, 9, 3, 6, 5, 0, 7, 4, 2]


def test_permutation_is_pinned():
    """A resume depends on this order: it must never change, with no version of any library."""
    assert order.permutation(10, 0, 0).tolist() == PINNED
    assert order.permutation(10, 0, 1).tolist() != PINNED
    assert order.permutation(10, 1, 0).tolist() != PINNED


@pytest.mark.parametrize("n", [0, 1, 2, 17, 1000])
@pytest.mark.parametrize(("kind", "block"), [("input", 0), ("shuffle", 0), ("cost", 1), ("cost", 7), ("cost", 2000)])
def test_an_epoch_holds_each_pack_once(n, kind, block):
    for epoch in range(3):
        got = order.epoch_order(n, kind, block, seed=5, epoch=epoch)
        assert sorted(got.tolist()) == list(range(n))


def test_input_never_permutes():
    assert order.epoch_order(9, "input", 0, 3, 4).tolist() == list(range(9))


def test_cost_permutes_whole_blocks_and_keeps_the_partial_one_last():
    got = order.epoch_order(23, "cost", 5, seed=1, epoch=2)
    blocks = got[:20].reshape(4, 5)
    assert (blocks == blocks[:, :1] + np.arange(5)).all()
    assert sorted(blocks[:, 0].tolist()) == [0, 5, 10, 15]
    assert got[20:].tolist() == [20, 21, 22]
    assert any(order.epoch_order(23, "cost", 5, 1, e).tolist() != got.tolist() for e in range(3))


def test_unknown_order_is_refused():
    with pytest.raises(ValueError, match="order must be input, shuffle or cost"):
        order.epoch_order(3, "random", 0, 0, 0)


def test_shuffles_are_spread_evenly():
    """Each pack lands in each quarter of the epoch about equally often (chi-square, 3 degrees of freedom, p ≈ 1e-6)."""
    n, epochs = 64, 2000
    position = np.zeros((n, 4))
    for epoch in range(epochs):
        where = np.argsort(order.permutation(n, 11, epoch))
        position[np.arange(n), where // 16] += 1
    chi = ((position - epochs / 4) ** 2 / (epochs / 4)).sum(axis=1)
    assert chi.max() < 34


@pytest.mark.parametrize("dp_size", range(1, 9))
@pytest.mark.parametrize("micro_packs", [1, 3])
@pytest.mark.parametrize("batch_packs", [1, 5, 8])
def test_every_pack_exactly_once_for_every_world_size(dp_size, micro_packs, batch_packs):
    packs, consumed, seen = 29, 0, []
    for _ in range(order.steps_per_epoch(packs, batch_packs)):
        epoch, start, stop = order.step_span(consumed, packs, batch_packs)
        assert epoch == 0
        step = [order.rank_positions(start, stop, batch_packs, micro_packs, r, dp_size) for r in range(dp_size)]
        assert {s.shape for s in step} == {(order.accumulation(batch_packs, micro_packs, dp_size), micro_packs)}
        got = np.concatenate([s.ravel() for s in step])
        seen += got[got != order.EMPTY].tolist()
        consumed += stop - start
    assert sorted(seen) == list(range(packs))
    assert order.step_span(consumed, packs, batch_packs) == (1, 0, min(batch_packs, packs))


def test_neighbours_run_at_the_same_time_on_different_ranks():
    got = [order.rank_positions(8, 16, 8, 2, r, 2).tolist() for r in range(2)]
    assert got == [[[8, 10], [12, 14]], [[9, 11], [13, 15]]]
    assert order.rank_positions(8, 11, 8, 1, 1, 2).tolist() == [[9], [-1], [-1], [-1]]


STREAMS = (order.Stream(5, "shuffle", 0, 8), order.Stream(20, "cost", 3, 17), order.Stream(3, "input", 0, 1))


def test_a_mixture_of_one_whole_folder_is_that_folder():
    for epoch in range(3):
        alone = order.epoch_order(23, "cost", 5, 7, epoch)
        assert order.mixed_order([order.Stream(23, "cost", 5, 23)], 7, epoch).tolist() == alone.tolist()


def test_a_mixture_goes_through_each_folder_pass_by_pass():
    """Over many epochs, what is drawn from a folder is its own epochs one after the other."""
    drawn = np.concatenate([order.mixed_order(STREAMS, 7, epoch) for epoch in range(9)])
    first = 0
    for stream in STREAMS:
        own = drawn[(drawn >= first) & (drawn < first + stream.num_packs)] - first
        assert len(own) == 9 * stream.share
        passes = [own[i : i + stream.num_packs] for i in range(0, len(own), stream.num_packs)]
        for number, got in enumerate(passes):
            whole = order.epoch_order(stream.num_packs, stream.order, stream.block, 7, number)
            assert sorted(got.tolist()) == sorted(whole[: len(got)].tolist())
        first += stream.num_packs


@pytest.mark.parametrize(("sizes", "weights"), [((1000, 3000), (1, 3)), ((500, 700, 90), (0.5, 0.2, 0.3))])
def test_every_stretch_of_a_mixture_has_its_ratio(sizes, weights):
    given = order.shares(sizes, weights)
    assert sum(given) == sum(sizes)
    assert np.abs(np.array(given) / sum(sizes) - np.array(weights) / sum(weights)).max() < 1 / sum(sizes)
    streams = [order.Stream(n, "shuffle", 0, share) for n, share in zip(sizes, given, strict=True)]
    got = np.searchsorted(np.cumsum(sizes), order.mixed_order(streams, 3, 1), side="right")
    for folder, share in enumerate(given):
        seen = np.cumsum(got == folder)
        assert np.abs(seen - np.arange(1, len(got) + 1) * share / len(got)).max() <= 1.01


def test_blocks_of_like_cost_stay_together_in_a_mixture():
    streams = [order.Stream(40, "cost", 8, 40), order.Stream(60, "shuffle", 0, 60)]
    got = order.mixed_order(streams, 3, 0)
    at = [np.flatnonzero(got == first)[0] for first in range(0, 40, 8)]
    for first, place in zip(range(0, 40, 8), at, strict=True):
        assert got[place : place + 8].tolist() == list(range(first, first + 8))


def test_the_order_of_a_mixture_is_pinned():
    assert order.mixed_order(STREAMS, 1, 1).tolist() == MIXED
