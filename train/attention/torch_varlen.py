"""Attention on CUDA with the FlashAttention kernels that torch ships, nothing to install.

The operators are those behind `torch.nn.attention.varlen` (torch ≥ 2.10). They are called directly because its Python
signature changed from 2.10 to 2.12 (`is_causal` went, `enable_gqa` came) while the operators' did not, and because
ring attention needs the backward with a log-sum-exp of its own. They group query heads themselves.
"""

import torch
from torch import Tensor

from train.attention.interface import Backend, as_op


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
    """See `train.attention.interface.Backend`."""
    assert softcap is None  # `choose` refuses such a model
    out_TNH, lse_NT, *_ = torch.ops.aten._flash_attention_forward(
        q_TNH,
        k_UKH,
        v_UKH,
        cu_seqlens_q,
        cu_seqlens_k,
        max_q,
        max_k,
        0.0,  # dropout
        causal and window is None,  # with a window its right end 0 says the same
        False,  # return_debug_mask
        scale=scale,
        **_window_bounds(window),
    )
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
    """Gradients of q, k and v; `lse_NT` and `out_TNH` may come from a merge over several key blocks."""
    assert softcap is None
    no_dropout_seed = torch.zeros(2, dtype=torch.uint64, device=q_TNH.device)
    unused = torch.empty(0, device=q_TNH.device)
    return torch.ops.aten._flash_attention_backward(
        grad_out_TNH.contiguous(),  # may arrive expanded (gradient of a sum), which the kernel misreads
        q_TNH,
        k_UKH,
        v_UKH,
        out_TNH,
        lse_NT.contiguous(),  # may be a view of one that ring attention merged
        cu_seqlens_q,
        cu_seqlens_k,
        max_q,
        max_k,
        0.0,
        causal and window is None,
        no_dropout_seed,
        unused,
        scale=scale,
        **_window_bounds(window),
    )


def _window_bounds(window: int | None) -> dict[str, int]:
    """`window` counts the visible keys, the kernel those left of the query's own."""
    return {"window_size_left": -1 if window is None else window - 1, "window_size_right": -1 if window is None else 0}


TORCH = Backend(
    name="torch",
    op=as_op("attention_torch", forward, backward),
    forward=forward,
    backward=backward,
    devices=("cuda",),
    dtypes=(torch.bfloat16, torch.float16),
    softcap=False,
    max_head_dim=256,
    head_dim_multiple=8,
)
