"""flash-attn 2, 3, 4 and Transformer Engine as they are published, without a GPU: the functions that `train.attention`
calls, with their own names, orders and defaults of arguments, computed in plain torch as their documentation defines
them. What is proven with them is the calling: layouts, window conventions, log-sum-exps, gradients.

Signatures: flash-attn 2.8.4 `flash_attn/flash_attn_interface.py`, its `hopper/flash_attn_interface.py` and
`flash_attn/cute/interface.py` of August 2026; Transformer Engine 2.20 `DotProductAttention`.
"""

import contextlib
import sys
import types

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_functional

from train.attention import flash, te


def dense(q, k, v, ends_q, ends_k, scale, causal, left, right, softcap):
    """(out, lse, scores with −inf, their slope) of every sequence: bottom-right, `left` and `right` keys (−1: all)."""
    outs, lses, parts = [], [], []
    group = q.shape[1] // k.shape[1]
    if causal:
        right = 0
    for (q0, q1), (k0, k1) in zip(_spans(ends_q), _spans(ends_k), strict=True):
        keys, values = (x[k0:k1].repeat_interleave(group, 1) for x in (k, v))
        scores = torch.einsum("tnh,unh->ntu", q[q0:q1], keys) * scale
        slope = torch.ones_like(scores)
        if softcap:
            tanh = torch.tanh(scores / softcap)
            scores, slope = softcap * tanh, 1 - tanh * tanh
        ahead = torch.arange(k1 - k0) - torch.arange(q1 - q0)[:, None] - ((k1 - k0) - (q1 - q0))
        hidden = torch.zeros_like(ahead, dtype=torch.bool)
        if left >= 0:
            hidden |= ahead < -left
        if right >= 0:
            hidden |= ahead > right
        scores = scores.masked_fill(hidden, -torch.inf)
        outs.append(torch.einsum("ntu,unh->tnh", scores.softmax(-1), values) if k1 > k0 else q[q0:q1] * 0)
        lses.append(scores.logsumexp(-1))
        parts.append((scores, slope, keys, values))
    return torch.cat(outs), torch.cat(lses, 1), parts


def dense_gradients(dout, q, k, v, out, lse, ends_q, ends_k, scale, causal, left, right, softcap):
    """Gradients from the given output and log-sum-exp, which may be those of more keys than these."""
    assert dout.is_contiguous()
    assert lse.is_contiguous()
    group = q.shape[1] // k.shape[1]
    grads = [torch.zeros_like(x) for x in (q, k, v)]
    _, _, parts = dense(q, k, v, ends_q, ends_k, scale, causal, left, right, softcap)
    for (q0, q1), (k0, k1), part in zip(_spans(ends_q), _spans(ends_k), parts, strict=True):
        scores, slope, keys, values = part
        weights = torch.exp(scores - lse[:, q0:q1, None])
        delta = (dout[q0:q1] * out[q0:q1]).sum(-1).t()[..., None]
        of_scores = weights * (torch.einsum("tnh,unh->ntu", dout[q0:q1], values) - delta) * slope * scale
        grads[0][q0:q1] = torch.einsum("ntu,unh->tnh", of_scores, keys)
        of_keys = torch.einsum("ntu,tnh->unh", of_scores, q[q0:q1]), torch.einsum("ntu,tnh->unh", weights, dout[q0:q1])
        for grad, of_heads in zip(grads[1:], of_keys, strict=True):
            grad[k0:k1] = of_heads.unflatten(1, (-1, group)).sum(2)
    return grads


def _write_gradients(targets, grads, ends_q, ends_k):
    """What a kernel leaves in its buffers: it is launched for the queries, so where a document has keys alone, the rows
    of those are as they were."""
    targets[0].copy_(grads[0])
    for (q0, q1), (k0, k1) in zip(_spans(ends_q), _spans(ends_k), strict=True):
        for target, grad in zip(targets[1:], grads[1:], strict=True):
            if q1 > q0:
                target[k0:k1] = grad[k0:k1]


def _spans(ends):
    assert ends.dtype == torch.int32
    return list(zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True))


def _check_longest(ends, longest):
    assert longest >= int(ends.diff().max())


# flash-attn 2


def _flash_attn_varlen_forward(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
    window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False, block_table=None,
    leftpad_k=None, seqused_k=None, zero_tensors=False, num_splits=0,
):  # fmt: skip
    _check_longest(cu_seqlens_q, max_seqlen_q)
    _check_longest(cu_seqlens_k, max_seqlen_k)
    assert dropout_p == 0.0
    bounds = window_size_left, window_size_right
    out, lse, _ = dense(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, *bounds, softcap)
    return out, lse, torch.empty(0), torch.empty(2, dtype=torch.int64)


