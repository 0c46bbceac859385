"""Ring attention for packed documents: keys come step by step, softmaxes are merged by their log-sum-exp.

A rank attends to its own keys, then to those of the rank one place before it, two places, … (arXiv 2310.01889). Only
one rank's keys are held beside its own, where gathering holds those of the whole row. What differs from the usual ring:

- The row is cut *mixed* (`train.pieces`): long documents zigzag, the others whole where they fit.
- Keys go from the rank that holds them straight to the one that needs them, not from neighbour to neighbour, so that
  a rank receives what its documents need and no more, and steps that no rank needs are left out. All sizes are known
  on the host.
- The next step's keys travel while this one's are computed.
- A layer with a window has few keys: it fetches them at once (`Halo`) and makes one call, without merging.

The log-sum-exp of a kernel has no gradient, and needs none: with the output and log-sum-exp of the *whole* softmax, a
kernel's backward over one block of keys gives that block's exact part of the gradients. Backward fetches the keys again
and sends their gradients back to where they lie, where they are summed in at least float32.

Shapes: T tokens of a rank, U keys of a step, N query heads, K key/value heads, H head dimension, C ranks.
"""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from train.attention.choose import BACKENDS
from train.attention.interface import Backend, Segments, join_sinks, merge_keys, sinks_gradient
from train.parallel.exchange import AllToAll, Exchange, part_of
from train.pieces import Pieces, block, halo

ROWS_IN_FLIGHT = 32
"""Rows whose exchanges are remembered, for all layers and for backward; a pipeline has several rows under way."""


class RingAttention(Exchange):
    def forward(
        self, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, segments: Segments, sinks_N: Tensor | None = None
    ) -> Tensor:
        pieces, core = part_of(segments).pieces, self.core
        if core.window is None:
            steps = ring_steps(pieces, self.rank, q_TNH.device)
            kernel = _Kernel(BACKENDS[core.backend], segments, core.scale, core.softcap)
            return _Ring.apply(q_TNH, k_TKH, v_TKH, sinks_N, steps, kernel, self.group)
        needed = window_step(pieces, self.rank, core.window, q_TNH.device)
        kv = torch.stack((k_TKH, v_TKH), dim=1).index_select(0, needed.send_rows)
        kv = AllToAll.apply(kv, needed.send_counts, needed.receive_counts, self.group)
        return self.core(q_TNH, *kv.index_select(0, needed.order).unbind(1), needed.queries, needed.keys, sinks_N)


@dataclass(frozen=True)
class Step:
    """One exchange of keys and what this rank computes with those it receives: `send_rows` of its tokens go to other
    ranks (`send_counts[d]` to rank d), `receive_counts[j]` come from rank j; the queries `q_rows` see them."""

    send_rows: Tensor
    send_counts: list[int]
    receive_counts: list[int]
    q_rows: Tensor
    queries: Segments
    keys: Segments


@functools.lru_cache(maxsize=ROWS_IN_FLIGHT)
def ring_steps(pieces: Pieces, rank: int, device: torch.device) -> list[Step]:
    """The steps of `rank` that any rank needs, the same number on all of them."""
    steps, size = [], pieces.size
    for distance in range(1, size):
        blocks = [block(pieces, r, (r - distance) % size) for r in range(size)]
        if not any(len(b.q_rows) for b in blocks):
            continue
        before, after = (rank - distance) % size, (rank + distance) % size
        mine, sent = blocks[rank], blocks[after].k_rows
        send_counts, receive_counts = [0] * size, [0] * size
        send_counts[after], receive_counts[before] = len(sent), len(mine.k_rows)
        send_rows, q_rows = _on(device, sent), _on(device, mine.q_rows)
        layout = _segments(mine.cu_seqlens_q, device), _segments(mine.cu_seqlens_k, device)
        steps.append(Step(send_rows, send_counts, receive_counts, q_rows, *layout))
    return steps


@dataclass(frozen=True)
class WindowStep:
    """The one exchange of a layer with a window, see `train.pieces.Halo`."""

    send_rows: Tensor
    send_counts: list[int]
    receive_counts: list[int]
    order: Tensor
    queries: Segments
    keys: Segments


@functools.lru_cache(maxsize=ROWS_IN_FLIGHT)
def window_step(pieces: Pieces, rank: int, window: int, device: torch.device) -> WindowStep:
    """What `rank` sends and receives in a layer of this window."""
    needed = halo(pieces, rank, window)
    send_rows, order = _on(device, needed.send_rows), _on(device, needed.order)
    layout = _segments(needed.cu_seqlens_q, device), _segments(needed.cu_seqlens_k, device)
    return WindowStep(send_rows, needed.send_counts, needed.receive_counts, order, *layout)


def _segments(cu_seqlens: np.ndarray, device: torch.device) -> Segments:
    return Segments(_on(device, cu_seqlens), int(np.diff(cu_seqlens).max(initial=0)))


def _on(device: torch.device, numbers: np.ndarray) -> Tensor:
    """A copy in flight on a GPU, from pinned memory: one from any other memory waits for all that was launched."""
    tensor = torch.from_numpy(numbers)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


