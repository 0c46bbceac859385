"""The process group and the device mesh: five axes, always present, most of them of size 1.

Outermost first: pp (pipeline), dp_replicate (HSDP replicas), dp_shard (FSDP), cp (context), tp (tensor). Ranks that
talk most are neighbours, so tp and cp stay inside a machine.
"""

import math
import os
import warnings
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from train.config import Layout

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")


def axis_sizes(layout: Layout, world_size: int) -> tuple[int, int, int, int, int]:
    """Sizes of `AXES` for `world_size` ranks; a `dp_shard` of -1 takes what the other axes leave.

    Raises: ValueError that says which sizes do not multiply to the world size and which would.
    """
    others = layout.pp * layout.dp_replicate * layout.cp * layout.tp
    product = f"pp {layout.pp} × dp_replicate {layout.dp_replicate} × cp {layout.cp} × tp {layout.tp} = {others}"
    if layout.dp_shard == -1:
        if world_size % others:
            raise ValueError(
                f"{world_size} ranks cannot be divided by {product}; "
                f"start a multiple of {others} ranks or lower an axis"
            )
        dp_shard = world_size // others
    else:
        dp_shard = layout.dp_shard
        if others * dp_shard != world_size:
            raise ValueError(
                f"{product} times dp_shard {dp_shard} makes {others * dp_shard} ranks, but {world_size} run; "
                f"start {others * dp_shard} ranks or leave --dp-shard out"
            )
    return layout.pp, layout.dp_replicate, dp_shard, layout.cp, layout.tp


@dataclass(frozen=True)
class Mesh:
    """The 5-D mesh and the views of it that the trainer uses.

    `dp` (dp_replicate × dp_shard) are the ranks that train different packs; cp and tp ranks share theirs. `dp_cp`
    (dp_replicate × dp_shard × cp) are those that hold different tokens, over which the loss is summed.
    `fsdp` is what `fully_shard` takes: `dp_shard_cp` (dp_shard × cp), or 2-D (dp_replicate, dp_shard_cp) for HSDP.
    `experts` is the sibling mesh (pp, dp_replicate, ep_shard, ep) over the same ranks, where the model has experts and
    --ep or --tp asks for it: an expert's data ranks are those of dp_shard × cp × tp, in ep_shard groups of ep
    neighbours.
    """

    root: DeviceMesh
    dp: DeviceMesh
    dp_cp: DeviceMesh
    fsdp: DeviceMesh
    experts: DeviceMesh | None

    @property
    def dp_size(self) -> int:
        return self.dp.size()

    @property
    def dp_rank(self) -> int:
        return self.dp.get_local_rank()

    @property
    def pp(self) -> DeviceMesh:
        return self.root["pp"]

    @property
    def pp_size(self) -> int:
        return self.root["pp"].size()

    @property
    def pp_rank(self) -> int:
        return self.root.get_local_rank("pp")

    @property
    def cp_size(self) -> int:
        return self.root["cp"].size()

    @property
    def cp_rank(self) -> int:
        return self.root.get_local_rank("cp")

    @property
    def tp_size(self) -> int:
        return self.root["tp"].size()

    def __str__(self) -> str:
        return " × ".join(f"{axis} {size}" for axis, size in zip(AXES, self.root.shape, strict=True))


def build_mesh(layout: Layout, device: torch.device, *, experts: bool = True) -> Mesh:
    """The mesh over all ranks of the default process group; `experts`: whether the model has any.

    Raises: ValueError when the sizes do not make the world size, or `ep` does not divide its ranks.
    """
    sizes = axis_sizes(layout, dist.get_world_size())
    root = init_device_mesh(device.type, sizes, mesh_dim_names=AXES)
    dp = _as_one(root, "dp", ("dp_replicate", "dp_shard"))
    dp_cp = _as_one(root, "dp_cp", ("dp_replicate", "dp_shard", "cp"))
    dp_shard_cp = _as_one(root, "dp_shard_cp", ("dp_shard", "cp"))
    sibling = _expert_mesh(root, layout.ep) if experts else None
    if layout.dp_replicate == 1:
        return Mesh(root, dp, dp_cp, dp_shard_cp, sibling)
    with warnings.catch_warnings():
        # torch announces that flattened axes will not always be sliced from the root; 2.11 to 2.13 know no other way.
        warnings.filterwarnings("ignore", message="Slicing a flattened dim")
        fsdp = root["dp_replicate", dp_shard_cp.mesh_dim_names[0]]
    return Mesh(root, dp, dp_cp, fsdp, sibling)


def _as_one(root: DeviceMesh, name: str, axes: tuple[str, ...]) -> DeviceMesh:
    """The ranks of several axes as one axis, which is the only long one of them where that is so: no group is made
    twice for the same ranks."""
    long = tuple(axis for axis in axes if root[axis].size() > 1)
    if len(long) > 1:
        return root[long]._flatten(name)
    return root[long[0] if long else axes[0]]


def _expert_mesh(root: DeviceMesh, ep: int) -> DeviceMesh | None:
    pp, dp_replicate, dp_shard, cp, tp = root.shape
    if ep == 1 and tp == 1:
        return None
    ranks = dp_shard * cp * tp
    if ranks % ep:
        raise ValueError(
            f"--ep {ep} does not divide dp_shard {dp_shard} × cp {cp} × tp {tp} = {ranks} ranks; lower --ep or start "
            f"a multiple of {ep} ranks"
        )
    sizes = (pp, dp_replicate, ranks // ep, ep)
    return init_device_mesh(root.device_type, sizes, mesh_dim_names=("pp", "dp_replicate", "ep_shard", "ep"))


def pick_device(name: str) -> torch.device:
    """`auto`, `cpu` or `cuda` → this rank's device (made current).

    Raises: ValueError for cuda where there is none, or where the machine has fewer GPUs than local ranks.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("--device cuda, but torch sees no CUDA device; use --device cpu or auto")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"local rank {local_rank} has no GPU: the machine has {torch.cuda.device_count()}; lower --nproc-per-node"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def start_process_group(device: torch.device) -> dist.Store:
    """Join the ranks that torchrun started, or make a world of one; returns the store that all ranks share.

    CUDA runs get gloo beside NCCL, for tensors of the host.
    """
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "WORLD_SIZE" in os.environ:
        store, rank, world_size = next(rendezvous("env://"))
        # torchrun's store outlives the ranks that it restarts (`--max-restarts`): it holds the addresses of the dead.
        store = dist.PrefixStore("attempt " + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    else:
        store, rank, world_size = dist.HashStore(), 0, 1
    dist.init_process_group(backend, store=dist.PrefixStore("group", store), rank=rank, world_size=world_size)
    return store


def set_threads(threads: int) -> None:
    """Give this rank `threads` CPU threads; 0 divides the cores among the ranks of the machine (torchrun's own default
    is one thread a rank, which leaves cores idle)."""
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(threads or max(1, math.floor(cores / local_ranks)))
