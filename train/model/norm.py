"""The root-mean-square norm."""

import torch
from torch import Tensor, nn


class Norm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in at least float32."""

    def __init__(self, size: int, eps: float, offset: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps, self.offset = eps, offset

    def forward(self, x: Tensor) -> Tensor:
        return self.normalise(x, self.weight)

    def normalise(self, x: Tensor, weight: Tensor) -> Tensor:
        """The norm with another `weight` in place of its own: a tensor-parallel rank's part."""
        if self.offset == 0.0:
            return nn.functional.rms_norm(x, weight.shape, weight, self.eps)
        wide = torch.promote_types(x.dtype, torch.float32)  # 1 + weight would round a small weight away in bfloat16
        return nn.functional.rms_norm(x.to(wide), weight.shape, weight.to(wide) + self.offset, self.eps).to(x.dtype)
