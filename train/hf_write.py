"""Write a model as a Hugging Face folder that others open: one tensor at a time is gathered to rank 0, which writes."""

import json
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from train.hf import INDEX, WEIGHTS, is_stacked, open_files, read_json
from train.model.config import ModelConfig
from train.model.sources import Source, weight_sources

FILE_BYTES = 5 << 30  # at most so much in one exported file
COPIED = (  # what a folder holds besides config.json and weights and what its readers want back
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
)


def save_weights(
    model: nn.Module, source: Path, out: Path, *, dtype: torch.dtype | None = None, file_bytes: int = FILE_BYTES
) -> None:
    """Write `model` as a Hugging Face folder `out`, with configuration and tokenizer of the folder `source`.

    Collective: every rank calls it, rank 0 writes. `dtype` is that of the stored weights, by default that of the
    parameters; a router's correction bias keeps its own. Files hold up to `file_bytes`; several get an index. The
    folder appears whole: it is written under another name and renamed, replacing an earlier export. Experts lie in it
    as they do in `source`. Tensors of other pipeline stages are sent to rank 0, each when its turn comes.
    """
    own = model.state_dict()
    described, holders = _everywhere(own)
    write_folder(
        model.config,
        described,
        lambda name: _gather(own.get(name), described[name], holders[name]),
        source,
        out,
        dtype=dtype,
        file_bytes=file_bytes,
    )


def write_folder(
    config: ModelConfig,
    described: dict[str, Tensor],
    read: Callable[[str], Tensor | None],
    source: Path,
    out: Path,
    *,
    dtype: torch.dtype | None,
    file_bytes: int,
) -> None:
    """What `save_weights` does, for parameters `described` (on meta) that `read` returns whole on rank 0, each once and
    on every rank in the same order."""
    with ExitStack() as stack:
        has_weights = (source / INDEX).exists() or (source / WEIGHTS).exists()  # not where a run began from scratch
        names = open_files(source, stack).keys() if has_weights else ()
        sources = weight_sources(config, stacked=is_stacked(names))
    tensors = _parts(sources)
    files = _plan_files(described, sources, tensors, dtype, file_bytes)
    writes = not dist.is_initialized() or dist.get_rank() == 0
    scratch = None
    if writes:
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        whole: dict[str, Tensor | None] = {}
        for file_name, names in files.items():
            gathered = {}
            for name in names:
                # The tensors of a parameter follow each other: it is read once.
                whole = {part: whole[part] if part in whole else read(part) for part in tensors[name]}
                if writes:
                    gathered[name] = _assemble(name, {part: (sources[part], whole[part]) for part in whole}, dtype)
            if writes:
                save_file(gathered, scratch / file_name, metadata={"format": "pt"})
        if writes:
            _write_companions(scratch, source, files, described, dtype)
            _replace(scratch, out)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{out} cannot be written: {getattr(error, 'strerror', None) or error}; make room, or mend what is broken, "
            "and export the checkpoint with train/export.py"
        ) from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def _parts(sources: dict[str, Source]) -> dict[str, list[str]]:
    """Tensor name, in the order of the model -> our parameters that make it up."""
    tensors = defaultdict(list)
    for ours, source in sources.items():
        for name in source.names:
            tensors[name].append(ours)
    return tensors


def _plan_files(
    parameters: dict[str, Tensor],
    sources: dict[str, Source],
    tensors: dict[str, list[str]],
    dtype: torch.dtype | None,
    file_bytes: int,
) -> dict[str, list[str]]:
    """File name -> the tensors it holds."""
    groups, used = [[]], 0
    for name, parts in tensors.items():
        size = sum(
            parameters[p].numel() // len(sources[p].names) * _stored(p, parameters[p], dtype).itemsize for p in parts
        )
        if groups[-1] and used + size > file_bytes:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, start=1)}


def _stored(name: str, tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """What a parameter or buffer is written as. The correction bias of a router is not cast: it moves by steps of
    0.001, which bfloat16 would round away beside scores near 1, and published files hold it in float32, too."""
    return tensor.dtype if dtype is None or name.endswith(".correction_bias") else dtype


def _assemble(name: str, parts: dict[str, tuple[Source, Tensor]], dtype: torch.dtype | None) -> Tensor:
    """The tensor `name` of the files from the whole parameters that make it up."""
    tensor = None
    for part, (source, parameter) in parts.items():
        parameter = parameter.to(_stored(part, parameter, dtype))
        if source.experts:
            parameter = parameter[source.names.index(name)]
        elif len(parts) > 1:
            tensor = parameter.new_empty(source.shape(parameter.shape)) if tensor is None else tensor
            source.of(tensor).copy_(parameter)
            continue
        tensor = parameter.mT if source.transposed else parameter
    return tensor.contiguous()


def _everywhere(own: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Every tensor that some rank has, on meta, and the first rank that has it; `own` are those of this rank."""
    described = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in own.items()}
    of_ranks = [described]
    if dist.is_initialized():
        of_ranks = [None] * dist.get_world_size()
        dist.all_gather_object(of_ranks, described)
    found, holders = {}, {}
    for rank, names in enumerate(of_ranks):
        for name, (shape, dtype) in names.items():
            if name not in found:
                found[name], holders[name] = torch.empty(shape, dtype=dtype, device="meta"), rank
    return found, holders


def _gather(own: Tensor | None, described: Tensor, holder: int) -> Tensor | None:
    """A whole tensor on the CPU of rank 0, None elsewhere; `own` is this rank's, None where it has no part of it."""
    if isinstance(own, DTensor):
        mesh_device = own.device_mesh.device_type
        if own.device.type != mesh_device:  # CPU offload: the collective needs the mesh's device
            own = own.to(mesh_device)
        own = _whole(own)
    rank = dist.get_rank() if dist.is_initialized() else 0
    if holder != 0 and rank == holder:
        # By way of the CPU, where every process group can talk.
        dist.send(own.detach().cpu().contiguous(), dst=0)
    elif holder != 0 and rank == 0:
        own = torch.empty(described.shape, dtype=described.dtype)
        dist.recv(own, src=holder)
    return own.detach().cpu() if rank == 0 else None


def _whole(own: DTensor) -> Tensor:
    """`full_tensor`, one axis of the mesh after the other: what torch makes of several at once is the same, but it
    warns of each."""
    for axis in range(own.device_mesh.ndim):
        own = own.redistribute(placements=[Replicate()] * (axis + 1) + list(own.placements[axis + 1 :]))
    return own.to_local()


def _write_companions(
    scratch: Path, source: Path, files: dict, parameters: dict[str, Tensor], dtype: torch.dtype | None
) -> None:
    config = read_json(source / "config.json")
    stored = str(dtype or next(iter(parameters.values())).dtype).removeprefix("torch.")
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = stored
    _write_json(scratch / "config.json", config)
    for file in sorted(source.iterdir()):
        if file.is_file() and any(fnmatch(file.name, pattern) for pattern in COPIED):
            shutil.copyfile(file, scratch / file.name)
    if len(files) > 1:
        where = {tensor: file for file, tensors in files.items() for tensor in tensors}
        total = sum(tensor.numel() * _stored(name, tensor, dtype).itemsize for name, tensor in parameters.items())
        _write_json(scratch / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def _replace(scratch: Path, out: Path) -> None:
    for file in scratch.iterdir():
        file.chmod(0o644)  # safetensors makes 0o600
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    scratch.chmod(0o755)  # mkdtemp makes 0o700
    if out.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old.", dir=out.parent))
        out.rename(old / out.name)
        scratch.rename(out)
        shutil.rmtree(old)
    else:
        scratch.rename(out)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
