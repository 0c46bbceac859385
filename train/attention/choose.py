"""Which attention kernel a run uses: the one asked for, or the best that can serve the model; refused if none can."""

import torch
from torch import Tensor

from train.attention.cpu import CPU
from train.attention.flash import FLASH
from train.attention.interface import Backend, Segments
from train.attention.te import TE
from train.attention.torch_varlen import TORCH

BACKENDS = {backend.name: backend for backend in (TORCH, FLASH, TE, CPU)}  # in the order in which `auto` tries them

# Kernels a user may know that take one dense row and would let every document read the ones before it.
CANNOT_ISOLATE = ("sdpa", "eager", "math")


def choose_backend(
    name: str, device: str, dtype: torch.dtype, head_dim: int, *, softcap: bool = False, sinks: bool = False
) -> Backend:
    """Return the kernel `name`, or for "auto" the first of `BACKENDS` that can serve the model.

    Raises ValueError saying why a kernel is refused, and which can be used instead.
    """

    def why_not(dtype: torch.dtype) -> dict[str, str | None]:
        return {b.name: b.refusal(device, dtype, head_dim, softcap, sinks) for b in BACKENDS.values()}

    refusals = why_not(dtype)
    usable = [backend for backend, reason in refusals.items() if reason is None]
    bfloat16_would_do = not usable and None in why_not(torch.bfloat16).values()
    if usable:
        instead = f"use {' or '.join(usable)}"
    elif bfloat16_would_do:
        instead = "use --dtype bfloat16"
    else:
        instead = "no kernel can serve this model on this device"
    if name in CANNOT_ISOLATE:
        raise ValueError(f"Attention backend {name!r} cannot keep packed documents apart: {instead}.")
    if name == "auto":
        if not usable:
            reasons = "; ".join(f"{backend}: {reason}" for backend, reason in refusals.items())
            hint = f"; {instead}" if bfloat16_would_do else ""
            raise ValueError(f"No attention backend can serve this model on {device} ({reasons}){hint}.")
        return BACKENDS[usable[0]]
    if name not in BACKENDS:
        raise ValueError(f"Unknown attention backend {name!r}: choose auto, {', '.join(BACKENDS)}.")
    if refusals[name] is not None:
        raise ValueError(f"Attention backend {name!r} is refused: {refusals[name]}; {instead}.")
    return BACKENDS[name]


def varlen_attention(
    q_TNH: Tensor,
    k_UKH: Tensor,
    v_UKH: Tensor,
    segments: Segments,
    keys: Segments | None = None,
    *,
    backend: str,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention inside each document of a packed row: `out_TNH`, same dtype as `q_TNH`.

    `keys` are the segments of keys and values where they are not those of the queries (U tokens instead of T); the last
    query of a segment stands at its last key.
    `scale` multiplies the scores; `window` is the number of visible keys, the query's own included; `softcap` bounds
    the scores by `softcap·tanh(score/softcap)`. `sinks` [N] are one learned logit a head that joins the denominator of
    each softmax (GPT-OSS); they get a gradient.
    """
    keys = segments if keys is None else keys
    layout = segments.cu_seqlens, keys.cu_seqlens, segments.max_seqlen, keys.max_seqlen
    return BACKENDS[backend].op(q_TNH, k_UKH, v_UKH, *layout, scale, window, softcap, sinks)[0]
