"""Cost-balanced order: a permutation in blocks of like cost, worth what it claims; membership that loses no pack."""

import numpy as np
import pytest

from formats.cost import Model, PackCost
from formats.order import epoch_order
from prep.packing import pack
from prep.packing.balance import balance_report, cost_order, straggler

LLAMA_8B = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "intermediate_size": 14336, "vocab_size": 128256,
}  # fmt: skip


def sum_sq_of(lengths, packing):
    out = np.zeros(packing.num_bins, np.int64)
    np.add.at(out, packing.bin_ids, lengths.astype(np.int64) ** 2)
    return out


@pytest.mark.parametrize("number", [0, 1, 2, 15, 16, 17, 100, 1024, 5000, 70_000])
def test_a_permutation_in_blocks(number):
    sum_sq = np.random.default_rng(number).pareto(1.0, number).astype(np.int64)
    order, block = cost_order(sum_sq, seed=3)
    assert sorted(order.tolist()) == list(range(number))
    assert block == max(1, min(64, number // 16))
    again, _ = cost_order(sum_sq, seed=3)
    np.testing.assert_array_equal(order, again)
    if number >= 100:
        assert not np.array_equal(order, cost_order(sum_sq, seed=4)[0])


def test_blocks_are_alike_and_windows_hold_the_whole_spread():
    sum_sq = np.random.default_rng(0).permutation(8192).astype(np.int64)
    order, block = cost_order(sum_sq, seed=0)
    blocks = sum_sq[order].reshape(-1, block)
    assert block == 64
    # A block of a window covers about a sixteenth of the costs, and none covers a quarter.
    assert np.median(np.ptp(blocks, axis=1)) < 8192 / 10
    assert np.ptp(blocks, axis=1).max() < 8192 / 4
    # Never a global sort: each sixteenth of the costs is met by as many blocks as there are windows.
    level = np.sort(blocks.mean(axis=1) // 512)
    assert np.bincount(level.astype(int), minlength=16).min() >= 6
    # Blocks come in no order of cost.
    assert abs(np.corrcoef(np.arange(128), blocks.mean(axis=1))[0, 1]) < 0.3
    assert abs(np.corrcoef(blocks.mean(axis=1)[1:], blocks.mean(axis=1)[:-1])[0, 1]) < 0.3  # nor in runs


def test_epochs_keep_the_blocks():
    sum_sq = np.random.default_rng(1).integers(1, 10**9, 2000)
    order, block = cost_order(sum_sq, seed=0)
    stored = sum_sq[order]
    base = straggler(stored.astype(float), 31)
    assert block == 64
    for epoch in range(3):
        seen = stored[epoch_order(stored.size, "cost", block, 7, epoch)]
        assert straggler(seen[: 31 * 64].astype(float), 64) == pytest.approx(
            straggler(stored[: 31 * 64].astype(float), 64)
        )
    assert base >= 1.0


def test_straggler_literal():
    cost = np.array([1.0, 3.0, 2.0, 2.0, 9.0])
    assert straggler(cost, 2) == (3 + 2) / (2 + 2)
    assert straggler(cost, 1) == 1.0
    assert straggler(cost, 6) == 1.0


@pytest.mark.parametrize(("capacity", "long", "limit"), [(32768, 0.0, 1.02), (32768, 0.05, 1.02), (131072, 0.05, 1.05)])
def test_straggler_at_64_ranks(capacity, long, limit):
    rng = np.random.default_rng(0)
    documents = 600_000
    lengths = rng.lognormal(6, 1.0, documents)
    chosen = rng.random(documents) < long
    lengths[chosen] = rng.lognormal(9.2, 1.0, int(chosen.sum()))
    lengths = np.clip(lengths, 8, capacity).astype(np.int32)
    cost = Model.from_config(LLAMA_8B).pack_cost()
    reports = {}
    for algo in ("bfd", "level"):
        packing = pack(lengths, capacity, algo)
        sum_sq = sum_sq_of(lengths, packing)
        order, _ = cost_order(sum_sq, seed=0)
        docs, tokens = np.bincount(packing.bin_ids), np.bincount(packing.bin_ids, lengths).astype(np.int64)
        sources = np.stack([np.bincount(packing.bin_ids, lengths * (chosen == s)) for s in (False, True)], axis=1)
        report = balance_report(
            sum_sq, docs, tokens, order, cost, capacity, seed=0, widths=(8, 64, 10**9), source_tokens=sources
        )
        assert report.widths == (8, 64)
        assert report.before[1] > 1.08
        assert report.after[1] <= limit
        assert report.after[0] <= report.after[1]
        assert report.length_spread[1] > 0  # the price is told
        assert 0 <= report.mix_spread[0] <= 1
        assert 0 <= report.mix_spread[1] <= 1
        reports[algo] = report, packing.num_bins
    assert reports["level"][1] == reports["bfd"][1]  # no pack lost
    assert reports["level"][0].before[0] < reports["bfd"][0].before[0]  # the packs themselves are more alike


def test_level_evens_out_the_cost_of_packs():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(6, 1.0, 200_000), 8, 32768).astype(np.int32)
    spread = {}
    for algo in ("bfd", "level"):
        sum_sq = sum_sq_of(lengths, pack(lengths, 32768, algo))
        spread[algo] = sum_sq.std() / sum_sq.mean()
    assert spread["level"] < 0.8 * spread["bfd"]


def test_bad_block():
    with pytest.raises(ValueError, match="block is 0"):
        cost_order(np.arange(10), 0, block=0)


def test_report_without_sources_and_with_few_packs():
    report = balance_report(
        np.array([4, 9, 1]), np.array([2, 1, 3]), np.array([3, 3, 3]), np.array([2, 0, 1]), PackCost(1.0, 1.0), 4,
        seed=0, widths=(1, 2, 4),
    )  # fmt: skip
    assert report.widths == (1, 2)
    assert report.mix_spread is None
    assert report.after[1] == pytest.approx(8 / ((5 + 8) / 2))  # packs 2 and 0 cost 4 + 1 and 4 + 4; pack 1 is short
    assert report.length_spread == (0.0, 0.0)