@dataclass(frozen=True)
class _Kernel:
    """A backend's kernel over the rank's own keys (`step` None: causal) or those of a step (all visible)."""

    backend: Backend
    segments: Segments
    scale: float
    softcap: float | None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, step: Step | None = None) -> tuple[Tensor, Tensor]:
        return self.backend.forward(q, k, v, *self._options(step), causal=step is None)

    def backward(self, *tensors: Tensor, step: Step | None = None) -> tuple[Tensor, Tensor, Tensor]:
        return self.backend.backward(*tensors, *self._options(step), causal=step is None)

    def _options(self, step: Step | None) -> tuple:
        queries, keys = (self.segments, self.segments) if step is None else (step.queries, step.keys)
        layout = queries.cu_seqlens, keys.cu_seqlens, queries.max_seqlen, keys.max_seqlen
        return *layout, self.scale, None, self.softcap


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_TNH: Tensor,
        k_TKH: Tensor,
        v_TKH: Tensor,
        sinks_N: Tensor | None,
        steps: list[Step],
        kernel: _Kernel,
        group: dist.ProcessGroup,
    ) -> Tensor:
        kv = torch.stack((k_TKH, v_TKH), dim=1)  # [T, 2, K, H]
        arriving = _send_keys(kv, steps, 0, group)
        out_TNH, lse_NT = kernel.forward(q_TNH, k_TKH, v_TKH)
        dtype, out_TNH = out_TNH.dtype, out_TNH.to(lse_NT.dtype)
        for i, step in enumerate(steps):
            keys = _arrived(arriving)
            arriving = _send_keys(kv, steps, i + 1, group)
            if len(step.q_rows):
                merge_keys(out_TNH, lse_NT, step.q_rows, *kernel.forward(q_TNH[step.q_rows], *keys.unbind(1), step))
        if sinks_N is not None:
            out_TNH, lse_NT = join_sinks(out_TNH, lse_NT, sinks_N)
        out_TNH = out_TNH.to(dtype)
        ctx.save_for_backward(q_TNH, k_TKH, v_TKH, sinks_N, out_TNH, lse_NT)
        ctx.steps, ctx.kernel, ctx.group = steps, kernel, group
        return out_TNH

    @staticmethod
    def backward(ctx: Any, grad_out_TNH: Tensor) -> tuple[Tensor | None, ...]:
        q_TNH, k_TKH, v_TKH, sinks_N, out_TNH, lse_NT = ctx.saved_tensors
        steps, kernel, group = ctx.steps, ctx.kernel, ctx.group
        kv = torch.stack((k_TKH, v_TKH), dim=1)
        arriving = _send_keys(kv, steps, 0, group)
        grad_out_TNH = grad_out_TNH.contiguous()
        grad_q, *grad_kv = kernel.backward(grad_out_TNH, q_TNH, k_TKH, v_TKH, out_TNH, lse_NT)
        grad_q, grad_kv = grad_q.to(lse_NT.dtype), torch.stack(grad_kv, dim=1).to(lse_NT.dtype)
        returning = None
        for i, step in enumerate(steps):
            keys = _arrived(arriving)
            arriving = _send_keys(kv, steps, i + 1, group)
            grad_keys, rows = torch.zeros_like(keys), step.q_rows
            if len(rows):
                of_block = [x[rows] for x in (grad_out_TNH, q_TNH)], [out_TNH[rows], lse_NT[:, rows]]
                grads = kernel.backward(*of_block[0], *keys.unbind(1), *of_block[1], step=step)
                grad_q.index_add_(0, rows, grads[0].to(grad_q.dtype))
                grad_keys = torch.stack(grads[1:], dim=1)
            if returning is not None:
                grad_kv.index_add_(0, steps[i - 1].send_rows, _arrived(returning).to(grad_kv.dtype))
            returning = _start(grad_keys, step.receive_counts, step.send_counts, group)
        if returning is not None:
            grad_kv.index_add_(0, steps[-1].send_rows, _arrived(returning).to(grad_kv.dtype))
        grad_sinks = None if sinks_N is None else sinks_gradient(grad_out_TNH, out_TNH, lse_NT, sinks_N)
        grad_k, grad_v = grad_kv.to(k_TKH.dtype).unbind(1)
        return grad_q.to(q_TNH.dtype), grad_k, grad_v, grad_sinks, None, None, None


_Flight = tuple[Tensor, Tensor, dist.Work]


def _send_keys(kv: Tensor, steps: list[Step], i: int, group: dist.ProcessGroup) -> _Flight | None:
    if i == len(steps):
        return None
    return _start(kv[steps[i].send_rows], steps[i].send_counts, steps[i].receive_counts, group)


def _start(rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> _Flight:
    rows, received = rows.contiguous(), rows.new_empty((sum(receive), *rows.shape[1:]))
    return received, rows, dist.all_to_all_single(received, rows, receive, send, group=group, async_op=True)


def _arrived(flight: _Flight) -> Tensor:
    received, _, work = flight  # what is sent must live until it has left
    work.wait()
    return received
