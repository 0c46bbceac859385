"""One attention layer over context-parallel ranks against the whole row on one: every method × backend × feature
(grouped heads, window, softcap, sinks), and the leak probe for each: a changed document moves nothing outside."""

import types

import fake_kernels
import numpy as np
import pytest
import torch
import torch.distributed as dist
from reference import distance

from formats.layout import cu_seqlens
from ranks import run_ranks
from train.attention.choose import varlen_attention
from train.attention.interface import Part, Segments
from train.cut import Cut
from train.model.decoder import AttentionCore
from train.parallel.cp import GatherAttention, NeededAttention, TransformerEngineRing, UlyssesAttention
from train.parallel.ring import RingAttention

METHODS = {
    "gather": (GatherAttention, "contiguous"),
    "gather zigzag": (GatherAttention, "zigzag"),
    "needed": (NeededAttention, "contiguous"),
    "ring": (RingAttention, "mixed"),
    "ulysses": (UlyssesAttention, "contiguous"),
    "ring of te": (TransformerEngineRing, "zigzag"),
}
FEATURES = {  # window, softcap, sinks
    "plain": (None, None, False),
    "window": (9, None, False),
    "softcap": (None, 2.0, False),
    "sinks": (None, None, True),
    "window, softcap, sinks": (30, 2.0, True),
}
HEADS = {"grouped": (12, 6), "one key head": (12, 1), "no groups": (6, 6)}
SCALE = 0.4


def cases(world, flash_versions=(2,)):
    """(method, backend, feature, heads) of everything that is not refused."""
    for method in METHODS:
        for backend in ("cpu", "te", *(f"flash {number}" for number in flash_versions)):
            if (method == "ring of te") != (backend == "te" and method.startswith("ring")):
                continue  # each has the ring of its own
            for feature, (window, softcap, sinks) in FEATURES.items():
                if backend == "te" and (softcap or sinks or (window and method == "ring of te")):
                    continue  # refused: tests/train/attention/test_packages.py and below
                for shape, (heads, kv_heads) in HEADS.items():
                    if method == "ulysses" and (heads % world or (kv_heads % world and world % kv_heads)):
                        continue  # refused: tests/train/parallel/test_cp.py
                    yield method, backend, feature, shape


def row_lengths(kind, size):
    """Documents of a row of 64 tokens a rank; of more than 16, if aligned, a ring cuts each over all ranks."""
    if kind != "contiguous":
        return [2 * size * chunks for chunks in (3, 1, 9, 1, 2, 5, 1, 10)]
    ends = np.random.default_rng(size).choice(np.arange(1, 64 * size), 9, replace=False)
    return np.diff([0, *sorted(ends.tolist()), 64 * size]).tolist()


