"""The second form of `bench_cp.py`: our context parallelism and axolotl-ringmaster's on the same packed row and ranks.

Its kernels on CPU compute every block densely under a document mask, so its times say little about GPUs, where plain
ring and Ulysses call flash-attn by documents; correctness and bytes do not depend on the kernel. On gloo it emulates
all-to-all by gathering everything, and sums gradients of gathered keys by all-reduce where NCCL would reduce-scatter.
"""

import importlib.metadata
import statistics
import sys
import tempfile
import time
import types

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing

import train.parallel.exchange as exchange
from formats.layout import cu_seqlens
from train.attention import cpu
from train.attention.interface import Part, Segments
from train.cut import Cut
from train.model.decoder import AttentionCore
from train.parallel.cp import GatherAttention, NeededAttention, UlyssesAttention
from train.parallel.ring import RingAttention

TOKENS, HEADS, KV_HEADS, HEAD_DIM, SCALE = 4096, 8, 4, 64, 0.125
ROUNDS = 5
OURS = {
    "gather, zigzag": (GatherAttention, "zigzag"),
    "needed": (NeededAttention, "contiguous"),
    "ring": (RingAttention, "mixed"),
    "ulysses": (UlyssesAttention, "contiguous"),
}
KINDS = {"chats": (4.8, 0.9), "one long text": None}  # a sixth of a part each; one document over the row


def compare(peer: str, ranks: int) -> dict:
    """Run both sides on `ranks` gloo processes; the table is printed and returned."""
    sys.path.append(peer)
    found = next(d for d in importlib.metadata.distributions(path=[peer]) if d.name == "axolotl-ringmaster")
    with tempfile.TemporaryDirectory() as folder:
        queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
        torch.multiprocessing.spawn(_rank, (ranks, folder, peer, queue), nprocs=ranks)
        rows = queue.get()
    print(f"{ranks} gloo ranks, row of {TOKENS:,} tokens, {HEADS}/{KV_HEADS} heads of {HEAD_DIM}, float32, one layer\n")
    print(f"{'packs':<15}{'':<26}{'error':>9}{'MB forward':>12}{'MB in all':>11}{'ms':>8}")
    for row in rows:
        print(
            f"{row['packs']:<15}{row['side'] + ' ' + row['method']:<26}{row['error']:>9.0e}"
            f"{row['forward_bytes'] / 1e6:>12.2f}{row['bytes'] / 1e6:>11.2f}{row['seconds'] * 1e3:>8.0f}"
        )
    return {"peer": f"{found.name} {found.version}", "ranks": ranks, "tokens": TOKENS, "rows": rows}


def _rank(rank: int, size: int, folder: str, peer: str, queue) -> None:
    sys.path.append(peer)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    rows = []
    for kind in KINDS:
        ends = _documents(kind, size)
        generator = torch.Generator().manual_seed(0)
        shapes = (HEADS, KV_HEADS, KV_HEADS, HEADS)
        *qkv, upstream = (torch.randn(TOKENS, heads, HEAD_DIM, generator=generator) for heads in shapes)
        wanted = _alone(qkv, upstream, ends)
        methods = [("meshpack", name, _ours(*how, ends, rank, size)) for name, how in OURS.items()]
        methods += [("ringmaster", name, how) for name, how in _peers(ends, rank, size).items()]
        for side, name, (held, attend) in methods:
            row = _measure(attend, [x[held] for x in qkv], upstream[held], [x[held] for x in wanted])
            rows.append({"packs": kind, "side": side, "method": name, **row})
    if rank == 0:
        queue.put(rows)
    dist.barrier()
    dist.destroy_process_group()


