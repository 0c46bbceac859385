"""Activation recompute: a block drops what its backward could compute again, all of it or all that is cheap."""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from train.attention.choose import BACKENDS
from train.config import Config
from train.mesh import Mesh
from train.model.experts import EXPERTS
from train.model.moe import MixtureOfExperts

MATMULS = ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm")
"""Every matrix product that a block may contain, by its name among torch's operators."""


def apply_recompute(model: nn.Module, mesh: Mesh, config: Config) -> nn.Module:
    """Let every block of `model.layers` recompute as `--recompute` says, in place, and return the model.

    full       keeps a block's input alone and runs its whole forward again: the least memory, a third more work.
    selective  also keeps what attention and matrix products gave, and computes again what lies between them: norms,
               rotations, activations, sums. Next to no additional work, for about half of the memory.

    The forward function is wrapped and not the module, so parameters keep their names. It runs inside FSDP's hooks: the
    pre-backward hook has gathered the weights again before the recomputation needs them.

    Of a block with a mixture of experts `selective` wraps what comes before the mixture, the experts and the shared
    expert, each alone. torch tells by counting operators which kept result is whose. Router and experts may be groups
    of FSDP, whose hooks run other operators when they run again, so they may not stand inside what is counted; and the
    part that is compiled has to keep results itself. What lies between the parts (the router's scores, and with expert
    parallelism the rows that arrive) is kept, so no row travels twice.
    """
    # Nothing in a block is random, so there is no RNG state to keep.
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    selective = config.model.recompute == "selective"
    if selective:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_what_is_costly)
    for block in model.layers.children():
        mixture = block.mlp if isinstance(block.mlp, MixtureOfExperts) else None
        if not selective or mixture is None:
            block.forward = partial(checkpoint, block.forward, **options)
            continue
        block.attend = partial(checkpoint, block.attend, **options)
        for part in (mixture.experts, *([] if mixture.shared is None else [mixture.shared])):
            part.forward = partial(checkpoint, part.forward, **options)
    return model


def _costly() -> frozenset:
    overloads = [op.default for name in MATMULS if (op := getattr(torch.ops.aten, name, None)) is not None]
    # A package with gradients of its own (Transformer Engine) is no operator that could be named: it is repeated.
    kernels = [backend.op._opoverload for backend in BACKENDS.values() if backend.forward is not None]
    return frozenset([*overloads, EXPERTS._opoverload, *kernels])


COSTLY = _costly()


def _keep_what_is_costly(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in COSTLY else CheckpointPolicy.PREFER_RECOMPUTE
