"""Hugging Face folders: read the configuration, and the weights of this rank (`train.hf_write` writes such folders).

Every rank opens the safetensors files memory-mapped and copies only the rows and columns that its shards hold, so
anonymous memory peaks at the shard plus one slice.
"""

import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from train.model.config import ModelConfig
from train.model.decoder import Decoder
from train.model.families import FAMILIES, model_config
from train.model.sources import Source, Window, weight_sources

HEAD = "lm_head.weight"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = ("F64", "F32", "BF16", "F16")
"""The types of weights that can be trained. Integers and 8-bit floats are codes, which mean nothing without scales."""


def read_config(folder: Path) -> ModelConfig:
    """The `ModelConfig` of a Hugging Face folder.

    Raises ValueError when `config.json` is missing, is not JSON, or describes what is not supported.
    """
    return model_config(read_json(folder / "config.json"))


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
    (`to_empty`). Raises ValueError naming the tensor when the files lack one, hold another shape or no plain numbers,
    or hold one that the model has no place for. `how`:

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
            files = open_files(folder, stack)
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
            files = open_files(folder, stack)
            sources = _check_files(files, config, folder)
            names = dict.fromkeys(name for source in sources.values() for name in source.names)
            slices = {name: files[name].get_slice(name) for name in names}
            table = {name: (stored.get_shape(), stored[:0].dtype) for name, stored in slices.items()}
            answer = [(table, is_stacked(files))]
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
    sources = weight_sources(config, stacked=is_stacked(files))
    _refuse_misfits(files.keys(), sources, config, folder)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Decoder(config).state_dict().items()}
    for ours, source in sources.items():
        expected = source.shape(shapes[ours])
        for name in source.names:
            stored = files[name].get_slice(name)
            if (shape := stored.get_shape()) != expected:
                raise ValueError(f"{name} in {folder} has shape {shape}, its config.json asks for {expected}.")
            if (kind := stored.get_dtype()) not in FLOATS:
                raise ValueError(f"{name} in {folder} is stored as {kind}: convert it to {' or '.join(FLOATS)} first.")
    if config.tied_embeddings and HEAD in files:
        _check_tied(files, sources["embed_tokens.weight"].name, folder)
    return sources


def _check_tied(files: dict[str, Any], embedding: str, folder: Path) -> None:
    """Raise a ValueError when files that repeat a tied head hold another one: transformers then ties nothing. Some rows
    tell, for training a head moves all of them."""
    head, embedded = (files[name].get_slice(name) for name in (HEAD, embedding))
    rows = embedded.get_shape()[0]
    sample = (slice(row, row + 1) for row in range(0, rows, max(1, rows // 64)))
    if head.get_shape() != embedded.get_shape() or not all((head[row] == embedded[row]).all() for row in sample):
        raise ValueError(
            f"{HEAD} in {folder} is not {embedding}, though its config.json ties them: say tie_word_embeddings false "
            "there to train both, or remove the tensor."
        )


def is_stacked(names: Iterable[str]) -> bool:
    """Whether the experts of a layer share one tensor, where published files have one for each (transformers 5)."""
    return any(name.endswith("experts.gate_up_proj") for name in names)


def open_files(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """For every tensor name in the folder the open file that holds it: where there is an index, the one it names."""
    check_weights(folder, from_scratch=False)
    where = _read_index(folder / INDEX) if (folder / INDEX).exists() else {}
    files = {}
    for name in sorted(set(where.values())) or [WEIGHTS]:
        try:
            files[name] = stack.enter_context(safe_open(folder / name, framework="pt"))
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{folder / name} cannot be read as safetensors ({error}): download it again.") from None
    names = {name: set(file.keys()) for name, file in files.items()}
    held = {tensor: files[name] for name, tensors in names.items() for tensor in tensors}
    return held | {tensor: files[name] for tensor, name in where.items() if tensor in names[name]}


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name → name of the file that holds it."""
    content = read_json(path)
    where = content.get("weight_map") if isinstance(content, dict) else None
    if not (isinstance(where, dict) and where and all(isinstance(name, str) for name in where.values())):
        raise ValueError(f"{path} has no weight_map that says which file holds which tensor: download it again.")
    return where


def _refuse_misfits(names: Collection[str], sources: dict[str, Source], config: ModelConfig, folder: Path) -> None:
    """Old files repeat what is computed (frequencies) or tied (the head), and there may be layers that are not trained;
    anything else is a part we would lose."""
    wanted = [name for source in sources.values() for name in source.names]
    for name in wanted:
        if name not in names:
            raise ValueError(f"{folder} holds no tensor {name!r}: its weights are not those its config.json describes.")
    repeated = {HEAD} if config.tied_embeddings else set()
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


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file of a model folder; raises ValueError when it is missing or no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}): name a folder in the Hugging Face layout."
        ) from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): download it again.") from None