def _flash_attn_varlen_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
    softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    zero_tensors=False,
):  # fmt: skip
    assert dropout_p == 0.0
    assert alibi_slopes is None
    given = dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal
    grads = dense_gradients(*given, window_size_left, window_size_right, softcap)
    _write_gradients((dq, dk, dv), grads, cu_seqlens_q, cu_seqlens_k)
    return torch.empty(0)


# flash-attn 3


def _flash_attn_forward(
    q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None, cu_seqlens_k_new=None,
    seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, page_table=None, kv_batch_idx=None,
    leftpad_k=None, rotary_cos=None, rotary_sin=None, seqlens_rotary=None, q_descale=None, k_descale=None,
    v_descale=None, softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1, attention_chunk=0,
    softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, num_splits=1, pack_gqa=None, sm_margin=0,
):  # fmt: skip
    _check_longest(cu_seqlens_q, max_seqlen_q)
    _check_longest(cu_seqlens_k, max_seqlen_k)
    bounds = window_size_left, window_size_right
    out, lse, _ = dense(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, *bounds, softcap)
    return out, lse, torch.empty(0), torch.empty(0)


def _flash_attn_backward(
    dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
    max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
    window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0,
):  # fmt: skip
    given = dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, softmax_scale, is_causal
    grads = dense_gradients(*given, window_size_left, window_size_right, softcap)
    _write_gradients((dq, dk, dv), grads, cu_seqlens_q, cu_seqlens_k)
    return torch.empty(0)


# flash-attn 4


def _flash_attn_fwd(
    q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
    max_seqlen_k=None, min_seqlen_k=None, page_table=None, softmax_scale=None, causal=False, softcap=None,
    window_size_left=None, window_size_right=None, learnable_sink=None, tile_mn=None, mma_pv_is_rs=None,
    intra_wg_overlap=None, num_threads=384, num_splits=1, pack_gqa=None, _arch=None, score_mod=None, mask_mod=None,
    block_sparse_tensors=None, return_lse=False, out=None, lse=None, aux_tensors=None, aux_scalars=None,
    q_descale=None, k_descale=None, v_descale=None, gather_kv_indices=None, scheduler_metadata=None,
    seqlen_k_per_split=None, disable_scheduler_metadata=False,
):  # fmt: skip
    _check_longest(cu_seqlens_q, max_seqlen_q)
    left, right = (-1 if bound is None else bound for bound in (window_size_left, window_size_right))
    out, lse, _ = dense(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, left, right, softcap)
    return out, lse if return_lse else None, None, None


def _flash_attn_bwd(
    q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
    window_size_right=None, m_block_size=64, n_block_size=128, num_threads=256, pack_gqa=False, num_stages_Q=2,
    num_stages_dO=2, SdP_swapAB=False, dKV_swapAB=False, dQ_swapAB=False, AtomLayoutMSdP=2, AtomLayoutNdKV=2,
    AtomLayoutMdQ=2, V_in_regs=False, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
    max_seqlen_q=None, max_seqlen_k=None, deterministic=False, dq=None, dk=None, dv=None, score_mod=None,
    score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None, block_sparse_tensors=None, dlse=None,
    learnable_sink=None,
):  # fmt: skip
    left, right = (-1 if bound is None else bound for bound in (window_size_left, window_size_right))
    given = dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal
    targets = [torch.full_like(x, torch.nan) if d is None else d for x, d in zip((q, k, v), (dq, dk, dv), strict=True)]
    _write_gradients(targets, dense_gradients(*given, left, right, softcap), cu_seqlens_q, cu_seqlens_k)
    return tuple(targets)


# Transformer Engine


