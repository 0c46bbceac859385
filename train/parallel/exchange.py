"""What the ways of exchanging keys have in common: the module in the place of `AttentionCore`, and the collectives with
their gradients, written out so that a reader sees every one."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from train.attention.interface import Part, Segments
from train.model.decoder import AttentionCore


class Exchange(nn.Module):
    """An `AttentionCore` whose tokens lie on `size` ranks; this one is `rank` of `group`."""

    def __init__(self, core: AttentionCore, group: dist.ProcessGroup, rank: int, size: int):
        super().__init__()
        self.core, self.group, self.rank, self.size = core, group, rank, size


def part_of(segments: Segments) -> Part:
    assert segments.part is not None, "the loader was not told of the cut"
    return segments.part


# torch 2.13 renamed both and warns at every call of the old names.
_all_gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
_reduce_scatter = dist.reduce_scatter_single if hasattr(dist, "reduce_scatter_single") else dist.reduce_scatter_tensor


class AllGather(torch.autograd.Function):
    """Rows of all ranks, one rank after the other; backward sums each rank's rows over all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        out = x.new_empty((dist.get_world_size(group) * len(x), *x.shape[1:]))
        _all_gather(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        out = grad.new_empty((len(grad) // dist.get_world_size(ctx.group), *grad.shape[1:]))
        _reduce_scatter(out, grad.contiguous(), group=ctx.group)
        return out, None


class AllToAll(torch.autograd.Function):
    """Runs of `send[c]` rows go to rank c, runs of `receive[c]` come from it; backward sends them back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        out = x.new_empty((sum(receive), *x.shape[1:]))
        dist.all_to_all_single(out, x.contiguous(), receive, send, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        out = grad.new_empty((sum(ctx.send), *grad.shape[1:]))
        dist.all_to_all_single(out, grad.contiguous(), ctx.send, ctx.receive, group=ctx.group)
        return out, None, None, None
