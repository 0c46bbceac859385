"""The `tp` axis as styles see it: ways of activations over it, and where parameters stand on it.

Shapes: T tokens of this context-parallel rank, D hidden size, n ranks of the axis.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from train.model.config import ModelConfig
from train.parallel.collectives import all_gather, copy_to_all, reduce_scatter, sum_to_all


@dataclass(frozen=True)
class TensorAxis:
    """The `tp` axis as styles see it. `sequence`: the residual stream is cut over its tokens (sequence parallelism)."""

    mesh: DeviceMesh  # 1-D
    sequence: bool

    @property
    def group(self) -> dist.ProcessGroup:
        return self.mesh.get_group()

    @property
    def rank(self) -> int:
        return self.mesh.get_local_rank()

    @property
    def size(self) -> int:
        return self.mesh.size()

    @property
    def stream_grad(self) -> Placement:
        """What a rank's gradient of a whole weight is that worked on the stream."""
        return Partial() if self.sequence else Replicate()

    def to_row(self, x: Tensor) -> Tensor:
        """stream → row."""
        return all_gather(x, self.group) if self.sequence else copy_to_all(x, self.group)

    def sum_to_stream(self, x: Tensor) -> Tensor:
        """summands → stream."""
        return reduce_scatter(x, self.group) if self.sequence else sum_to_all(x, self.group)

    def own_stream(self, x: Tensor) -> Tensor:
        """row → stream; also for ids and labels."""
        if self.sequence:
            tokens = len(x) // self.size
            return x[self.rank * tokens : (self.rank + 1) * tokens]
        return _ShareGradient.apply(x, self.size) if x.requires_grad else x

    def part(self, size: int) -> slice:
        """Which of `size` rows (or columns) a `Shard` gives this rank."""
        most = -(-size // self.size)
        return slice(min(size, self.rank * most), min(size, (self.rank + 1) * most))


class _ShareGradient(torch.autograd.Function):
    """The same on all ranks, whose whole gradient becomes n equal summands."""

    @staticmethod
    def forward(ctx, x: Tensor, size: int) -> Tensor:
        ctx.size = size
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.size, None


@dataclass(frozen=True)
class Site:
    """Where a style is applied: the module's full name, the axis, and the model it belongs to."""

    name: str
    axis: TensorAxis
    config: ModelConfig

    def place(self, module: nn.Module, parameter: str, placement: Placement) -> nn.Parameter | None:
        """The module's parameter as a DTensor over the axis, on meta or from values that all ranks hold alike.

        One that is a DTensor already keeps the placement it has: an annotation says how it is *stored*.
        Raises: ValueError when there is too little of it for every rank to hold a part.
        """
        value = getattr(module, parameter)
        if value is None or isinstance(value, DTensor):
            return value
        return place(value, f"{self.name}.{parameter}", placement, self.axis.mesh)


def place(value: nn.Parameter, name: str, placement: Placement, mesh: DeviceMesh) -> nn.Parameter:
    """`value` as a DTensor over the 1-D `mesh`. Raises: ValueError when a rank would be left without a part."""
    if isinstance(placement, Shard):
        if placement.dim >= value.ndim:
            raise ValueError(f"{name} has {value.ndim} dimensions and cannot be placed as {placement}")
        size = value.shape[placement.dim]
        if -(-size // mesh.size()) * (mesh.size() - 1) >= size:
            raise ValueError(
                f"{name} of shape {tuple(value.shape)} cannot be cut over --tp {mesh.size()}: its dimension "
                f"{placement.dim} has too little for every rank; lower --tp, or give it another style with --tp-plan"
            )
    placed = distribute_tensor(value.detach(), mesh, [placement], src_data_rank=None)
    return nn.Parameter(placed, requires_grad=value.requires_grad)


def is_cut_unevenly(parameter: DTensor) -> bool:
    """Whether ranks of a 1-D mesh hold different numbers of its rows."""
    return parameter.placements == (Shard(0),) and parameter.shape[0] % parameter.device_mesh.size() != 0


def local(parameter: DTensor | None, placement: Placement, grad: Placement | None = None) -> Tensor | None:
    """This rank's part of a parameter under `placement`, whatever it is stored as; in backward the rank's gradient is
    taken as `grad` (by default `placement`)."""
    if parameter is None:
        return None
    if parameter.placements != (placement,):
        parameter = parameter.redistribute(placements=[placement])
    return parameter.to_local(grad_placements=[placement if grad is None else grad])