def run(world, wanted):
    """This rank's results of all cases: (case, largest distance of output and gradients, what leaked)."""
    fake_kernels.install()
    rank, results = dist.get_rank(), []
    for method, backend, feature, shape in wanted:
        backend, _, version = backend.partition(" ")
        if version:
            fake_kernels.install(int(version))
        module, kind = METHODS[method]
        (window, softcap, with_sinks), (heads, kv_heads) = FEATURES[feature], HEADS[shape]
        lengths = row_lengths(kind, world)
        held, segments = part_of_rank(Cut(world, rank, kind), lengths)
        config = types.SimpleNamespace(attention_scale=SCALE, attention_softcap=softcap)
        core = AttentionCore(config, types.SimpleNamespace(window=window), backend)
        attend = module(core, dist.group.WORLD, rank, world)
        generator = torch.Generator().manual_seed(0)
        qkv = [
            torch.randn(sum(lengths), n, 8, generator=generator, dtype=torch.float64)
            for n in (heads, kv_heads, kv_heads)
        ]
        sinks = torch.linspace(-1.0, 2.0, heads, dtype=torch.float64) if with_sinks else None
        upstream = torch.randn(qkv[0].shape, generator=generator, dtype=torch.float64)

        def on_ranks(qkv, upstream, attend=attend, segments=segments, sinks=sinks, held=held):
            leaves = [x[held].requires_grad_() for x in qkv]
            given = None if sinks is None else sinks.clone().requires_grad_()
            out = attend(*leaves, segments, sinks_N=given)
            out.backward(upstream[held])
            if given is not None:
                dist.all_reduce(given.grad)
            return [out.detach(), *(x.grad for x in leaves)] + ([] if given is None else [given.grad])

        leaves = [x.clone().requires_grad_() for x in (*qkv, *[sinks] * with_sinks)]
        options = {"backend": "cpu", "scale": SCALE, "window": window, "softcap": softcap}
        out = varlen_attention(*leaves[:3], Segments.of(lengths), **options, sinks=leaves[3] if with_sinks else None)
        out.backward(upstream)
        expected = [x[held] for x in (out.detach(), *(leaf.grad for leaf in leaves[:3]))]
        expected += [leaf.grad for leaf in leaves[3:]]
        error = max(distance(a, b) for a, b in zip(on_ranks(qkv, upstream), expected, strict=True))

        # The probe: the loss of all documents but one, which is then changed; and the outputs of the others.
        changed = max(range(len(lengths)), key=lengths.__getitem__)
        start = sum(lengths[:changed])
        token = start + lengths[changed] // 2
        own = torch.zeros(sum(lengths), dtype=torch.bool)
        own[start : start + lengths[changed]] = True
        others = upstream.masked_fill(own[:, None, None], 0.0)
        other_qkv = [x.clone() for x in qkv]
        for x in other_qkv:
            x[token] += 1
        before, after = on_ranks(qkv, others), on_ranks(other_qkv, others)
        leaks = [bool((a != b).flatten(1).any(1)[~own[held]].any()) for a, b in zip(before[:4], after[:4], strict=True)]
        leaks += [bool(grad[own[held]].any()) for grad in before[1:4]]  # nobody's loss but its own reaches it
        leaks += [not torch.equal(a, b) for a, b in zip(before[4:], after[4:], strict=True)]
        moved = bool((before[0] != after[0]).any())
        results.append(((method, backend, version, feature, shape), error, any(leaks), moved, own[held].any().item()))
    return results


def part_of_rank(cut, lengths):
    """(positions of the row that the rank holds, its segments), cut by the code that cuts for training."""
    tokens = sum(lengths)
    row = {
        "input_ids": torch.arange(tokens, dtype=torch.int32),
        "labels": torch.arange(tokens),
        "position_ids": torch.arange(tokens, dtype=torch.int32),
        "cu_seqlens": torch.tensor([*cu_seqlens(np.array(lengths)), tokens], dtype=torch.int32),  # padded by one
    }
    part = cut.buffers(row, pinned=False)
    facts = cut.fill(*({name: x.numpy() for name, x in tensors.items()} for tensors in (row, part)))
    keys = {name: part.get(name) for name in ("cu_seqlens_k", "key_rows")}
    longest = max(lengths)
    of_row = Part(part["row_cu_seqlens"], longest, **keys, **facts)
    return part["input_ids"].long(), Segments(part["cu_seqlens"], longest, of_row)


def check(world, wanted):
    results = run_ranks(run, world, world, wanted, timeout=280)
    for of_ranks in zip(*results, strict=True):
        assert any(moved for *_, moved, _ in of_ranks), f"the probe moved nothing: {of_ranks[0][0]}"
        for case, error, leaked, _, _ in of_ranks:
            assert error <= 1e-12, (case, error)
            assert not leaked, case


@pytest.mark.parametrize("world", [2, 4])
def test_every_method_backend_and_feature_equals_one_rank_and_leaks_nothing(world):
    """Every second combination of the product, which `slow` runs whole."""
    check(world, list(cases(world))[world // 4 :: 2])


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3, 4])
def test_the_whole_product(world):
    check(world, list(cases(world, flash_versions=(2, 3, 4))))
