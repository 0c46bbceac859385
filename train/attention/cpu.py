"""Attention on CPU: a loop over the documents.

Ten times faster than one call with a dense mask over the pack, since nothing outside a document is ever computed. A
plain causal document goes to torch's CPU flash kernel, which groups query heads itself and also runs in float64. Its
`is_causal` is aligned top-left, so a document with more keys than queries (its start lies on another rank) goes there
in two calls, the keys before all queries and the square, merged by their log-sum-exp: two to four times as fast as
products of matrices. These, block by block, are left to a window and a softcap: the kernel knows no softcap, and a mask
would cost the whole square where a window needs a band.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from train.attention.interface import Backend, as_op, merge_keys

BLOCK = 512  # query rows a step of the matrix-product path: scores of N·512·(512 + window) stay in the caches

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def forward(
    q_TNH: Tensor,
    k_UKH: Tensor,
    v_UKH: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    """See `train.attention.interface.Backend`. Rows that belong to no document are 0, with log-sum-exp −inf."""
    accumulate = torch.promote_types(q_TNH.dtype, torch.float32)
    out_TNH = torch.zeros_like(q_TNH, memory_format=torch.contiguous_format)
    lse_NT = q_TNH.new_full((q_TNH.shape[1], q_TNH.shape[0]), -torch.inf, dtype=accumulate)
    for queries, keys in _documents(cu_seqlens_q, cu_seqlens_k):
        if window is None and softcap is None:
            for call, (rows, columns, is_square) in enumerate(_calls(queries, keys, causal)):
                q, k, v = (_batched(x) for x in (q_TNH[rows], k_UKH[columns], v_UKH[columns]))
                out, lse = _flash(q, k, v, 0.0, is_square, scale=scale)
                if call == 0:
                    out_TNH[rows], lse_NT[:, rows] = out[0].transpose(0, 1), lse[0]
                else:
                    merge_keys(out_TNH, lse_NT, rows, out[0].transpose(0, 1), lse[0])
            continue
        for rows, columns, visible in _blocks(queries, keys, window, causal):
            scores = _scores(q_TNH[rows], k_UKH[columns], scale, softcap)[0].masked_fill_(~visible, -torch.inf)
            lse = scores.logsumexp(-1)
            # a query without any visible key: exp(−inf − 0) = 0 instead of exp(−inf + inf) = nan
            weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
            out_TNH[rows] = _merge_heads(weights @ _per_group(v_UKH[columns]).to(accumulate)).to(out_TNH.dtype)
            lse_NT[:, rows] = lse.flatten(0, 1)
    return out_TNH, lse_NT


def backward(
    grad_out_TNH: Tensor,
    q_TNH: Tensor,
    k_UKH: Tensor,
    v_UKH: Tensor,
    out_TNH: Tensor,
    lse_NT: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    causal: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from the saved output and log-sum-exp (the recomputation of FlashAttention-2)."""
    accumulate = lse_NT.dtype
    grad_q, grad_k, grad_v = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q_TNH, k_UKH, v_UKH))
    for queries, keys in _documents(cu_seqlens_q, cu_seqlens_k):
        if window is None and softcap is None:
            for rows, columns, is_square in _calls(queries, keys, causal):
                grad_out, q, out = (_batched(x[rows]) for x in (grad_out_TNH, q_TNH, out_TNH))
                k, v = _batched(k_UKH[columns]), _batched(v_UKH[columns])
                lse = lse_NT[:, rows].t().contiguous().t()[None]  # the layout in which the kernel returns it
                grads = _flash_backward(grad_out, q, k, v, out, lse, 0.0, is_square, scale=scale)
                for target, part, grad in zip((grad_q, grad_k, grad_v), (rows, columns, columns), grads, strict=True):
                    target[part] += grad[0].transpose(0, 1)
            continue
        for rows, columns, visible in _blocks(queries, keys, window, causal):
            scores, slope = _scores(q_TNH[rows], k_UKH[columns], scale, softcap)
            kv_heads = k_UKH.shape[1]
            lse = lse_NT[:, rows].unflatten(0, (kv_heads, -1))
            lse = lse.masked_fill(lse == -torch.inf, torch.inf)[..., None]  # no visible key: weights 0
            weights = torch.exp(scores - lse).masked_fill_(~visible, 0.0)
            grad_out, out, q = (_split_heads(x[rows], kv_heads).to(accumulate) for x in (grad_out_TNH, out_TNH, q_TNH))
            k, v = (_per_group(x[columns]).to(accumulate) for x in (k_UKH, v_UKH))
            grad_scores = weights * (grad_out @ v.mT - (grad_out * out).sum(-1, keepdim=True)) * scale
            if slope is not None:
                grad_scores *= slope
            grad_q[rows] = _merge_heads(grad_scores @ k).to(grad_q.dtype)
            grad_k[columns] += _sum_group(grad_scores.mT @ q).to(grad_k.dtype)
            grad_v[columns] += _sum_group(weights.mT @ grad_out).to(grad_v.dtype)
    return grad_q, grad_k, grad_v


