"""A look at a kernel before it trains anything: does it keep packed documents apart, here and now?

Which kernel runs in the end is decided by packages, their versions and the GPU; what it must do is not. A few tokens
show it in milliseconds, where a leak between documents shows in no loss curve.
"""

import torch
from torch import Tensor

from train.attention import cpu
from train.attention.interface import Backend, Segments

LENGTHS = [3, 70, 1, 26]
BOUND = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}


def check_isolation(
    backend: Backend, device: torch.device, dtype: torch.dtype, head_dim: int, *, windows: bool, softcap: float | None
) -> None:
    """Compare `backend` over packed documents with the documents one at a time, also with more keys than queries and,
    where the model has `windows`, with one.

    Raises: ValueError when a result lies further off than rounding can explain.
    """
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(sum(LENGTHS), heads, head_dim, generator=generator).to(dtype) for heads in (2, 1, 1))
    for window in (None, 7)[: 1 + windows]:
        for skipped in (0, 20):  # queries of the longest document, which are then another context-parallel rank's
            queries = [q_doc[skipped * (len(q_doc) > skipped) :] for q_doc in q.split(LENGTHS)]
            options = head_dim**-0.5, window, softcap
            alone = torch.cat(
                [_alone(*x, options) for x in zip(queries, k.split(LENGTHS), v.split(LENGTHS), strict=True)]
            )
            segments = Segments.of([len(q_doc) for q_doc in queries], device), Segments.of(LENGTHS, device)
            layout = *(s.cu_seqlens for s in segments), *(s.max_seqlen for s in segments)
            packed = backend.op(*(x.to(device) for x in (torch.cat(queries), k, v)), *layout, *options, None)[0]
            error = ((packed.cpu().to(alone.dtype) - alone).norm() / alone.norm()).item()
            if not error <= BOUND[dtype]:
                raise ValueError(
                    f"attention backend {backend.name!r} gives packed documents other results than one at a time "
                    f"(off by {error:.1%}) on {device} in {str(dtype)[6:]}; take another --attention"
                )


def _alone(q_TNH: Tensor, k_UKH: Tensor, v_UKH: Tensor, options: tuple) -> Tensor:
    """Attention of one document on CPU, in at least float32."""
    wide = torch.promote_types(q_TNH.dtype, torch.float32)
    segments = Segments.of([len(q_TNH)]), Segments.of([len(k_UKH)])
    layout = *(s.cu_seqlens for s in segments), *(s.max_seqlen for s in segments)
    return cpu.forward(*(x.to(wide) for x in (q_TNH, k_UKH, v_UKH)), *layout, *options)[0]
