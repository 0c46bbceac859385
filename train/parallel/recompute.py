"""Activation recompute: a block keeps only its input and runs its forward again in backward."""

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from train.config import Config
from train.mesh import Mesh


def apply_recompute(model: nn.Module, mesh: Mesh, config: Config) -> nn.Module:
    """Let every block of `model.layers` recompute, in place, and return the model.

    The forward function is wrapped and not the module, so parameters keep their names. It runs inside FSDP's hooks: the
    pre-backward hook has gathered the weights again before the recomputation needs them.
    """
    for block in model.layers.children():
        # Nothing in a block is random, so there is no RNG state to keep.
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    return model
