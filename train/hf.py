"""Hugging Face folders: read the configuration, read the weights of this rank, write a folder that others open.

Reading copies slices: every rank opens the safetensors files memory-mapped and copies only the rows and columns that
its shards hold, so anonymous memory peaks at the shard plus one slice. Writing gathers one tensor at a time to rank 0.
"""

import json
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from train.model.config import ModelConfig
from train.model.decoder import Decoder
from train.model.families import FAMILIES, model_config
from train.model.sources import Source, Window, weight_sources

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
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


def read_config(folder: Path) -> ModelConfig:
    """The `ModelConfig` of a Hugging Face folder.

    Raises ValueError when `config.json` is missing, is not JSON, or describes what is not supported.
    """
    return model_config(_read_json(folder / "config.json"))


def check_weights(folder: Path, *, from_scratch: bool) -> None:
    """Raise a ValueError when `folder` has no weights to begin with, or has some and the run begins `from_scratch`."""
    found = [name for name in (INDEX, WEIGHTS) if (folder / name).exists()]
    if from_scratch and found:
        raise ValueError(
            f"--init begins with random weights, but {folder} holds some ({found[0]}); leave --init out to train them, "
            "or name a folder with config.json and tokenizer alone"
        )
    if not from_scratch and not found:
        raise ValueError(
            f"{folder} holds neither {WEIGHTS} nor {INDEX}: convert its weights to safetensors first, or train from "
            "scratch with --init"
        )


def load_weights(model: nn.Module, folder: Path, how: str = "direct") -> None:
    """Copy the weights of `folder` into `model`, plain or sharded (DTensor), casting to the dtype that is there.

    `model` is a `Decoder` or its stages, perhaps after `fully_shard` and tensor parallelism, and materialised
    (`to_empty`). Raises ValueError naming the tensor when the files lack one, hold another shape, or hold one that the
    model has no place for. `how`:

    direct     every rank opens the files, reads the slices it holds and talks to nobody: for a disk of its own, or a
               file system that serves many readers.
    broadcast  rank 0 reads every tensor once and sends it whole to all, one after the other; each keeps its slices.
               Collective. For a file system that many readers bring down.
    """
    own = model.state_dict()  # not named_parameters: this makes FSDP show the sharded tensors, whatever ran before
    for name, parameter in own.items():
        if parameter.is_meta:
            raise ValueError(f"{name} is on the meta device: call model.to_empty(device=…) before loading weights.")
    with ExitStack() as stack, torch.no_grad():
        if how == "direct" or not dist.is_initialized():
            files = _open_files(folder, stack)
            sources = _check_files(files, model.config, folder)
            for name, part in _own_parts(own, sources):
                part.take(files[name].get_slice(name))
        else:
            _load_broadcast(own, model.config, folder, stack)


@dataclass(frozen=True)
class _Part:
    """What a rank holds of one tensor of the files: `window` of it, which goes to `target` as `source` says."""

    target: Tensor
    source: Source
    window: Window
    step: int

    def take(self, stored: Any) -> None:
        """Fill the target from `stored`, the tensor or the slice object of a file."""
        read = stored[self.window]
        read = read.mT if self.source.transposed else read
        self.target.copy_(
            read if self.step == 1 else read[(slice(None),) * self.source.dim + (slice(None, None, self.step),)]
        )


def _own_parts(own: dict[str, Tensor], sources: dict[str, Source]) -> Iterator[tuple[str, _Part]]:
    """(tensor of the files, what this rank holds of it) for all of its parameters."""
    for name, parameter in own.items():
        shape, offset = tuple(parameter.shape), (0,) * parameter.ndim
        if isinstance(parameter, DTensor):
            shape, offset = compute_local_shape_and_global_offset(
                parameter.shape, parameter.device_mesh, parameter.placements
            )
            parameter = parameter.to_local()
        if 0 in shape:  # more ranks than rows
            continue
        held = tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
        for row, stored, window, step in sources[name].reads(held):
            yield stored, _Part(parameter if row is None else parameter[row], sources[name], window, step)


def _load_broadcast(own: dict[str, Tensor], config: ModelConfig, folder: Path, stack: ExitStack) -> None:
    """`load_weights` where rank 0 alone reads. What is wrong with the files is raised on every rank."""
    answer: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            files = _open_files(folder, stack)
            sources = _check_files(files, config, folder)
            names = dict.fromkeys(name for source in sources.values() for name in source.names)
            slices = {name: files[name].get_slice(name) for name in names}
            table = {name: (stored.get_shape(), stored[:0].dtype) for name, stored in slices.items()}
            answer = [(table, _is_stacked(files))]
        except ValueError as error:
            answer = [str(error)]
    dist.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], str):
        raise ValueError(answer[0])
    table, stacked = answer[0]
    parts = defaultdict(list)
    for name, part in _own_parts(own, weight_sources(config, stacked=stacked)):
        parts[name].append(part)
    device = next(iter(own.values())).device
    for name, (shape, dtype) in table.items():
        whole = files[name].get_tensor(name).to(device) if dist.get_rank() == 0 else None
        whole = torch.empty(shape, dtype=dtype, device=device) if whole is None else whole.contiguous()
        dist.broadcast(whole, src=0)
        for part in parts[name]:
            part.take(whole)
        del whole  # before the next one comes


