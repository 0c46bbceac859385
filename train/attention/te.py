"""Attention on CUDA with Transformer Engine's `DotProductAttention` in THD layout.

It picks a kernel itself (cuDNN's or a flash-attn) and keeps its log-sum-exp to itself, so our ring cannot merge it:
over a ring of context-parallel ranks it runs its own exchange (`TransformerEngineRing` in `train.parallel.cp`). The
other context-parallel methods hand it more keys than queries, which it aligns bottom-right like the other kernels.
Signatures are those of Transformer Engine 2 (published up to 2.20).
"""

import functools
from importlib.util import find_spec

import torch
import torch.distributed as dist
from torch import Tensor

from train.attention.interface import Backend


def attend(
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
    sinks: Tensor | None,
) -> tuple[Tensor, None]:
    """See `train.attention.interface.Backend.op`; there is no log-sum-exp."""
    assert softcap is None  # `choose` refuses such a model
    assert sinks is None
    heads = q_TNH.shape[1], k_UKH.shape[1], q_TNH.shape[2]
    module = _module(*heads, scale, (-1, 0) if window is None else (window - 1, 0), "padding_causal_bottom_right")
    return _call(module, q_TNH, k_UKH, v_UKH, cu_seqlens_q, cu_seqlens_k, max_q, max_k), None


def attend_over_ring(
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    row_cu_seqlens: Tensor,
    row_max_seqlen: int,
    scale: float,
    group: dist.ProcessGroup,
) -> Tensor:
    """Attention of this rank's two chunks of every document against those of all ranks of `group`, by Transformer
    Engine's own point-to-point exchange. `row_cu_seqlens` are the slots of the *whole* row, each a multiple of twice
    the number of ranks."""
    heads = q_TNH.shape[1], k_TKH.shape[1], q_TNH.shape[2]
    module = _module(*heads, scale, (-1, 0), "padding_causal", group)
    return _call(module, q_TNH, k_TKH, v_TKH, row_cu_seqlens, row_cu_seqlens, row_max_seqlen, row_max_seqlen)


def _call(module, q_TNH: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor, max_q: int, max_k: int):
    # Slots are computed whole, their padding too (it is in nobody's loss): where a slot ends, its sequence ends, so the
    # padded ends are the ends. Left to find that out itself, the module would wait for the GPU.
    out = module(
        q_TNH.contiguous(),
        k.contiguous(),
        v.contiguous(),
        cu_seqlens_q=ends_q,
        cu_seqlens_kv=ends_k,
        cu_seqlens_q_padded=ends_q,
        cu_seqlens_kv_padded=ends_k,
        max_seqlen_q=max_q,
        max_seqlen_kv=max_k,
        pad_between_seqs=False,
    )
    return out.view_as(q_TNH)  # it comes with its heads joined


@functools.cache
def _module(
    heads: int,
    kv_heads: int,
    head_dim: int,
    scale: float,
    window_size: tuple[int, int],
    mask: str,
    group: dist.ProcessGroup | None = None,
) -> torch.nn.Module:
    """One module for all layers of a kind: it has no parameters. The package is imported here, few machines have it."""
    from transformer_engine.pytorch import DotProductAttention

    module = DotProductAttention(
        heads,
        head_dim,
        num_gqa_groups=kv_heads,
        attention_dropout=0.0,
        qkv_format="thd",
        attn_mask_type=mask,
        window_size=window_size,
        softmax_scale=scale,
    )
    if group is not None:
        stream = torch.cuda.Stream() if torch.cuda.is_available() else None
        module.set_context_parallel_group(group, dist.get_process_group_ranks(group), stream, "p2p")
    return module


def missing(head_dim: int) -> str | None:
    """Why Transformer Engine cannot be used, or None."""
    return None if find_spec("transformer_engine") else "transformer-engine is not installed (pip install meshpack[te])"


TE = Backend(
    name="te",
    op=attend,
    forward=None,
    backward=None,
    devices=("cuda",),
    dtypes=(torch.bfloat16, torch.float16),
    softcap=False,
    sinks=False,
    max_head_dim=256,
    head_dim_multiple=8,
    missing=missing,
)
