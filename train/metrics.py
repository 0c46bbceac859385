"""What a run shows and records: OUT/metrics.jsonl, and a line on the terminal. Only rank 0 has either."""

import atexit
import json
import math
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from train.trackers import Tracker, numbers

METRICS_NAME = "metrics.jsonl"

PLAIN_LINE_SECONDS = 1.0
"""Without a terminal, at most one line in this time (the first and the last step always)."""


def memory_bytes(device: torch.device) -> int:
    """Peak memory of this rank so far: allocated on the GPU, or resident in this process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def cut_back(path: Path, step: int) -> dict[str, Any]:
    """Drop everything after `step` from a metrics file, and a last line that a kill left unfinished; returns the last
    record that stays, {} where none does."""
    last: dict[str, Any] = {}
    if not path.exists():
        return last
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            record = json.loads(line)
            if not line.endswith("\n") or record["step"] > step:
                break
        except (ValueError, KeyError, TypeError):
            break
        kept.append(line)
        last = record
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(path)
    return last


class Metrics:
    """Writes the file and the terminal on rank 0; on other ranks every method does nothing.

    A terminal gets one live line with a progress bar, anything else plain lines. `evaluated`: the file already has the
    evaluations after `first_step` steps.
    """

    def __init__(self, out: Path, steps: int, first_step: int, trackers: Sequence[Tracker] = (), *, enabled: bool):
        self._trackers = trackers
        self._file: TextIO | None = None
        self._progress: Progress | None = None
        self._steps, self._enabled = steps, enabled
        self._last_line = -math.inf
        self.evaluated = False
        if not enabled:
            return
        if first_step == 0:
            (Path(out) / METRICS_NAME).unlink(missing_ok=True)
        last = cut_back(Path(out) / METRICS_NAME, first_step)
        self.evaluated = "eval_loss" in last and last["step"] == first_step
        self._file = open(Path(out) / METRICS_NAME, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        atexit.register(self.close)  # an error must not leave a live line (and a hidden cursor) on the terminal
        self._console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._progress.add_task("train", total=steps, completed=first_step)
            self._live = Live(self._progress, console=self._console)
            self._live.start()

    def step(self, record: dict[str, Any]) -> None:
        """Record one training step; a loss or norm that is not finite becomes null."""
        if not self._enabled:
            return
        self._write({k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in record.items()})
        facts = (
            f"loss {record['loss']:.4f}  norm {record['grad_norm']:.3f}  lr {record['lr']:.2e}  "
            f"{record['tokens_per_second_per_device']:,.0f} tokens/s a device  "
            f"padding {record['padding_fraction']:.1%}  "
            + (f"MFU {record['mfu']:.1%}  " if record["mfu"] is not None else "")
            + f"stall {record['data_stall_seconds']:.3f} s  {record['memory_bytes'] / 2**30:.2f} GiB"
            + (f"  skipped {record['skipped_steps']}" if record["skipped_steps"] else "")
        )
        if self._progress is not None:
            self._progress.update(self._task, completed=record["step"])
            # A line of its own, which a narrow terminal cuts at its end.
            self._live.update(Group(self._progress, Text(facts, no_wrap=True, overflow="ellipsis")))
        elif record["step"] == self._steps or time.monotonic() - self._last_line >= PLAIN_LINE_SECONDS:
            self._last_line = time.monotonic()
            self._console.print(f"step {record['step']}/{self._steps}  {facts}")

    def evaluating(self, done: int, rounds: int) -> None:
        """Show that `done` of an evaluation's `rounds` of packs are through; on the terminal only."""
        if self._progress is not None:
            if done == 0:
                self._eval_task = self._progress.add_task("eval", total=rounds)
            self._progress.update(self._eval_task, completed=done)
            if done == rounds:
                self._progress.remove_task(self._eval_task)

    def evaluation(self, step: int, folder: str, loss: float, targets: int) -> None:
        """Record the mean loss over the target tokens of the evaluation packs of `folder` after `step` steps."""
        if self._enabled:
            self._write(
                {
                    "step": step,
                    "eval_shards": folder,
                    "eval_loss": loss if math.isfinite(loss) else None,
                    "eval_target_tokens": targets,
                }
            )
            self.say(f"step {step}  eval loss {loss:.4f} over {targets:,} target tokens of {folder}")

    def say(self, text: str) -> None:
        """A line for the person who watches, above the live line."""
        if self._enabled:
            self._console.print(text)

    def close(self) -> None:
        if self._progress is not None:
            self._live.stop()
            self._progress = None
        if self._file is not None:
            for tracker in self._trackers:
                tracker.close()
            self._file.close()
            self._file = None

    def _write(self, record: dict[str, Any]) -> None:
        # Flushed line by line: a reader (or a kill) sees whole steps.
        try:
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise ValueError(
                f"{self._file.name} cannot be written: {error.strerror}; make room and go on with --resume auto"
            ) from error
        for tracker in self._trackers:
            tracker.log(record["step"], numbers(record))
