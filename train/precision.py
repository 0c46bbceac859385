"""In which types a run computes, and sums its gradients over ranks. Parameters themselves stay float32."""

import torch

from train.config import Model


def compute_dtype(config: Model, device_type: str) -> torch.dtype:
    """The type of `--dtype`; auto is bfloat16 on CUDA, whose attention kernels take no float32, and float32 on CPU,
    where bfloat16 is slower."""
    if config.dtype == "auto":
        return torch.bfloat16 if device_type == "cuda" else torch.float32
    return getattr(torch, config.dtype)


def cast_dtypes(config: Model, device_type: str) -> tuple[torch.dtype | None, torch.dtype | None]:
    """(type that parameters are cast to, type in which gradients are reduced), None where each keeps its own: not
    float32, so that float64 flows through for the proofs."""
    dtype = compute_dtype(config, device_type)
    cast = None if dtype == torch.float32 else dtype
    return cast, None if cast is None and config.reduce_dtype == "float32" else getattr(torch, config.reduce_dtype)
