"""A look at a kernel before it trains anything: does it keep packed documents apart, here and now?

Which kernel runs in the end is decided by packages, their versions and the GPU; what it must do is not. A few tokens
show it in milliseconds, where a leak between documents shows in no loss curve.
"""

import itertools

import torch
from torch import Tensor

from train.attention import cpu
from train.attention.interface import Backend, Segments

LENGTHS = [3, 70, 1, 26]
BOUND = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""Of ‖Δ‖/‖result‖, for the output; gradients are rounded more often and may be twice as far off."""


def check_isolation(
    backend: Backend, device: torch.device, dtype: torch.dtype, head_dim: int, *, windows: bool, softcap: float | None
) -> None:
    """Compare `backend` over packed documents with the documents one at a time, forward and backward, also with more
    keys than queries and, where the model has `windows`, with one.

    Raises: ValueError when a result lies further off than rounding can explain.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int) -> Tensor:
        return torch.randn(sum(LENGTHS), heads, head_dim, generator=generator).to(dtype)

    q, k, v, grad_out = draw(2), draw(1), draw(1), draw(2)
    for window in (None, 7)[: 1 + windows]:
        for skipped in (0, 20):  # queries of the longest document, which are then another context-parallel rank's
            kept = [n - skipped * (n > skipped) for n in LENGTHS]
            rows = torch.cat([torch.arange(end - n, end) for end, n in zip(_ends(LENGTHS), kept, strict=True)])
            given, options = (q[rows], k, v, grad_out[rows]), (head_dim**-0.5, window, softcap)
            packed = _run(backend, [x.to(device) for x in given], kept, LENGTHS, options)
            wide = [x.to(torch.promote_types(dtype, torch.float32)) for x in given]
            lengths = kept, LENGTHS, LENGTHS, kept
            documents = zip(*(x.split(n) for x, n in zip(wide, lengths, strict=True)), kept, LENGTHS, strict=True)
            alone = [_run(cpu.CPU, tensors, [n], [m], options) for *tensors, n, m in documents]
            for i, (got, *wanted) in enumerate(zip(packed, *alone, strict=True)):
                wanted = torch.cat(wanted)
                error = ((got.cpu().to(wanted.dtype) - wanted).norm() / wanted.norm()).item()
                if not error <= BOUND[dtype] * (2 if i else 1):
                    raise ValueError(
                        f"attention backend {backend.name!r} gives packed documents other "
                        f"{'gradients' if i else 'results'} than one at a time (off by {error:.1%}) on {device} in "
                        f"{str(dtype)[6:]}; take another --attention"
                    )


def _ends(lengths: list[int]) -> list[int]:
    return list(itertools.accumulate(lengths))


def _run(
    backend: Backend, tensors: list[Tensor], queries: list[int], keys: list[int], options: tuple
) -> tuple[Tensor, ...]:
    """Output of attention over segments of these lengths, and the gradients of `tensors` q, k and v from a gradient of
    the output, the fourth."""
    *inputs, grad_out = tensors
    inputs = [x.detach().requires_grad_() for x in inputs]
    segments = Segments.of(queries, grad_out.device), Segments.of(keys, grad_out.device)
    layout = *(s.cu_seqlens for s in segments), *(s.max_seqlen for s in segments)
    out = backend.op(*inputs, *layout, *options, None)[0]
    return out.detach(), *torch.autograd.grad(out, inputs, grad_out)
