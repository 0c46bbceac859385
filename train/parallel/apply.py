"""The parallel story of the trainer, told once and in order."""

from train.config import Config
from train.mesh import Mesh
from train.model.decoder import Decoder
from train.parallel.compiling import apply_compile
from train.parallel.cp import apply_cp
from train.parallel.ep import apply_ep
from train.parallel.fsdp import apply_fsdp
from train.parallel.pipeline import Pipeline
from train.parallel.pp import cut_stages
from train.parallel.recompute import apply_recompute
from train.parallel.tp import apply_tp


def parallelize(model: Decoder, mesh: Mesh, config: Config) -> Decoder | Pipeline:
    """Apply every dimension to `model` (on the meta device) and return what this rank runs.

    The order, each step but the first `(model, mesh, config) -> model`, and why it stands where it does:

    1. pp: cuts the model into stages; everything after works on this rank's stages, one by one.
    2. tp: replaces parameters by DTensors over tp, which FSDP must find when it shards them further.
    3. cp: swaps how attention sees the sequence; no parameter changes.
    4. ep: sets up the balancing of experts and distributes them over their own mesh, before FSDP takes the rest.
    5. recompute: wraps each block, so that what is compiled next includes the recomputation.
    6. compile: each wrapped block, before FSDP's hooks would break the graph.
    7. fsdp: last, so that it gathers and frees whatever parameters the steps above left on this rank.
    """
    if mesh.pp_size > 1:
        stages = cut_stages(model, mesh, config)
        return Pipeline({number: _parallelize(stage, mesh, config) for number, stage in stages.items()}, mesh, config)
    return _parallelize(model, mesh, config)


def _parallelize(model: Decoder, mesh: Mesh, config: Config) -> Decoder:
    if mesh.tp_size > 1:
        model = apply_tp(model, mesh, config)
    if mesh.cp_size > 1:
        model = apply_cp(model, mesh, config)
    model = apply_ep(model, mesh, config)
    if config.model.recompute != "none":
        model = apply_recompute(model, mesh, config)
    if config.model.compile:
        model = apply_compile(model, mesh, config)
    return apply_fsdp(model, mesh, config)
