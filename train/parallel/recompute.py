"""Activation recompute: a block keeps only its input and runs its forward again in backward."""

from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from train.config import Config
from train.mesh import Mesh


def apply_recompute(model: nn.Module, mesh: Mesh, config: Config) -> nn.Module:
    """Wrap every block of `model.layers` in place and return the model; names of parameters stay the same."""
    for name, block in model.layers.named_children():
        # Nothing in a block is random, so there is no RNG state to keep.
        model.layers.register_module(name, checkpoint_wrapper(block, preserve_rng_state=False))
    return model
