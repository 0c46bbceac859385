"""The order of packs and who reads which: tested over grids."""

import numpy as np
import pytest

from formats import order

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
