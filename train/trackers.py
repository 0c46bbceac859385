"""Where metrics go besides OUT/metrics.jsonl: TensorBoard and Weights & Biases, each by its flag, on rank 0."""

import importlib
import uuid
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from train.config import Config, flatten

WANDB_ID = "wandb-id"
"""File under OUT with the id of the run at Weights & Biases, so that a resumed run goes on in its curves."""


class Tracker(Protocol):
    def log(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files under OUT/tensorboard; what an earlier run wrote after `first_step` is hidden."""

    def __init__(self, out: Path, first_step: int):
        module = _import("tensorboard", "torch.utils.tensorboard", "--tensorboard")
        self._writer = module.SummaryWriter(str(out / "tensorboard"), purge_step=first_step + 1)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of the project that `--wandb` names, or a ValueError; files of the client go to OUT."""

    def __init__(self, out: Path, project: str, config: Config):
        module = _import("wandb", "wandb", "--wandb")
        path = out / WANDB_ID
        if not path.exists():
            path.write_text(uuid.uuid4().hex, encoding="utf-8")
        identity = path.read_text(encoding="utf-8").strip()
        options = {"project": project, "id": identity, "resume": "allow", "dir": str(out), "config": flatten(config)}
        try:
            self._run = module.init(**options)
        except Exception as error:  # not logged in, no network: the errors are the package's own
            raise ValueError(
                f"--wandb {project}: {str(error).partition(chr(10))[0]}; log in with `wandb login`, or set "
                "WANDB_MODE=offline, and start again with --resume auto"
            ) from error

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


def check_packages(config: Config) -> None:
    """Raise a ValueError naming the package that a flag needs and that is not installed."""
    if config.run.tensorboard:
        _import("tensorboard", "torch.utils.tensorboard", "--tensorboard")
    if config.run.wandb:
        _import("wandb", "wandb", "--wandb")


def open_trackers(config: Config, first_step: int) -> list[Tracker]:
    """The trackers that the flags ask for; `first_step`: the step that a resumed run has done.

    Raises: ValueError naming the package that is not installed.
    """
    out = Path(config.run.out)
    trackers: list[Tracker] = []
    if config.run.tensorboard:
        trackers.append(TensorBoard(out, first_step))
    if config.run.wandb:
        trackers.append(WandB(out, config.run.wandb, config))
    return trackers


def numbers(record: dict[str, Any]) -> dict[str, float]:
    """The values of a metrics record that a curve can show; those of an evaluation under the whole path of its folder,
    for several end in `eval`."""
    before = f"{Path(record['eval_shards'])}/" if "eval_shards" in record else ""
    return {before + name: value for name, value in record.items() if isinstance(value, int | float) and name != "step"}


def _import(package: str, name: str, flag: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(f"{flag} needs the package {package}, which is not installed: pip install {package}") from None
