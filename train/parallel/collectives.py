"""Collectives that autograd passes through: what each sends forward and what it sends back stand side by side.

They are functional (the result is a new tensor, waited for), so a compiled block holds them without a graph break.

| function         | forward                             | backward                                  |
|------------------|-------------------------------------|-------------------------------------------|
| `all_gather`     | the rows of all ranks               | sum over ranks, each rank's own rows      |
| `reduce_scatter` | sum over ranks, each rank's own rows| the rows of all ranks                     |
| `all_reduce`     | sum over ranks                      | sum over ranks                            |
| `sum_to_all`     | sum over ranks                      | nothing: every rank has the whole gradient|
| `copy_to_all`    | nothing: every rank has the value   | sum over ranks                            |
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_ops = torch.ops._c10d_functional


def sum_over_ranks(x: Tensor, group: dist.ProcessGroup, operation: str = "sum") -> Tensor:
    """All-reduce without a gradient; `operation` may be "max"."""
    return _ops.wait_tensor(_ops.all_reduce(x.contiguous(), operation, group.group_name))


def _rows_of_all(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    return _ops.wait_tensor(_ops.all_gather_into_tensor(x.contiguous(), group.size(), group.group_name))


def _sum_of_own_rows(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    return _ops.wait_tensor(_ops.reduce_scatter_tensor(x.contiguous(), "sum", group.size(), group.group_name))


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _rows_of_all(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _sum_of_own_rows(grad, ctx.group), None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _sum_of_own_rows(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _rows_of_all(grad, ctx.group), None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return sum_over_ranks(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return sum_over_ranks(grad, ctx.group), None


class _SumToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return sum_over_ranks(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _CopyToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return sum_over_ranks(grad, ctx.group), None


def all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[T, …] of each of n ranks → [n·T, …]; backward sums each rank's rows over all ranks."""
    return _AllGather.apply(x, group)


def reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Summands [n·T, …] on n ranks → this rank's rows [T, …] of their sum; backward gathers the rows of all."""
    return _ReduceScatter.apply(x, group)


def all_reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum over ranks, forward and backward: each rank uses the sum in another way, as a norm's square sum."""
    return _AllReduce.apply(x, group)


def sum_to_all(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum over ranks, of which all ranks then make the same use: their gradients are equal, and each summand's."""
    return _SumToAll.apply(x, group)


def copy_to_all(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`x`, equal on all ranks, of which each makes another use: backward sums their gradients."""
    return _CopyToAll.apply(x, group)