def _documents(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Iterator[tuple[slice, slice]]:
    """(query rows, key rows) of every document that has queries."""
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for s in range(len(ends_q) - 1):
        queries, keys = slice(ends_q[s], ends_q[s + 1]), slice(ends_k[s], ends_k[s + 1])
        if queries.stop > queries.start and keys.stop > keys.start:
            yield queries, keys


def _calls(queries: slice, keys: slice, causal: bool) -> Iterator[tuple[slice, slice, bool]]:
    """(query rows, key rows, whether they are a causal square) of the kernel's calls for a document."""
    if not causal:
        yield queries, keys, False
        return
    size = min(queries.stop - queries.start, keys.stop - keys.start)  # of more queries the first see nothing
    if keys.stop - size > keys.start:
        yield queries, slice(keys.start, keys.stop - size), False
    yield slice(queries.stop - size, queries.stop), slice(keys.stop - size, keys.stop), True


def _blocks(queries: slice, keys: slice, window: int | None, causal: bool) -> Iterator[tuple[slice, slice, Tensor]]:
    """Cut a document into blocks of queries, each with the keys it can see and its mask [rows, columns]."""
    shift = keys.stop - queries.stop  # bottom-right: query row t stands at key row t + shift
    for start in range(queries.start, queries.stop, BLOCK):
        stop = min(start + BLOCK, queries.stop)
        first = keys.start if window is None else max(keys.start, start + shift - window + 1)
        # At least one column, masked, when nothing is visible.
        last = max(keys.start + 1, stop + shift) if causal else keys.stop
        distance = torch.arange(start, stop)[:, None] + shift - torch.arange(first, last)
        visible = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
        if window is not None:
            visible &= distance < window
        yield slice(start, stop), slice(first, last), visible


def _scores(q_TNH: Tensor, k_UKH: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """Scores [K, N/K, T, U] in the accumulation type, and their slope against the uncapped ones (None: 1)."""
    accumulate = torch.promote_types(q_TNH.dtype, torch.float32)
    kv_heads = k_UKH.shape[1]
    scores = (_split_heads(q_TNH, kv_heads).to(accumulate) * scale) @ _per_group(k_UKH).to(accumulate).mT
    if softcap is None:
        return scores, None
    tanh = torch.tanh(scores / softcap)
    return softcap * tanh, 1 - tanh * tanh


def _batched(x_TNH: Tensor) -> Tensor:
    return x_TNH.transpose(0, 1)[None]  # a view [1, N, T, H]: the kernel takes strides


def _split_heads(x_TNH: Tensor, kv_heads: int) -> Tensor:
    return x_TNH.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)  # [K, N/K, T, H]


def _merge_heads(x: Tensor) -> Tensor:
    return x.permute(2, 0, 1, 3).flatten(1, 2)  # [K, N/K, T, H] -> [T, N, H]


def _per_group(x_UKH: Tensor) -> Tensor:
    return x_UKH.transpose(0, 1)[:, None]  # [K, 1, U, H], broadcast over the query heads of a group


def _sum_group(x: Tensor) -> Tensor:
    return x.sum(1).transpose(0, 1)  # [K, N/K, U, H] -> [U, K, H]


CPU = Backend(
    name="cpu",
    op=as_op("attention_cpu", forward, backward),
    forward=forward,
    backward=backward,
    devices=("cpu",),
    dtypes=(torch.float32, torch.float64, torch.bfloat16, torch.float16),
    softcap=True,
)
