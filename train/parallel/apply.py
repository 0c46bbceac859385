"""The parallel story of the trainer, told once and in order."""

from torch import nn

from train.config import Config
from train.mesh import Mesh
from train.parallel.compiling import apply_compile
from train.parallel.cp import apply_cp
from train.parallel.fsdp import apply_fsdp
from train.parallel.recompute import apply_recompute


def parallelize(model: nn.Module, mesh: Mesh, config: Config) -> nn.Module:
    """Apply every dimension to `model` (on the meta device) and return what this rank runs.

    The order, each step `(model, mesh, config) -> model`, and why it stands where it does:

    1. pp: cuts the model into stages; everything after works on this rank's layers only. (not driven yet)
    2. tp: replaces parameters by DTensors over tp, which FSDP must find when it shards them further. (not driven yet)
    3. cp: swaps how attention sees the sequence; no parameter changes.
    4. ep: distributes the experts over their own mesh before FSDP takes the rest. (not driven yet)
    5. recompute: wraps each block, so that what is compiled next includes the recomputation.
    6. compile: each wrapped block, before FSDP's hooks would break the graph.
    7. fsdp: last, so that it gathers and frees whatever parameters the steps above left on this rank.
    """
    if mesh.cp_size > 1:
        model = apply_cp(model, mesh, config)
    if config.model.recompute != "none":
        model = apply_recompute(model, mesh, config)
    if config.model.compile:
        model = apply_compile(model, mesh, config)
    return apply_fsdp(model, mesh, config)
