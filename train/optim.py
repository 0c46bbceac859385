"""AdamW, the learning rate as a pure function of the step, and clipping over any mix of meshes."""

import math

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from train.config import Optim
from train.mesh import Mesh


def build_optimizer(model: nn.Module, config: Optim) -> torch.optim.AdamW:
    """AdamW over all parameters of `model`; matrices decay, vectors (norms, biases) do not.

    Every parameter must be a DTensor or none may be: the foreach kernels cannot mix them in a group, nor DTensors of
    different meshes (experts have their own), so each mesh has its groups.
    """
    groups: dict[tuple, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim >= 2 and not name.endswith("bias")  # those of experts are stacked
            mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
            groups.setdefault((mesh, decays), []).append(parameter)
    on_cuda = all(p.device.type == "cuda" for p in model.parameters())
    return torch.optim.AdamW(
        [{"params": g, "weight_decay": config.weight_decay if decays else 0.0} for (_, decays), g in groups.items()],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        foreach=not on_cuda,
        fused=on_cuda,
    )


def learning_rate(step: int, steps: int, config: Optim) -> float:
    """Learning rate of optimizer step `step` (1 … `steps`): linear warm-up, then a cosine from the peak to
    `min_lr_ratio` of it, reached at the last step. No state, so a resumed run needs none."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    floor = config.lr * config.min_lr_ratio
    return floor + (config.lr - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def gradient_norm(model: nn.Module, mesh: Mesh | None = None) -> torch.Tensor:
    """2-norm of all gradients over all ranks, a scalar tensor that is equal on every rank.

    Without `mesh` the model must not be cut into pipeline stages, whose squares are added up here, too.

    Gradients of different meshes cannot meet in one DTensor operation, so squares are summed on the local shards,
    reduced once for each (mesh, sharded axes), and added up.
    """
    buckets: dict[tuple, list[torch.Tensor]] = {}
    for parameter in model.parameters():
        if parameter.grad is None:
            continue
        if isinstance(parameter.grad, DTensor):
            holders = parameter.grad.device_mesh
            assert not any(p.is_partial() for p in parameter.grad.placements), "a gradient was left unreduced"
            axes = tuple(
                axis for axis, p in enumerate(parameter.grad.placements) if not p.is_replicate()
            )  # _StridedShard is no Shard
            buckets.setdefault((holders, axes), []).append(parameter.grad.to_local())
        else:
            buckets.setdefault((None, ()), []).append(parameter.grad)
    total = None
    for (holders, axes), grads in buckets.items():
        squares = torch.stack(torch._foreach_norm(grads)).square().sum(dtype=torch.float64)
        for axis in axes:
            dist.all_reduce(squares, group=holders.get_group(axis))
        total = squares if total is None else total + squares
    assert total is not None, "no parameter has a gradient"
    if mesh is not None and mesh.pp_size > 1:
        dist.all_reduce(total, group=mesh.root.get_group("pp"))
    return total.sqrt()


@torch.no_grad()
def clip_gradients(model: nn.Module, max_norm: float, mesh: Mesh | None = None) -> torch.Tensor:
    """Scale all gradients so that their global norm is at most `max_norm` (0: leave them); returns the norm before."""
    norm = gradient_norm(model, mesh)
    if max_norm > 0 and norm > max_norm:
        local = [
            p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
            for p in model.parameters()
            if p.grad is not None
        ]
        torch._foreach_mul_(local, (max_norm / norm).item())
    return norm
