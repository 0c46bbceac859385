"""Tensor parallelism: every module gets a style (`train.parallel.styles`), by four levels that a user may need.

1. The styles themselves: small modules that spell out their collectives.
2. One plan per family, as data (`train.parallel.plans`).
3. Overrides by module-name pattern: `--tp-plan 'lm_head=stream,layers.0.mlp=stream'`, or in the `--config` file

       tp-plan:
         lm_head: stream               # the whole head on every rank, for its own tokens
         "layers.*.attention": whole   # heads that tp does not divide: the same work on every rank

   An override of a block's `attention` or `mlp`, or of a mixture's `shared` expert, holds for all of its parts, which
   only work together; the last pattern that matches a module wins. Names are those of our `Decoder` (`layers.3.mlp`),
   `*` matches any run of characters.
4. Placements of single parameters, written in the same way: `layers.*.attention.k_proj.weight: shard(0)`. They say how
   a parameter is *stored* over tp (and in which layout its gradient and optimizer state are kept), whatever its style
   computes with: it is redistributed for use, and its gradient the same way back. So a weight that a style wants whole
   need not be kept whole by every rank.

What fits together nowhere is refused by name: a pattern that matches nothing, a style that a module does not have, a
parameter that no style covers, heads that tp does not divide.
"""

import difflib
import re
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from train.config import Config
from train.mesh import Mesh
from train.model.config import ModelConfig
from train.model.decoder import Decoder
from train.parallel.plans import PLANS
from train.parallel.styles import STYLES
from train.parallel.tensor_axis import Site, TensorAxis, is_cut_unevenly, place

CONTAINERS = ("attention", "mlp", "shared")
"""Modules of a block whose parts fit together only in the ways that styles make."""


def apply_tp(model: nn.Module, mesh: Mesh, config: Config) -> nn.Module:
    """Give every module of `model` (a decoder, or the stage of one; on meta, or with values equal on all ranks) its
    style over the `tp` axis, in place, and return the model. All its parameters are DTensors over that axis then.

    Raises: ValueError naming the module or parameter when plan, overrides and weights do not fit together.
    """
    axis = TensorAxis(mesh.root["tp"], config.layout.sp)
    styles, placements = parse_overrides(config.layout.tp_plan, model.config)
    if mesh.pp_size > 1 and model.config.tied_embeddings:
        check_tied(styles)
        if "embed_tokens.weight" in placements:
            placements["lm_head.weight"] = placements["embed_tokens.weight"]
    parameters = dict(model.named_parameters())
    for name, placement in placements.items():
        if name in parameters:  # a pipeline stage has some of them
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, place(parameters[name], name, placement, axis.mesh))
    for name, style in choose_styles(model, styles).items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(name)
        setattr(model.get_submodule(owner), leaf, STYLES[style][type(module)](module, Site(name, axis, model.config)))
    for name, parameter in model.named_parameters():
        if ".mlp.experts." in name:  # not of this mesh (train.parallel.ep)
            continue
        if not isinstance(parameter, DTensor):
            raise ValueError(
                f"--tp: the plan of {model.config.family} models gives {name} no style; add one with --tp-plan"
            )
        ranks = mesh.fsdp.shape[-1]
        if ranks > 1 and is_cut_unevenly(parameter) and (parameter.ndim == 1 or parameter.shape[1] % ranks):
            raise ValueError(
                f"--tp {axis.size} cuts {name} of shape {tuple(parameter.shape)} into uneven rows, which FSDP cannot "
                f"shard further over {ranks} ranks; take a --tp that divides {parameter.shape[0]}"
                + f", or FSDP ranks that divide {parameter.shape[1]}"
                * (parameter.ndim > 1)
            )
    return model


def check_tied(overrides: dict[str, str]) -> None:
    """Raise a ValueError when the two stages of a pipeline that hold a tied weight would place it in two ways."""
    embedding, head = (overrides.get(name, "vocab") for name in ("embed_tokens", "lm_head"))
    if embedding != head:
        raise ValueError(
            f"--tp-plan: embed_tokens has style {embedding} and lm_head {head}, but they are tied and stand on two "
            "stages of a pipeline; give both the same"
        )


def choose_styles(model: nn.Module, overrides: dict[str, str]) -> dict[str, str]:
    """Name → style of every module of `model` that has one, by the plan of its family and `overrides` (module name →
    style). Raises: ValueError for a style that the module does not have."""
    plan = PLANS.get(model.config.family)
    if plan is None:
        raise ValueError(
            f"--tp: there is no plan for {model.config.family} models; leave --tp at 1, or take {', '.join(PLANS)}"
        )
    chosen: dict[str, str] = {}
    for name, module in model.named_modules():
        planned = next((style for pattern, style in plan.items() if fnmatchcase(name, pattern)), None)
        style = overrides.get(name, planned)
        container, _, leaf = name.rpartition(".")
        if container.rpartition(".")[2] in CONTAINERS:
            if name in overrides and style != planned and leaf not in CONTAINERS:
                raise ValueError(
                    f"--tp-plan: {name} fits only the other parts of {container}; give {container} a style, not {name}"
                )
            if container in overrides and overrides[container] != "gather":
                style = overrides[container] if type(module) in STYLES[overrides[container]] else None
        if style is None:
            continue
        if type(module) not in STYLES[style]:
            fitting = ", ".join(known for known, modules in STYLES.items() if type(module) in modules)
            raise ValueError(f"--tp-plan: style {style} does not fit {name}, which takes {fitting or 'none'}")
        chosen[name] = style
    return chosen


def parse_overrides(text: str | None, config: ModelConfig) -> tuple[dict[str, str], dict[str, Placement]]:
    """`PATTERN=STYLE,…` as (module name → style, parameter name → placement) over all names of a whole model.

    Raises: ValueError for a pattern that matches nothing, and for a style or placement that does not exist.
    """
    with torch.device("meta"):
        whole = Decoder(config)
    parameters = [name for name, _ in whole.named_parameters()]
    modules = [name for name, _ in whole.named_modules() if name]
    styles: dict[str, str] = {}
    placements: dict[str, Placement] = {}
    for entry in text.split(",") if text else ():
        pattern, _, value = (part.strip() for part in entry.partition("="))
        found = [name for name in parameters if fnmatchcase(name, pattern)]
        if found:
            placements |= dict.fromkeys(found, _placement(pattern, value))
            continue
        found = [name for name in modules if fnmatchcase(name, pattern)]
        if not found:
            near = difflib.get_close_matches(pattern, [*PLANS[config.family], *modules, *parameters], n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"--tp-plan: no module or parameter of this model is called {pattern}{hint}")
        if value not in STYLES:
            raise ValueError(f"--tp-plan: {pattern} has style {value!r}; there are {', '.join(STYLES)}")
        styles |= dict.fromkeys(found, value)
    return styles, placements


def _placement(pattern: str, value: str) -> Placement:
    if value.lower() in ("replicate", "replicate()"):
        return Replicate()
    if found := re.fullmatch(r"shard\(([01])\)", value.lower()):
        return Shard(int(found[1]))
    raise ValueError(f"--tp-plan: {pattern} is a parameter and takes shard(0), shard(1) or replicate, not {value!r}")
