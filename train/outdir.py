"""The folder of a run: whether it may be used, and from which checkpoint the run goes on.

OUT/run.json        written first, marks the folder as a run's, records its flags, who launched it and in which folder
OUT/metrics.jsonl   OUT/checkpoints/   OUT/hf/   OUT/.lock

Nothing is written before all that the flags name has been read and found to fit: a run that ends over a wrong flag
leaves no folder behind that the corrected one would stumble over.
"""

import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist

from formats.shard import write_json
from train.alone import LOCK_NAME, hold
from train.checkpoint import whole_checkpoints
from train.config import Config, flatten
from train.flags import parse_shards

RUN_NAME = "run.json"


class RunFolder:
    """OUT, which no other run may use from `find_start` on (from `claim`, where it holds nothing before), for as long
    as this object lives. Its methods are called by all ranks; rank 0 looks and holds it, the others hear from it."""

    def __init__(self, config: Config):
        self._config, self._out = config, Path(config.run.out)
        self._lock: TextIO | None = None

    def find_start(self) -> Path | None:
        """The checkpoint to go on from (None: from the beginning), after a look at whether OUT may be used.

        Raises: ValueError on every rank when OUT holds something else, is held by another run or lies in packed shards,
        or `--resume` names nothing to resume.
        """
        return self._on_first_rank(self._find_start)

    def claim(self) -> None:
        """Make OUT this run's; raises ValueError on every rank when it cannot be written, or is another's by now."""
        self._on_first_rank(self._claim)

    def _on_first_rank(self, look: Callable[[], Path | None]) -> Path | None:
        answer: list[Path | str | None] = [None]
        if dist.get_rank() == 0:
            try:
                answer = [look()]
            except ValueError as error:
                answer = [str(error)]
            except OSError as error:
                answer = [f"--out {self._out} cannot be used: {error.strerror}; name another folder"]
        dist.broadcast_object_list(answer, src=0)
        if isinstance(answer[0], str):
            raise ValueError(answer[0])
        return answer[0]

    def _find_start(self) -> Path | None:
        out, resume = self._out, self._config.run.resume
        if out.exists() and not out.is_dir():
            raise ValueError(f"--out {out} is a file; name a folder")
        nearest = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
        if not os.access(nearest, os.W_OK):
            raise ValueError(f"--out {out}: {nearest} cannot be written to; name another folder")
        for folder in (*parse_shards(self._config.data.shards)[0], *self._config.data.eval_shards):
            if out.resolve().is_relative_to(Path(folder).resolve()):
                raise ValueError(
                    f"--out {out} lies in the packed folder {folder}, which is only read; name another folder"
                )
        occupied = out.is_dir() and any(path.name != LOCK_NAME for path in out.iterdir())
        if occupied and not (out / RUN_NAME).is_file():
            raise ValueError(f"--out {out} holds something that is no run of this trainer; name another folder")
        if occupied:
            self._lock = hold(out)
        own = whole_checkpoints(out)
        restarted = occupied and _restarted_by_torchrun(out)
        if restarted and (own or resume == "never"):
            resume = "auto"  # wherever the run began, it goes on from what it has reached
        if resume == "never":
            if occupied:
                raise ValueError(
                    f"--out {out} already holds a run; go on with it by --resume auto, or name another folder"
                )
            return None
        if resume == "auto":
            return own[-1] if own else None
        checkpoint = _named_checkpoint(Path(resume))
        if occupied and not restarted and (not own or checkpoint.resolve() != own[-1].resolve()):
            raise ValueError(
                f"--out {out} already holds a run of which {checkpoint} is not the last checkpoint; name another folder"
            )
        return checkpoint

    def _claim(self) -> None:
        self._out.mkdir(parents=True, exist_ok=True)
        if self._lock is None:
            self._lock = hold(self._out)
            if (self._out / RUN_NAME).exists():
                raise ValueError(f"--out {self._out}: another run has begun there meanwhile; name another folder")
        record = {"flags": flatten(self._config), "launcher": _launcher(), "torch": torch.__version__, "version": 1}
        write_json(self._out / RUN_NAME, record | {"folder": os.getcwd()})  # where the paths among the flags begin


def _named_checkpoint(folder: Path) -> Path:
    """`--resume PATH`: a checkpoint itself, or a run's folder, of which the last one is taken."""
    if (found := whole_checkpoints(folder)) and not folder.name.startswith("step-"):
        return found[-1]
    if folder.is_dir():
        return folder  # whether it is whole is read_mark's to say
    raise ValueError(f"--resume {folder}: no such folder; say never, auto, or the path of a checkpoint")


def _launcher() -> dict[str, str | int]:
    """Who started this process: the machine, the process there, and torchrun's name of the launch on all machines."""
    return {"host": platform.node(), "pid": os.getppid(), "run_id": os.environ.get("TORCHELASTIC_RUN_ID", "none")}


def _restarted_by_torchrun(out: Path) -> bool:
    """Whether torchrun (`--max-restarts`) started this process again after the run in `out`, its own, had failed.

    Rank 0 may come back on another machine, where only the name of the launch (`--rdzv-id`) tells whose run it was.
    """
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0:
        return False
    try:
        before, now = json.loads((out / RUN_NAME).read_bytes())["launcher"], _launcher()
        same_machine = before["host"] == now["host"]
        return before["pid"] == now["pid"] if same_machine else before["run_id"] == now["run_id"] != "none"
    except (ValueError, KeyError, TypeError):
        return False
