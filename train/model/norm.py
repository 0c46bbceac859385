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
        if self.offset == 0.0:
            return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
        wide = torch.promote_types(x.dtype, torch.float32)  # 1 + weight would round a small weight away in bfloat16
        return nn.functional.rms_norm(x.to(wide), self.weight.shape, self.weight.to(wide) + self.offset, self.eps).to(
            x.dtype
        )
