"""Attention on CUDA with the flash-attn packages, where one is installed.

FlashAttention 2, 3 and 4 are separate packages, written for different GPUs, with different functions. Used is the one
for the GPU at hand: 4 for Blackwell and later, 3 for Hopper, else the newest installed that runs there. Called are the
functions under the packages' own autograd classes (flash-attn 2.8, 3, and 4 from its 24th beta), because ring
attention needs a log-sum-exp out of the forward pass and one of its own into the backward. All three align causal masks
bottom-right, count in a window the keys left of the query's own, group query heads themselves and return the
log-sum-exp as float32[N, T].
"""

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from train.attention.interface import Backend, as_op


@dataclass(frozen=True)
class Package:
    """A distribution, the oldest of it that has the functions called here, and what it can do."""

    name: str
    oldest: tuple[float, ...]  # as `release` tells them
    capabilities: range  # major compute capabilities of the GPUs it runs on
    max_head_dim: int


# In the order in which they are tried on a GPU that several run on: 3 is the one written for Hopper.
PACKAGES = {
    3: Package("flash_attn_3", (3,), range(9, 10), 256),
    # Betas before it refuse packed rows in the backward on Hopper, or where there is a softcap, or leave that out.
    4: Package("flash-attn-4", (4, 0, 0, 24), range(9, 100), 128),
    2: Package("flash-attn", (2, 7), range(8, 100), 256),
}


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
    layout = cu_seqlens_q, cu_seqlens_k, max_q, max_k
    return kernels(chosen_version(q_TNH.shape[2]))[0](q_TNH, k_UKH, v_UKH, *layout, scale, window, softcap, causal)


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
    # An expanded gradient (of a sum) is misread, and so is a log-sum-exp that is a transposed view.
    tensors = grad_out_TNH.contiguous(), q_TNH, k_UKH, v_UKH, out_TNH, lse_NT.contiguous()
    layout = cu_seqlens_q, cu_seqlens_k, max_q, max_k
    return kernels(chosen_version(q_TNH.shape[2]))[1](*tensors, *layout, scale, window, softcap, causal)


@functools.cache
def chosen_version(head_dim: int) -> int | None:
    """4, 3 or 2: the flash-attn that this process uses for heads of this size; None when no installed one can."""
    major = torch.cuda.get_device_capability()[0]
    for number, package in PACKAGES.items():
        if installed(package) and major in package.capabilities and head_dim <= package.max_head_dim:
            return number
    return None


def found(package: Package) -> str | None:
    """The version that is installed; the package is not imported."""
    try:
        return version(package.name)
    except PackageNotFoundError:
        return None


def installed(package: Package) -> bool:
    """Whether a version that can be used is installed."""
    number = found(package)
    return number is not None and release(number) >= package.oldest


def release(text: str) -> tuple[float, ...]:
    """A version as numbers that compare: 4.0.0b24 → (4, 0, 0, 24), and what is no beta comes after all betas of it."""
    numbers, beta = re.match(r"([\d.]*)(?:b(\d+))?", text).groups()
    return *(int(number) for number in numbers.split(".") if number), int(beta) if beta else math.inf


def missing(head_dim: int) -> str | None:
    """Why no flash-attn can be used in this process, or None."""
    names = [package.name for package in PACKAGES.values() if installed(package)]
    if not names:
        old = [package.name for package in PACKAGES.values() if found(package)]
        if old:
            return f"too old: {' and '.join(old)} (pip install --upgrade {' '.join(old)})"
        return "no flash-attn is installed (pip install flash-attn)"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if chosen_version(head_dim) is None:
        gpu = torch.cuda.get_device_name()
        return f"{' and '.join(names)} cannot serve heads of {head_dim} dimensions on {gpu}"
    return None


@functools.cache
def kernels(number: int) -> tuple[Callable, Callable]:
    """(forward, backward) of a version. The package is imported here, since few machines have it."""
    return {2: _flash_2, 3: _flash_3, 4: _flash_4}[number]()


def _flash_2() -> tuple[Callable, Callable]:
    from flash_attn.flash_attn_interface import _flash_attn_varlen_backward, _flash_attn_varlen_forward

    def forward(q, k, v, cu_q, cu_k, max_q, max_k, scale, window, softcap, causal):
        left, right = _window(window)
        options = {"window_size_left": left, "window_size_right": right, "softcap": softcap or 0.0}
        layout = cu_q, cu_k, max_q, max_k
        return _flash_attn_varlen_forward(q, k, v, *layout, 0.0, scale, causal, **options)[:2]

    def backward(grad_out, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, scale, window, softcap, causal):
        grads = _empty_gradients(q, k, v)
        options = *_window(window), softcap or 0.0, None, False  # no alibi slopes, not deterministic
        layout = cu_q, cu_k, max_q, max_k
        _flash_attn_varlen_backward(grad_out, q, k, v, out, lse, *grads, *layout, 0.0, scale, causal, *options)
        return grads

    return forward, backward


def _flash_3() -> tuple[Callable, Callable]:
    from flash_attn_interface import _flash_attn_backward, _flash_attn_forward

    def options(cu_q, cu_k, max_q, max_k, scale, window, softcap):
        left, right = _window(window)
        layout = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": max_q, "max_seqlen_k": max_k}
        return layout | {
            "softmax_scale": scale,
            "window_size_left": left,
            "window_size_right": right,
            "softcap": softcap or 0.0,
        }

    def forward(q, k, v, *layout_and_options):
        *given, causal = layout_and_options
        return _flash_attn_forward(q, k, v, causal=causal, **options(*given))[:2]

    def backward(grad_out, q, k, v, out, lse, *layout_and_options):
        *given, causal = layout_and_options
        grads = _empty_gradients(q, k, v)
        into = dict(zip(("dq", "dk", "dv"), grads, strict=True))
        _flash_attn_backward(grad_out, q, k, v, out, lse, is_causal=causal, **into, **options(*given))
        return grads

    return forward, backward


def _flash_4() -> tuple[Callable, Callable]:
    from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd

    def options(cu_q, cu_k, max_q, max_k, scale, window, softcap, causal):
        left, right = (None, None) if window is None else (window - 1, 0)
        layout = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": max_q, "max_seqlen_k": max_k}
        return layout | {
            "softmax_scale": scale,
            "causal": causal and window is None,  # a window whose right end is 0 says it
            "window_size_left": left,
            "window_size_right": right,
            "softcap": softcap or 0.0,
        }

    def forward(q, k, v, *given):
        return _flash_attn_fwd(q, k, v, return_lse=True, **options(*given))[:2]

    def backward(grad_out, q, k, v, out, lse, *given):
        into = dict(zip(("dq", "dk", "dv"), _empty_gradients(q, k, v), strict=True))
        return tuple(_flash_attn_bwd(q, k, v, out, grad_out, lse, **into, **options(*given))[:3])

    return forward, backward


def _window(window: int | None) -> tuple[int, int]:
    """(left, right) keys around the query's own of versions 2 and 3, which take −1 for all; causal bounds the right."""
    return (-1, -1) if window is None else (window - 1, 0)


def _empty_gradients(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # Zeros for keys: a document may have some here that no query of this rank sees.
    zeros = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (k, v))
    return torch.empty_like(q, memory_format=torch.contiguous_format), *zeros


FLASH = Backend(
    name="flash",
    op=as_op("attention_flash", forward, backward),
    forward=forward,
    backward=backward,
    devices=("cuda",),
    dtypes=(torch.bfloat16, torch.float16),
    softcap=True,
    max_head_dim=256,
    head_dim_multiple=8,
    missing=missing,
)