class DotProductAttention(torch.nn.Module):
    def __init__(
        self, num_attention_heads, kv_channels, num_gqa_groups=None, attention_dropout=0.0, qkv_format="sbhd",
        attn_mask_type="causal", window_size=None, bottom_right_diagonal=None, sequence_parallel=False, tp_size=1,
        get_rng_state_tracker=None, tp_group=None, layer_number=None, attention_type="self", cp_group=None,
        cp_global_ranks=None, cp_stream=None, cp_comm_type="p2p", softmax_scale=None, softmax_type="vanilla",
        return_max_logit=False, name=None,
    ):  # fmt: skip
        super().__init__()
        assert qkv_format == "thd"
        assert attn_mask_type in ("padding_causal", "padding_causal_bottom_right")
        assert attention_dropout == 0.0
        self.heads = num_attention_heads, num_gqa_groups, kv_channels
        self.mask, self.window, self.scale, self.group = attn_mask_type, window_size, softmax_scale, None

    def set_context_parallel_group(self, cp_group, cp_global_ranks, cp_stream, cp_comm_type="p2p"):
        assert cp_comm_type == "p2p"
        assert cp_global_ranks == dist.get_process_group_ranks(cp_group)
        self.group = cp_group

    def forward(
        self, query_layer=None, key_layer=None, value_layer=None, attention_mask=None, qkv_format=None,
        cu_seqlens_q=None, cu_seqlens_kv=None, cu_seqlens_q_padded=None, cu_seqlens_kv_padded=None, max_seqlen_q=None,
        max_seqlen_kv=None, attn_mask_type=None, window_size=None, bottom_right_diagonal=None,
        checkpoint_core_attention=False, core_attention_bias_type="no_bias", core_attention_bias=None,
        alibi_slopes=None, fast_zero_fill=True, inference_params=None, pad_between_seqs=None, fp8_output=False,
        bf16_backward=False, num_splits=1,
    ):  # fmt: skip
        assert (query_layer.shape[1], key_layer.shape[1], query_layer.shape[2]) == self.heads
        assert all(x.is_contiguous() for x in (query_layer, key_layer, value_layer))
        assert torch.equal(cu_seqlens_q, cu_seqlens_q_padded)
        assert torch.equal(cu_seqlens_kv, cu_seqlens_kv_padded)
        _check_longest(cu_seqlens_q, max_seqlen_q)
        _check_longest(cu_seqlens_kv, max_seqlen_kv)
        left, right = self.window
        if self.group is None:
            # "causal" alone is aligned top-left, which is another mask where there are more keys than queries.
            assert self.mask == "padding_causal_bottom_right"
            ends = cu_seqlens_q, cu_seqlens_kv
            return dense(query_layer, key_layer, value_layer, *ends, self.scale, True, left, right, None)[0].flatten(1)
        assert self.mask == "padding_causal", "its ring knows no other causal mask"
        assert (left, right) == (-1, 0), "its point-to-point ring has no sliding window"
        # Each rank holds chunks r and 2C−1−r of every sequence; here all are put back and computed as one.
        size, rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        held = [[] for _ in range(size)]
        for start, stop in _spans(cu_seqlens_q):
            assert (stop - start) % (2 * size) == 0
            chunk = (stop - start) // (2 * size)
            for r in range(size):
                for c in (r, 2 * size - 1 - r):
                    held[r] += range(start + c * chunk, start + (c + 1) * chunk)
        back = torch.tensor([i for rows in held for i in rows]).argsort()
        row = [
            torch.cat(dist_functional.all_gather(x, group=self.group))[back]
            for x in (query_layer, key_layer, value_layer)
        ]
        out = dense(*row, cu_seqlens_q, cu_seqlens_kv, self.scale, True, -1, 0, None)[0]
        return out[held[rank]].flatten(1)


CONTENTS = {
    "flash_attn": (),
    "flash_attn.flash_attn_interface": (_flash_attn_varlen_forward, _flash_attn_varlen_backward),
    "flash_attn_interface": (_flash_attn_forward, _flash_attn_backward),
    "flash_attn.cute": (),
    "flash_attn.cute.interface": (_flash_attn_fwd, _flash_attn_bwd),
    "transformer_engine": (),
    "transformer_engine.pytorch": (DotProductAttention,),
}


def install(flash_version=2):
    """Put the fakes in the place of the packages in this process, for good; `flash` then uses `flash_version`."""
    for name, members in CONTENTS.items():
        module = types.ModuleType(name)
        for member in members:
            setattr(module, member.__name__, member)
        sys.modules[name] = module
    flash.chosen_version = lambda head_dim: flash_version


@contextlib.contextmanager
def installed(flash_version=2):
    """The same for a while."""
    before = {name: sys.modules.get(name) for name in CONTENTS}
    chosen_version = flash.chosen_version
    install(flash_version)
    try:
        yield
    finally:
        flash.chosen_version = chosen_version
        for name, module in before.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module
        for cache in (flash.kernels, te._module):
            cache.cache_clear()
