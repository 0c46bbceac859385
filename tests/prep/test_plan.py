"""The pack plan: every token in exactly one slot, whatever the options."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prep.plan import PackOptions, make_plan

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=40).map(lambda x: np.array(x, np.int32))


@settings(max_examples=150, deadline=None)
@given(
    lengths=LENGTHS,
    algo=st.sampled_from(["greedy", "ffd", "bfd"]),
    cp=st.sampled_from([1, 2, 4]),
    overlong=st.sampled_from(["drop", "truncate", "split"]),
    order=st.sampled_from(["input", "shuffle"]),
    max_docs=st.sampled_from([None, 1, 3]),
    seed=st.integers(0, 5),
)
def test_every_token_lies_in_one_slot(lengths, algo, cp, overlong, order, max_docs, seed):
    capacity = 32
    rows = np.arange(len(lengths), dtype=np.int64) * 3 + 1
    options = PackOptions(capacity, algo, cp, order=order, overlong=overlong, max_docs=max_docs, seed=seed)
    plan = make_plan(lengths, rows, options)

    sizes = np.diff(plan.offsets)
    assert plan.offsets[0] == 0
    assert plan.offsets[-1] == len(plan.doc) == len(plan.start) == len(plan.length)
    assert (sizes >= 1).all()
    assert max_docs is None or (sizes <= max_docs).all()
    aligned = -(-plan.length // options.align) * options.align
    if plan.num_packs:
        assert np.add.reduceat(aligned, plan.offsets[:-1]).max() <= capacity
    assert plan.lower_bound <= plan.num_packs

    covered = {}
    for doc, start, length in zip(plan.doc.tolist(), plan.start.tolist(), plan.length.tolist(), strict=True):
        tokens = covered.setdefault(doc, set())
        piece = set(range(start, start + length))
        assert not tokens & piece
        tokens |= piece
    expected = {}
    for row, length in zip(rows.tolist(), lengths.tolist(), strict=True):
        if length <= capacity or overlong == "split":
            expected[row] = set(range(length))
        elif overlong == "truncate":
            expected[row] = set(range(capacity))
    assert covered == expected
    long = set(rows[lengths > capacity].tolist())
    stated = {"drop": plan.dropped, "truncate": plan.truncated, "split": plan.split}
    assert {name: set(found.tolist()) for name, found in stated.items()} == {
        name: (long if name == overlong else set()) for name in stated
    }


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, order=st.sampled_from(["input", "shuffle"]))
def test_a_stream_is_cut_at_every_capacity(lengths, order):
    plan = make_plan(lengths, np.arange(len(lengths)), PackOptions(32, "split", order=order))
    sizes = np.add.reduceat(plan.length, plan.offsets[:-1])
    assert plan.num_packs == plan.lower_bound == -(-int(lengths.sum()) // 32)
    assert (np.sort(sizes)[1:] == 32).all()
    seen = {(d, t) for d, s, n in zip(plan.doc, plan.start, plan.length, strict=True) for t in range(s, s + n)}
    assert len(seen) == plan.length.sum() == lengths.sum()
    assert seen == {(d, t) for d, n in enumerate(lengths) for t in range(n)}


def test_input_order_follows_the_first_documents():
    plan = make_plan(np.array([9, 9, 9, 1, 9, 1], np.int32), np.arange(6), PackOptions(10, "ffd", order="input"))
    packs = [plan.doc[a:b].tolist() for a, b in zip(plan.offsets[:-1], plan.offsets[1:], strict=True)]
    assert packs == [[0, 3], [1, 5], [2], [4]]


def test_the_seed_decides_the_shuffled_order_only():
    lengths = np.arange(1, 31, dtype=np.int32)
    plans = [make_plan(lengths, np.arange(30), PackOptions(40, "ffd", seed=seed)) for seed in (0, 0, 1)]
    packs = [[tuple(p.doc[a:b].tolist()) for a, b in zip(p.offsets[:-1], p.offsets[1:], strict=True)] for p in plans]
    assert packs[0] == packs[1] != packs[2]
    assert sorted(packs[0]) == sorted(packs[2])


def test_overlong_is_an_error_that_names_the_ways_out():
    with pytest.raises(ValueError, match=r"1 of 2 documents are longer than --seq-len 8 .*99.*--overlong drop"):
        make_plan(np.array([3, 99], np.int32), np.arange(2), PackOptions(8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (PackOptions(1022, cp=2), r"--seq-len 1022 is not a multiple of 2·cp = 4; take 1020 or 1024"),
        (PackOptions(3, cp=2), r"take 4, or another --cp"),
        (PackOptions(0), "--seq-len 0 is not between"),
        (PackOptions(1 << 25), "is not between"),
        (PackOptions(1024, cp=0), "--cp 0 is none of 1, 2, 4, … 64"),
        (PackOptions(1024, "nonsense"), "--algo nonsense is none of .*greedy.*split"),
        (PackOptions(1024, "split", max_docs=2), "--algo split .* leave out --max-docs"),
        (PackOptions(1024, order="up"), "--order up is none of"),
        (PackOptions(1024, cp=3), "--cp 3 is none of"),
        (PackOptions(1024, cp=128), "--cp 128 is none of"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        options.check()


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, cp=st.sampled_from([2, 4]))
def test_an_aligned_stream_fills_every_pack_with_whole_slots(lengths, cp):
    options = PackOptions(32, "split", cp=cp)
    plan = make_plan(lengths, np.arange(len(lengths)), options)
    slots = -(-plan.length // options.align) * options.align
    sizes = np.add.reduceat(slots, plan.offsets[:-1])
    assert plan.num_packs == plan.lower_bound == -(-int(slots.sum()) // 32)
    assert (np.sort(sizes)[1:] == 32).all()
    assert plan.length.sum() == lengths.sum()


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, algo=st.sampled_from(["greedy", "bfd", "split"]), cp=st.sampled_from([1, 4]))
def test_drop_last_leaves_out_the_emptiest_pack_and_nothing_else(lengths, algo, cp):
    overlong = "error" if algo == "split" else "split"
    options = PackOptions(32, algo, cp=cp, order="input", overlong=overlong)
    whole = make_plan(lengths, np.arange(len(lengths)), options)
    plan = make_plan(lengths, np.arange(len(lengths)), replace(options, drop_last=True))
    packs, kept = (
        [tuple(zip(p.doc[a:b], p.start[a:b], p.length[a:b], strict=True)) for a, b in pairwise(p.offsets)]
        for p in (whole, plan)
    )
    room = [sum(-(-n // options.align) * options.align for _, _, n in pack) for pack in packs]
    if len(packs) == 1 or min(room) == 32:
        assert kept == packs
        assert len(plan.last_pack) == 0
        return
    left_out = set(packs) - set(kept)
    assert len(kept) == len(packs) - 1
    assert len(left_out) == 1
    (pack,) = left_out
    assert room[packs.index(pack)] == min(room)
    assert plan.last_pack.tolist() == sorted({doc for doc, _, _ in pack})
    assert plan.lower_bound <= plan.num_packs


def test_cost_order_puts_packs_of_like_cost_in_blocks():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(4, 1.5, 20000), 1, 4096).astype(np.int32)
    plan = make_plan(lengths, np.arange(len(lengths)), PackOptions(4096))
    shuffled = make_plan(lengths, np.arange(len(lengths)), PackOptions(4096, order="shuffle"))
    cost = [np.add.reduceat(p.length.astype(np.int64) ** 2, p.offsets[:-1]) for p in (plan, shuffled)]
    assert sorted(cost[0].tolist()) == sorted(cost[1].tolist())
    assert plan.block == min(64, plan.num_packs // 16)
    spread = [np.ptp(c[: len(c) // plan.block * plan.block].reshape(-1, plan.block), axis=1).mean() for c in cost]
    assert spread[0] < spread[1] / 3


@pytest.mark.parametrize("algo", ["bfd", "split"])
def test_drop_last_leaves_a_full_pack(algo):
    plan = make_plan(np.full(3, 8, np.int32), np.arange(3), PackOptions(8, algo, drop_last=True))
    assert (plan.num_packs, plan.lower_bound, plan.last_pack.tolist()) == (3, 3, [])


def test_drop_last_takes_the_last_of_equally_empty_packs():
    lengths = np.array([5, 6, 5, 7], np.int32)
    plan = make_plan(lengths, np.arange(4), PackOptions(8, "greedy", order="input", drop_last=True))
    assert (plan.last_pack.tolist(), plan.doc.tolist()) == ([2], [0, 1, 3])