def _check_files(files: dict[str, Any], config: ModelConfig, folder: Path) -> dict[str, Source]:
    """Where the parameters of `config` stand in `files`; raises ValueError when they are not those of this model."""
    sources = weight_sources(config, stacked=_is_stacked(files))
    _refuse_misfits(files.keys(), sources, config, folder)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Decoder(config).state_dict().items()}
    for ours, source in sources.items():
        expected = source.shape(shapes[ours])
        for name in source.names:
            stored = files[name].get_slice(name).get_shape()
            if stored != expected:
                raise ValueError(f"{name} in {folder} has shape {stored}, its config.json asks for {expected}.")
    return sources


def _is_stacked(names: Iterable[str]) -> bool:
    """Whether the experts of a layer share one tensor, where published files have one for each (transformers 5)."""
    return any(name.endswith("experts.gate_up_proj") for name in names)


def _open_files(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """For every tensor name in the folder the open file that holds it."""
    check_weights(folder, from_scratch=False)
    where = _read_json(folder / INDEX)["weight_map"] if (folder / INDEX).exists() else None
    files = {}
    for name in [WEIGHTS] if where is None else sorted(set(where.values())):
        try:
            files[name] = stack.enter_context(safe_open(folder / name, framework="pt"))
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{folder / name} cannot be read as safetensors ({error}): download it again.") from None
    return {tensor: file for file in files.values() for tensor in file.keys()}  # noqa: SIM118 (not a dict)


def _refuse_misfits(names: Collection[str], sources: dict[str, Source], config: ModelConfig, folder: Path) -> None:
    """Old files repeat what is computed (frequencies) or tied (the head), and there may be layers that are not trained;
    anything else is a part we would lose."""
    wanted = [name for source in sources.values() for name in source.names]
    for name in wanted:
        if name not in names:
            raise ValueError(f"{folder} holds no tensor {name!r}: its weights are not those its config.json describes.")
    repeated = {"lm_head.weight"} if config.tied_embeddings else set()
    unknown = sorted(
        name
        for name in set(names) - set(wanted) - repeated
        if not name.endswith("rotary_emb.inv_freq") and not _is_extra(name, config)
    )
    if unknown:
        raise ValueError(
            f"{folder} holds {len(unknown)} tensors without a place in a {config.family} model, {unknown[0]!r} first."
        )


def _is_extra(name: str, config: ModelConfig) -> bool:
    before = "model.layers."
    return (
        FAMILIES[config.family].extra_layers
        and name.startswith(before)
        and int(name.removeprefix(before).split(".")[0]) >= config.num_layers
    )


def save_weights(
    model: nn.Module, source: Path, out: Path, *, dtype: torch.dtype | None = None, file_bytes: int = FILE_BYTES
) -> None:
    """Write `model` as a Hugging Face folder `out`, with configuration and tokenizer of the folder `source`.

    Collective: every rank calls it, rank 0 writes. `dtype` is that of the stored weights, by default that of the
    parameters. Files hold up to `file_bytes`; several get an index. The folder appears whole: it is written under
    another name and renamed, replacing an earlier export. Experts lie in it as they do in `source`. Tensors of other
    pipeline stages are sent to rank 0, each when its turn comes.
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
        names = _open_files(source, stack).keys() if has_weights else ()
        sources = weight_sources(config, stacked=_is_stacked(names))
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
            parameters[p].numel() // len(sources[p].names) * (dtype or parameters[p].dtype).itemsize for p in parts
        )
        if groups[-1] and used + size > file_bytes:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, start=1)}


def _assemble(name: str, parts: dict[str, tuple[Source, Tensor]], dtype: torch.dtype | None) -> Tensor:
    """The tensor `name` of the files from the whole parameters that make it up."""
    tensor = None
    for source, parameter in parts.values():
        parameter = parameter.to(dtype or parameter.dtype)
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
        own = own.full_tensor()
    rank = dist.get_rank() if dist.is_initialized() else 0
    if holder != 0 and rank == holder:
        # By way of the CPU, where every process group can talk.
        dist.send(own.detach().cpu().contiguous(), dst=0)
    elif holder != 0 and rank == 0:
        own = torch.empty(described.shape, dtype=described.dtype)
        dist.recv(own, src=holder)
    return own.detach().cpu() if rank == 0 else None


def _write_companions(
    scratch: Path, source: Path, files: dict, parameters: dict[str, Tensor], dtype: torch.dtype | None
) -> None:
    config = _read_json(source / "config.json")
    stored = str(dtype or next(iter(parameters.values())).dtype).removeprefix("torch.")
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = stored
    _write_json(scratch / "config.json", config)
    for file in sorted(source.iterdir()):
        if file.is_file() and any(fnmatch(file.name, pattern) for pattern in COPIED):
            shutil.copyfile(file, scratch / file.name)
    if len(files) > 1:
        where = {tensor: file for file, tensors in files.items() for tensor in tensors}
        total = sum(tensor.numel() * (dtype or tensor.dtype).itemsize for tensor in parameters.values())
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


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}): name a folder in the Hugging Face layout."
        ) from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): download it again.") from None


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
