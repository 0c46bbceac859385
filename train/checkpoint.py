"""Checkpoints of model, optimizer and data position: whole or not there, and loadable on any mesh.

    OUT/checkpoints/step-00000042/   the tensors, written by torch.distributed.checkpoint
                                 complete.json   written last: a folder without it is ignored

The position in the data is one integer, the packs consumed, valid only under the same data state. The learning rate and
everything random are functions of the step, so no other state is kept and another world size resumes exactly. The flags
of optimizer, schedule and router are those of the run that goes on; the mark keeps those it was trained under, so that
a change can be told. It keeps what the model is too: names and shapes of tensors do not tell a model from one of fewer
layers or of another rope_theta.
"""

import dataclasses
import json
import pickle
import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from formats.shard import write_json
from train.model.config import ModelConfig

MARK = "complete.json"
FOLDER = "checkpoints"
VERSION = 3

# Of a model's configuration: nothing that is trained or computed depends on them.
_MEANS_NOTHING = ("initializer_range", "max_positions")

# Flat names (parameter.exp_avg) instead of nested ones survive a different split of the parameters over ranks.
_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)


@dataclass(frozen=True)
class DataState:
    """What a data position is valid under."""

    fingerprints: tuple[str, ...]
    weights: tuple[float, ...]
    seed: int
    batch_packs: int


@dataclass(frozen=True)
class Position:
    """Where a run stands: optimizer steps done, `skipped` of them because something was not finite, and packs consumed,
    under `data`."""

    step: int
    consumed: int
    data: DataState
    skipped: int = 0


@dataclass(frozen=True)
class Mark:
    """What complete.json says: where the run stands, the recipe (flag name → value) it was trained under, and the model
    (`describe`)."""

    position: Position
    recipe: dict[str, Any]
    model: dict[str, Any]


def step_folder(out: Path, step: int) -> Path:
    return Path(out) / FOLDER / f"step-{step:08d}"


def whole_checkpoints(out: Path) -> list[Path]:
    """The complete checkpoints under a run's folder, oldest first."""
    return sorted(mark.parent for mark in (Path(out) / FOLDER).glob(f"step-*/{MARK}"))


def read_mark(folder: Path) -> Mark:
    """The mark of a complete checkpoint.

    Raises: ValueError when the folder is no complete checkpoint or of another version.
    """
    path = Path(folder) / MARK
    try:
        value = json.loads(path.read_bytes())
        version = value["version"]
        if version == VERSION:
            data = value["data"]
            data = DataState(tuple(data["fingerprints"]), tuple(data["weights"]), data["seed"], data["batch_packs"])
            position = Position(value["step"], value["consumed"], data, value["skipped"])
            if min(position.step, position.consumed, position.skipped) < 0:
                raise ValueError("a position before the beginning")
            mark = Mark(position, dict(value["recipe"]), dict(value["model"]))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"{folder}: no complete checkpoint (there is no {MARK}); name a folder step-… that has one"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not the mark of a checkpoint ({error!r}); resume from another one") from None
    if version != VERSION:
        raise ValueError(
            f"{path}: checkpoint version {version}, this trainer reads {VERSION}; resume with the one that wrote it"
        )
    return mark


def changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What differs between two recipes, as `--weight-decay 0.01 → 0.3, …`; "" when nothing does."""
    names = [name for name in now if before.get(name) != now[name]]
    return ", ".join(f"--{name.replace('_', '-')} {before.get(name)} → {now[name]}" for name in names)


def describe(config: ModelConfig) -> dict[str, Any]:
    """All that a model means, as JSON has it; not how its weights were drawn, nor how long its documents may be."""
    fields = dataclasses.asdict(config)
    return json.loads(json.dumps({name: fields[name] for name in fields if name not in _MEANS_NOTHING}))


def check_model(folder: Path, saved: dict[str, Any], config: ModelConfig, source: Path) -> None:
    """Raise a ValueError that names the first field in which the model of a checkpoint and `config`, that of the folder
    `source`, differ."""
    if difference := _difference(saved, describe(config)):
        raise ValueError(
            f"{folder}: is the checkpoint of another model than {source}, whose {difference}; give --model the folder "
            "of the model that was trained"
        )


def _difference(before: Any, now: Any, name: str = "") -> str:
    """Where two values differ first, as "layers.3.window is 8 and was None"; "" where nowhere."""
    if isinstance(before, dict) and isinstance(now, dict) and before.keys() == now.keys():
        pairs = [(f"{name}.{key}".lstrip("."), before[key], now[key]) for key in now]
    elif isinstance(before, list) and isinstance(now, list):
        if len(before) != len(now):
            return f"{name} are {len(now)} and were {len(before)}"
        pairs = [(f"{name}.{number}", *values) for number, values in enumerate(zip(before, now, strict=True))]
    else:
        return "" if before == now else f"{name} is {now} and was {before}"
    return next((found for key, *values in pairs if (found := _difference(*values, key))), "")


def check_data_state(folder: Path, saved: DataState, now: DataState) -> None:
    """Raise a ValueError that names the first field in which the data of a checkpoint and of this run differ."""
    ways = {
        "fingerprints": "the shards are not the ones of the checkpoint; give --shards the folder it was trained on",
        "weights": "give --shards the weights of the checkpoint",
        "seed": "give --seed the value of the checkpoint",
        "batch_packs": "give --batch-packs the value of the checkpoint",
    }
    for field in dataclasses.fields(DataState):
        before, after = getattr(saved, field.name), getattr(now, field.name)
        if before != after:
            raise ValueError(
                f"{folder}: cannot resume, {field.name} was {before} and is now {after}, so the position in the data "
                f"means nothing: {ways[field.name]}"
            )


class Checkpointer:
    """Saves and loads the checkpoints of one run; every method is called by all ranks together."""

    def __init__(
        self,
        out: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        keep: int,
        *,
        recipe: dict[str, Any] | None = None,
        described: dict[str, Any] | None = None,
        background: bool = False,
    ):
        self._out, self._model, self._optimizer, self._keep = Path(out), model, optimizer, keep
        self._of_mark, self._background = {"recipe": recipe or {}, "model": described or {}}, background
        self._writing: tuple[Position, Future] | None = None
        # A group of its own: planning talks over gloo and must never meet the collectives of training.
        self._group = dist.new_group(backend="gloo")

    def save(self, position: Position) -> Path:
        """Write the checkpoint of `position`, mark it complete, then drop all but the newest `keep`.

        In the background only the copy to host memory is waited for; the mark follows in a later `poll` or `wait`.

        Raises: ValueError, on the ranks that hear of it, when it cannot be written; nothing of it is left then.
        """
        self.wait()
        folder = step_folder(self._out, position.step)
        with _nothing_half_written(folder):
            if dist.get_rank() == 0:
                # What is left of a save that was killed.
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
            dist.barrier(self._group)
            if self._background:
                writing = dcp.async_save(self._state(), checkpoint_id=folder, process_group=self._group)
                self._writing = position, writing
            else:
                dcp.save(self._state(), checkpoint_id=folder, process_group=self._group)
                self._complete(position)
                dist.barrier(self._group)
        return folder

    def poll(self) -> None:
        """Mark a background save that has ended. Not collective: when it ends on rank 0, all ranks have written."""
        if self._writing is not None and self._writing[1].done():
            position, writing = self._writing
            self._writing = None
            with _nothing_half_written(step_folder(self._out, position.step)):
                writing.result()
                self._complete(position)

    def wait(self) -> None:
        """Wait for a background save to be complete, on every rank."""
        if self._writing is not None:
            self._writing[1].exception()  # waits; poll raises
            self.poll()
        if self._background:
            dist.barrier(self._group)

    def _complete(self, position: Position) -> None:
        if dist.get_rank() != 0:
            return
        mark = {"version": VERSION, **dataclasses.asdict(position), **self._of_mark}
        write_json(step_folder(self._out, position.step) / MARK, mark)
        for old in whole_checkpoints(self._out)[: -self._keep] if self._keep else []:
            (old / MARK).unlink()  # first the mark: a kill in between must not leave half a checkpoint that looks whole
            shutil.rmtree(old, ignore_errors=True)  # what a reader on NFS holds stays, and counts for nothing

    def load(self, folder: Path) -> None:
        """Fill model and optimizer in place from a complete checkpoint, whatever mesh wrote it. Weight decay, betas and
        the kernel of the optimizer stay as they are: they are this run's.

        Raises: ValueError when its tensors are not those of this model, or its files cannot be read.
        """
        state = self._state()
        with readable(folder):
            stored = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
        flat = {f"{part}.{name}": value for part, tensors in state.items() for name, value in tensors.items()}
        for name, value in flat.items():
            if name not in stored:
                raise ValueError(f"{folder}: has no {name}, so it is the checkpoint of another model; check --model")
            size = getattr(stored[name], "size", None)
            if isinstance(value, torch.Tensor) and size is not None and size != value.shape:
                raise ValueError(
                    f"{folder}: {name} is {tuple(size)} there and {tuple(value.shape)} in this model; check --model"
                )
        options = {name: value for name, value in state["optimizer"].items() if name.startswith("param_groups.")}
        with readable(folder):
            dcp.load(state, checkpoint_id=folder, process_group=self._group)
        # Before they are set, not after: a fused kernel wants its step counts on the device.
        state["optimizer"] |= options
        set_model_state_dict(self._model, state["model"])
        set_optimizer_state_dict(self._model, self._optimizer, state["optimizer"], options=_OPTIONS)

    def _state(self) -> dict[str, dict]:
        if not self._optimizer.state:
            # torch makes the moments by a step of its own (learning rate and gradients 0), which must not count: so it
            # is when all steps so far were skipped.
            get_optimizer_state_dict(self._model, self._optimizer, options=_OPTIONS)
            for moments in self._optimizer.state.values():
                moments["step"].zero_()
        return {
            "model": get_model_state_dict(self._model),
            "optimizer": get_optimizer_state_dict(self._model, self._optimizer, options=_OPTIONS),
        }


@contextmanager
def _nothing_half_written(folder: Path) -> Iterator[None]:
    """What goes wrong while the checkpoint `folder` is written as one sentence, after its files are gone."""
    try:
        yield
    except (CheckpointException, OSError) as error:
        if dist.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
        free = shutil.disk_usage(folder.parent.parent).free
        raise ValueError(
            f"checkpoint {folder} cannot be written: {_reason(error)} ({free / 2**30:.2f} GiB are free there); make "
            "room, or mend what is broken, and go on from the one before with --resume auto"
        ) from error


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """What goes wrong while the checkpoint `folder` is read as one sentence, a ValueError."""
    try:
        yield
    except (CheckpointException, OSError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(
            f"checkpoint {folder} cannot be read: {_reason(error)}; remove it to go on from the one before"
        ) from error


def _reason(error: BaseException) -> str:
    """Why, in a few words; torch reports the exceptions of all ranks in one, with their tracebacks."""
    if isinstance(error, CheckpointException):
        of_ranks = [reason for reason, _ in error.failures.values()]
        error = next((reason for reason in of_ranks if isinstance(reason, OSError)), of_ranks[0])
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__} {error}".split("\n")[0].strip()
