"""FSDP2 over dp_shard (× cp), HSDP when there are replicas.

One communication group for each block, one for the rest at the root. Gradients are *summed* over ranks: the loss is
already divided by the step's global number of targets, so every layout gives the same gradient.
"""

from functools import partial
from typing import Any

from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from train.config import Config
from train.mesh import Mesh
from train.model.moe import MixtureOfExperts
from train.parallel.tensor_axis import is_cut_unevenly
from train.precision import cast_dtypes


def _cut(parameter: nn.Parameter, ranks: int) -> Shard:
    """FSDP cuts rows; columns where tp has cut the rows into uneven parts: what FSDP makes of those (parts of parts)
    and what a DTensor says of them are two different things. Stacked experts, alone of three dimensions, it cuts as
    `_cut_experts` says."""
    if parameter.ndim == 3:
        return _cut_experts(parameter, ranks)
    is_uneven = isinstance(parameter, DTensor) and is_cut_unevenly(parameter)
    return Shard(1 if is_uneven and parameter.ndim > 1 else 0)


def _cut_experts(parameter: nn.Parameter, ranks: int) -> Shard:
    """Whole experts where they go round, which gathering need not interleave, else rows or columns of each: over more
    ranks than experts, most would hold none, and what is gathered would be filled up to one for each. FSDP cuts these
    evenly or not at all."""
    is_spread = isinstance(parameter, DTensor)
    held = parameter.to_local() if is_spread else parameter
    if len(held) % ranks == 0 and not (is_spread and ranks == 1):
        return Shard(0)
    return Shard(next((dim for dim in range(1, held.ndim) if held.shape[dim] % ranks == 0), 0))


def apply_fsdp(model: nn.Module, mesh: Mesh, config: Config) -> nn.Module:
    """Shard `model` (on meta or with values) in place over `mesh.fsdp` and return it; parameters become DTensors.

    Expects `model.layers` to be the blocks in the order of the forward pass. A world of one in full precision has
    nothing to shard, cast or sum: its model stays as it is, which saves three copies of all weights a step (a tenth of
    the step for SmolLM2 on CPU).
    """
    param_dtype, reduce_dtype = cast_dtypes(config.model, mesh.root.device_type)
    # With tp FSDP also sums the gradients of which each tensor rank has a part (`Partial`), once a step.
    if mesh.fsdp.size() * mesh.tp_size == 1 and param_dtype is None and not config.layout.cpu_offload:
        return model
    # No casting of inputs: hidden states have the dtype of the weights that made them, and the tables of rotary
    # angles must stay float32.
    precision = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    offload = (
        CPUOffloadPolicy(pin_memory=mesh.root.device_type == "cuda") if config.layout.cpu_offload else OffloadPolicy()
    )
    options = {"mesh": mesh.fsdp, "mp_policy": precision, "offload_policy": offload}
    options["shard_placement_fn"] = partial(_cut, ranks=mesh.fsdp.shape[-1])

    # A stage of a pipeline keeps its weights gathered until all rows of the step are through.
    reshard = config.layout.reshard and mesh.pp_size == 1
    blocks = list(model.layers.children())
    for block in blocks:
        if isinstance(block.mlp, MixtureOfExperts):
            _shard_mixture(block.mlp, mesh, options, reshard=reshard and block is not blocks[-1])
        # The last block is needed again at once: backward begins with it.
        fully_shard(block, reshard_after_forward=reshard and block is not blocks[-1], **options)
    tied = model.lm_head is not None and model.lm_head.weight is None
    if model.embed_tokens is not None and not tied:
        fully_shard(model.embed_tokens, reshard_after_forward=reshard, **options)
    if model.lm_head is not None and not tied:
        fully_shard([model.norm, model.lm_head], reshard_after_forward=False, **options)
    # A tied head uses the embedding's weight, so the root gathers embedding, norm and head together.
    fully_shard(model, reshard_after_forward=False, **options)

    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Both are needed: the factor alone becomes a scaled reduction that gloo does not know.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    if config.layout.prefetch:
        _prefetch(model, config.layout.prefetch)
    return model


def _shard_mixture(mixture: MixtureOfExperts, mesh: Mesh, options: dict[str, Any], *, reshard: bool) -> None:
    """Groups of their own inside a block: the experts, on their own mesh where there is one; and the router, whose
    weights are not cast, for a token's choice hangs on the last bits of its scores."""
    precision: MixedPrecisionPolicy = options["mp_policy"]
    if precision.param_dtype is not None:
        whole = MixedPrecisionPolicy(reduce_dtype=precision.reduce_dtype, cast_forward_inputs=False)
        fully_shard(mixture.router, reshard_after_forward=reshard, **(options | {"mp_policy": whole}))
    if mesh.experts is None:
        return
    axes = ("dp_replicate", "ep_shard") if mesh.experts["dp_replicate"].size() > 1 else "ep_shard"
    cut = partial(_cut_experts, ranks=mesh.experts["ep_shard"].size())
    fully_shard(
        mixture.experts,
        reshard_after_forward=reshard,
        **(options | {"mesh": mesh.experts[axes], "shard_placement_fn": cut}),
    )


def _prefetch(model: nn.Module, ahead: int) -> None:
    """While a block computes, gather the weights of the `ahead` blocks that come next, and the same way back; a mixture
    of experts with its block.

    On its own FSDP starts the next gathering when the next group begins to run on the host, forward, and one group
    ahead, backward: enough while the host is far ahead of the GPU. Before its experts it never is: there it waits for
    the routing (`train.parallel.ep`), so their weights, most of the model, would be gathered with nothing beside them.
    Router and experts have no lists of their own: recomputed in backward, they would follow the one for forward.
    """
    units = [_groups_of(unit) for unit in (model.embed_tokens, *model.layers.children(), model.norm)]
    units = [unit for unit in units if unit]
    for i, (first, *inner) in enumerate(units):
        later, earlier = units[i + 1 : i + 1 + ahead], units[max(0, i - ahead) : i][::-1]
        first.set_modules_to_forward_prefetch(inner + [group for unit in later for group in unit])
        # Backward takes a unit's own group first, too, and then the others from the last.
        backward = [inner[::-1], *([group, *others[::-1]] for group, *others in earlier)]
        first.set_modules_to_backward_prefetch([group for unit in backward for group in unit])


def _groups_of(unit: nn.Module | None) -> list[FSDPModule]:
    """The groups that a block, or embedding or final norm, consists of, in the order of the forward pass."""
    mixture = getattr(unit, "mlp", None)
    parts = [mixture.router, mixture.experts] if isinstance(mixture, MixtureOfExperts) else []
    return [part for part in (unit, *parts) if isinstance(part, FSDPModule)]
