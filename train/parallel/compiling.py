"""torch.compile, one block at a time: the blocks of a kind share one graph, whatever the number of layers."""

import torch
from torch import nn

from train.config import Config
from train.mesh import Mesh
from train.model.moe import MixtureOfExperts

LENGTHS = 16
"""Of how many values `max_seqlen` can be: powers of two from 128 tokens (`train.row`) to 4 million."""


def apply_compile(model: nn.Module, mesh: Mesh, config: Config) -> nn.Module:
    """Compile the forward (and so the backward) of every block of `model.layers`, in place, and return the model.

    `fullgraph` makes a graph break an error: attention is a custom operator, and so nothing in a block needs one.
    `dynamic=False`: rows of a run have one length and one number of segments, so the only number that changes from row
    to row is `max_seqlen`. A graph is compiled for each of its values that occurs, at most log₂(T / 128) + 1; torch's
    limit of 8 is raised to what can occur, so that reaching it still means that something changes which should not.

    Like recompute, it wraps the forward function and not the module: parameters keep their names, and FSDP's hooks,
    which could not be traced, stay outside. Embedding and head are not compiled: the loss works chunk by chunk already.

    Of a block with a mixture of experts only what comes before the mixture is compiled: how many rows an expert has
    follows from the data and is read by the host, and the counting of loads happens in a backward. Experts are matrix
    products anyway.
    """
    kinds = len(set(model.config.layers))
    graphs = 2 * kinds * LENGTHS  # training and evaluation
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, graphs)
    for block in model.layers.children():
        name = "attend" if isinstance(block.mlp, MixtureOfExperts) else "forward"
        compiled = torch.compile(
            getattr(block, name), fullgraph=True, dynamic=False, backend=config.model.compile_backend
        )
        setattr(block, name, compiled)
    return model
