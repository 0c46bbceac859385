"""Random weights for training from scratch (`--init`), the same on every mesh."""

import math

import torch
import xxhash
from torch.distributed.tensor import DTensor, distribute_tensor

from train.model.decoder import Decoder, Norm

RESIDUAL = {"o_proj", "down_proj"}


@torch.no_grad()
def init_weights(model: Decoder, seed: int) -> None:
    """Fill every parameter: matrices and embeddings normal with `config.initializer_range`, biases 0, norms neutral.

    What a block adds to the residual stream (`o_proj`, `down_proj`) is drawn 1/√(2·layers) as wide, so that the stream
    does not grow with the number of layers (GPT-2, section 2.3).

    A parameter's values are a function of (seed, its name) alone: neither the order of the parameters, nor the device,
    nor how many ranks share them changes a bit. Each rank draws the whole tensor on CPU and keeps its own share, so the
    peak is one tensor. Collective when parameters are DTensors only in the sense that every rank must call it.
    """
    neutral_norm = 1.0 - model.config.norm_offset
    norms = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Norm)}
    for name, parameter in model.named_parameters():
        if name in norms:
            parameter.fill_(neutral_norm)
        elif name.endswith("bias"):
            parameter.zero_()
        else:
            generator = torch.Generator().manual_seed(xxhash.xxh3_64_intdigest(f"{seed}/{name}".encode()) >> 1)
            width = model.config.initializer_range
            if RESIDUAL & set(name.split(".")):
                width /= math.sqrt(2 * model.config.num_layers)
            values = torch.randn(parameter.shape, generator=generator).mul_(width)
            if isinstance(parameter, DTensor):
                # every rank drew the same numbers: take the own share, send nothing
                values = distribute_tensor(values, parameter.device_mesh, parameter.placements, src_data_rank=None)
                parameter.to_local().copy_(values.to_local())
            else:
                parameter.copy_(values)
    for buffer in model.buffers():  # correction biases of routers
        buffer.zero_()
