"""One optimizer step, and one evaluation: forward and backward over a rank's rows, everything summed over ranks."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from train.config import Optim
from train.data import PackedLoader
from train.mesh import Mesh
from train.optim import clip_gradients
from train.parallel.pipeline import Pipeline
from train.row import MicroBatch


class NotFiniteError(ValueError):
    """Loss or gradient norm of a step is not finite: every rank raises it together, before the optimizer step."""


@dataclass(frozen=True)
class StepResult:
    """`loss` is the mean over the step's target tokens, `grad_norm` the norm before clipping, both equal on all ranks;
    `applied` is False when the step was skipped because one of them is not finite."""

    loss: float
    grad_norm: float
    applied: bool


def sum_over(value: torch.Tensor, *views: DeviceMesh) -> torch.Tensor:
    """Sum `value` in place over the ranks of each view, one after the other."""
    for view in views:
        if view.size() > 1:
            dist.all_reduce(value, group=view.get_group())
    return value


def sum_loss(share: torch.Tensor, mesh: Mesh) -> float:
    """The loss of all ranks from the share of each: dp and cp ranks hold different tokens, and of the ranks of a
    pipeline only the last has any loss."""
    return sum_over(share, mesh.dp_cp, mesh.pp).item()


def accumulate_gradients(
    model: nn.Module, rows: Iterable[MicroBatch], row_count: int, target_tokens: int, *, defer_sync: bool = True
) -> torch.Tensor:
    """Forward and backward over a rank's `rows`; returns this rank's share of the loss, float64 scalar.

    Each row's summed loss is divided by the *global* number of targets of the step before backward, so gradients only
    ever need to be summed. With `defer_sync` they are communicated once, in the backward of the last row; until then
    each rank holds a whole set. Without, after each row. A pipeline does the same in the order of its schedule, always
    deferred; its ranks without the last stage return 0.
    """
    if isinstance(model, Pipeline):
        return model.accumulate_gradients(rows, target_tokens)
    share = None
    for i, row in enumerate(rows):
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(not defer_sync or i == row_count - 1)
        loss = model(row.input_ids, row.position_ids, row.segments, row.labels) / max(1, target_tokens)
        loss.backward()
        value = loss.detach().double()
        share = value if share is None else share + value
    assert share is not None, "a step has at least one row on every rank"
    return share


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: PackedLoader,
    target_tokens: int,
    mesh: Mesh,
    config: Optim,
    *,
    defer_sync: bool = True,
) -> StepResult:
    """Train the step that `loader.next_step()` announced, at the learning rate already set in `optimizer`.

    Raises: NotFiniteError before the optimizer step when loss or gradient is not finite and `--on-nonfinite` is stop.
    """
    share = accumulate_gradients(model, loader.rows(), loader.row_count, target_tokens, defer_sync=defer_sync)
    loss = sum_loss(share, mesh)
    grad_norm = clip_gradients(model, config.max_grad_norm, mesh).item()
    applied = math.isfinite(loss) and math.isfinite(grad_norm)
    if applied:
        optimizer.step()
    elif config.on_nonfinite == "stop":
        raise NotFiniteError(
            f"loss {loss} and gradient norm {grad_norm}: not finite, so stopped before the optimizer step; "
            "lower --lr, look at the data, or go on without such steps by --on-nonfinite skip"
        )
    optimizer.zero_grad(set_to_none=True)
    return StepResult(loss, grad_norm, applied)


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: PackedLoader, steps: int, mesh: Mesh, progress: Callable[[int, int], None]
) -> tuple[float, int]:
    """Mean loss over the target tokens of `steps` steps of `loader` (0 when there is none), and their number.

    `progress(done, steps)` is called before the first step and after each.
    """
    model.eval()
    targets = 0
    total = None
    progress(0, steps)
    for done in range(1, steps + 1):
        targets += loader.next_step().target_tokens
        if isinstance(model, Pipeline):
            losses = [model.evaluate(loader.rows())]
        else:
            losses = [model(row.input_ids, row.position_ids, row.segments, row.labels) for row in loader.rows()]
        for loss in losses:
            total = loss.double() if total is None else total + loss.double()
        progress(done, steps)
    model.train()
    assert total is not None, "an evaluation has at least one step"
    return sum_loss(total, mesh) / max(1, targets), targets