def _documents(kind: str, size: int) -> torch.Tensor:
    """`cu_seqlens` of a row whose slots are multiples of 2 · size."""
    if KINDS[kind] is None:
        return torch.tensor([0, TOKENS], dtype=torch.int32)
    rng, lengths = np.random.default_rng(0), []
    while sum(lengths) < TOKENS:
        slot = -(-int(rng.lognormal(*KINDS[kind])) // (2 * size)) * 2 * size
        lengths.append(min(max(slot, 2 * size), TOKENS - sum(lengths)))
    return torch.from_numpy(cu_seqlens(np.array(lengths)))


def _alone(qkv, upstream, ends):
    """Output and gradients of each document alone, in float64."""
    q, k, v, upstream = (x.double() for x in (*qkv, upstream))
    results = []
    for start, stop in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        own, one = slice(start, stop), torch.tensor([0, stop - start], dtype=torch.int32)
        options = one, one, stop - start, stop - start, SCALE, None, None
        out, lse = cpu.forward(q[own], k[own], v[own], *options)
        results.append((out, *cpu.backward(upstream[own], q[own], k[own], v[own], out, lse, *options)))
    return [torch.cat(parts) for parts in zip(*results, strict=True)]


def _ours(method, kind, ends, rank, size):
    row = {"input_ids": torch.arange(TOKENS, dtype=torch.int32), "cu_seqlens": ends}
    row |= {"labels": torch.arange(TOKENS), "position_ids": torch.arange(TOKENS, dtype=torch.int32)}
    cut = Cut(size, rank, kind)
    part = cut.buffers(row, pinned=False)
    facts = cut.fill(*({name: x.numpy() for name, x in tensors.items()} for tensors in (row, part)))
    keys = {name: part.get(name) for name in ("cu_seqlens_k", "key_rows")}
    whole = int(ends.diff().max())
    segments = Segments(part["cu_seqlens"], whole, Part(part["row_cu_seqlens"], whole, **keys, **facts))
    config = types.SimpleNamespace(attention_scale=SCALE, attention_softcap=None)
    core = AttentionCore(config, types.SimpleNamespace(window=None), "cpu")
    module = method(core, dist.group.WORLD, rank, size)
    return part["input_ids"].long(), lambda q, k, v: module(q, k, v, segments)


def _peers(ends, rank, size):
    """Its four ways over a packed row, as its attention functions call them."""
    from ringmaster.comm import seq_all_to_all
    from ringmaster.ring.distflash import distflash_attention
    from ringmaster.ring.loop import varlen_ring_attention
    from ringmaster.ring.zigzag import zigzag_ring_attention
    from ringmaster.strategies.ulysses import _ulysses_varlen

    group, part, half = dist.group.WORLD, TOKENS // size, TOKENS // size // 2
    contiguous = torch.arange(rank * part, (rank + 1) * part)
    chunks = [torch.arange(c * half, (c + 1) * half) for c in (rank, 2 * size - 1 - rank)]
    options = {"group": group, "scaling": SCALE, "cu_seqlens": ends}

    def heads_first(function):
        return lambda *qkv: function(*(x.transpose(0, 1)[None] for x in qkv))[0]

    def ulysses(q, k, v):
        q, k, v = (seq_all_to_all(x, scatter_dim=1, gather_dim=2, group=group) for x in (q, k, v))
        out = _ulysses_varlen(q, k, v, (ends, int(ends.diff().max())), 0.0, SCALE, True, "sdpa")
        return seq_all_to_all(out.contiguous(), scatter_dim=1, gather_dim=2, group=group)

    return {
        "ring": (contiguous, heads_first(lambda *qkv: varlen_ring_attention(*qkv, **options))),
        "ring, zigzag": (torch.cat(chunks), heads_first(lambda *qkv: zigzag_ring_attention(*qkv, **options))),
        "ring, distflash": (
            contiguous,
            heads_first(lambda *qkv: distflash_attention(*qkv, attn_implementation="math", **options)),
        ),
        "ulysses": (contiguous, heads_first(ulysses)),
    }


def _measure(attend, qkv, upstream, wanted):
    seconds = []
    for turn in range(ROUNDS + 1):
        leaves = [x.clone().requires_grad_() for x in qkv]
        dist.barrier()
        began = time.perf_counter()
        with _Counting() as count:
            out = attend(*leaves)
            forward = count.received
            out.backward(upstream)
        dist.barrier()
        if turn:  # the first warms up
            seconds.append(time.perf_counter() - began)
    squares = [((got.double() - one).square().sum(), one.square().sum()) for got, one in zip(
        (out.detach(), *(x.grad for x in leaves)), wanted, strict=True
    )]  # fmt: skip
    totals = torch.tensor([*(value for pair in squares for value in pair), forward, count.received]).double()
    dist.all_reduce(totals)
    errors = (totals[:-2:2] / totals[1:-2:2]).sqrt()
    return {
        "error": errors.max().item(),
        "forward_bytes": int(totals[-2].item()) // dist.get_world_size(),
        "bytes": int(totals[-1].item()) // dist.get_world_size(),
        "seconds": statistics.median(seconds),
    }


class _Counting:
    """Bytes that this rank receives from others through torch.distributed while the block runs."""

    def __enter__(self):
        self.received, self._before = 0, []
        others = (dist.get_world_size() - 1) / dist.get_world_size()

        def size(x):
            return x.numel() * x.element_size()

        def sizes(tensors):
            return sum(map(size, tensors))

        counted = {
            (dist, "all_gather"): lambda out, x: sizes(out) * others,
            (dist, "all_reduce"): lambda x: 2 * size(x) * others,
            (dist, "all_to_all_single"): lambda out, x, receive, send: size(out) - self._own(out, receive),
            (dist, "batch_isend_irecv"): lambda ops: sizes(op.tensor for op in ops if op.op is dist.irecv),
            (exchange, "_all_gather"): lambda out, x: size(out) * others,
            (exchange, "_reduce_scatter"): lambda out, x: size(x) * others,
        }
        for (module, name), measure in counted.items():
            self._wrap(module, name, measure)
        return self

    def _own(self, out, receive):
        rows = max(1, sum(receive))
        return out.numel() * out.element_size() * receive[dist.get_rank()] // rows

    def _wrap(self, module, name, measure):
        original = getattr(module, name)
        self._before.append((module, name, original))

        def counting(*args, **options):
            self.received += int(measure(*args))
            return original(*args, **options)

        setattr(module, name, counting)

    def __exit__(self, *error):
        for module, name, original in self._before:
            setattr(module, name, original)
