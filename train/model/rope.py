"""Rotary position embeddings: frequencies, tables for a packed row, application.

The frequencies are computed in float32 by the arithmetic with which the published weights were trained, and nothing is
kept in a buffer: a buffer would hold garbage after a build on the meta device.

Shapes: T tokens, N heads, H head dimension, R rotated dimensions (R ≤ H, even).
"""

import functools
import math

import torch
from torch import Tensor

from train.attention.interface import Segments
from train.model.config import Rope


def inverse_frequencies(rope: Rope, device: torch.device | None = None, *, long: bool = False) -> Tensor:
    """Angle per position of each pair of dimensions, float32 [R/2]; `long` matters to longrope only."""
    exponents = torch.arange(0, rope.dim, 2, dtype=torch.float32, device=device) / rope.dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        wavelengths = 2 * math.pi / frequencies
        smooth = (rope.original_context / wavelengths - rope.low_freq_factor) / (
            rope.high_freq_factor - rope.low_freq_factor
        )
        between = (1 - smooth) * frequencies / rope.factor + smooth * frequencies
        stretched = torch.where(
            wavelengths > rope.original_context / rope.low_freq_factor, frequencies / rope.factor, between
        )
        return torch.where(wavelengths < rope.original_context / rope.high_freq_factor, frequencies, stretched)
    if rope.kind == "yarn":
        first, last = (_yarn_dimension(rope, rotations) for rotations in (rope.beta_fast, rope.beta_slow))
        if rope.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, rope.dim - 1)
        ramp = (torch.arange(rope.dim // 2, dtype=torch.float32, device=device) - first) / max(last - first, 1e-3)
        kept = 1 - ramp.clamp(0, 1)
        return frequencies / rope.factor * (1 - kept) + frequencies * kept
    if rope.kind == "longrope":
        factors = rope.long_factors if long else rope.short_factors
        return 1.0 / (_on_device(factors, device) * rope.theta**exponents)
    assert rope.kind == "default"
    return frequencies


@functools.lru_cache
def _on_device(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    # Copied once: the GPU is waited for.
    return torch.tensor(numbers, dtype=torch.float32, device=device)


def _yarn_dimension(rope: Rope, rotations: float) -> float:
    """The (fractional) pair of dimensions that turns `rotations` times over the original context."""
    return rope.dim * math.log(rope.original_context / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))


def rope_tables(rope: Rope, position_ids_T: Tensor, segments: Segments, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine for a model in `dtype`, each [T, 1, R/2], in float32, or float64 for a float64 model."""
    precise = torch.promote_types(dtype, torch.float32)
    frequencies = inverse_frequencies(rope, position_ids_T.device).to(precise)
    if rope.kind == "longrope":
        stretched = inverse_frequencies(rope, position_ids_T.device, long=True).to(precise)
        is_long = _document_lengths(position_ids_T, segments) > rope.original_context
        frequencies = torch.where(is_long[:, None, None], stretched, frequencies)
    angles = position_ids_T.to(precise)[:, None, None] * frequencies
    return angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor


def _document_lengths(position_ids_T: Tensor, segments: Segments) -> Tensor:
    """For every token the length of its whole document, also where this rank holds a part of it; padding between
    documents does not count, however their slots are aligned."""
    tokens = torch.arange(len(position_ids_T), dtype=torch.int32, device=position_ids_T.device)
    segment = torch.searchsorted(segments.cu_seqlens, tokens, right=True) - 1
    return segments.document_lengths[segment]


def apply_rope(x_TNH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn dimension i against i + R/2 in the precision of the tables; dimensions from R on pass unchanged."""
    half = cos.shape[-1]
    a, b, rest = x_TNH[..., :half], x_TNH[..., half : 2 * half], x_TNH[..., 2 * half :]
    turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x_TNH.dtype)
    return turned if rest.shape[-1] == 0 else torch.cat((turned, rest), dim=-1)
