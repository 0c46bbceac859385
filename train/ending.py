"""How a run ends before its last step: told to by a signal, or by an error, and with which command it goes on."""

import json
import math
import os
import shlex
import signal
import sys
import time
import traceback
from pathlib import Path
from types import FrameType

import torch

ECHO_SECONDS = 2.0
"""Ctrl-C reaches a rank twice within this time: from the terminal, and by way of torchrun."""


class StopSignal:
    """Notes SIGTERM, SIGUSR1 and SIGINT, on which the run ends after its step. Repeats change nothing, for one stop may
    arrive twice: Ctrl-C and schedulers can signal every process of a job, and torchrun passes on what it got. A later
    SIGINT alone, from somebody at the keyboard, ends the process at once."""

    def __init__(self):
        self.received = False
        self._first_interrupt = math.inf
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        if number == signal.SIGINT:
            self._first_interrupt = min(self._first_interrupt, time.monotonic())
            if time.monotonic() - self._first_interrupt > ECHO_SECONDS:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)


def resume_command() -> str:
    """The command line of this run with `--resume auto`, as a person would type it (on each of its nodes)."""
    before = [None, *sys.argv[1:]]
    arguments = [a for a, b in zip(sys.argv[1:], before, strict=False) if "--resume" not in (a, b)]
    arguments = [a for a in arguments if not a.startswith("--resume=")]
    launcher = ["python"]
    if "LOCAL_WORLD_SIZE" in os.environ:
        launcher = ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"]]
        nodes = int(os.environ["WORLD_SIZE"]) // int(os.environ["LOCAL_WORLD_SIZE"])
        if nodes > 1:
            launcher += ["--nnodes", str(nodes), "--rdzv-backend", "c10d", "--rdzv-endpoint", os.environ["MASTER_ADDR"]]
        if (restarts := os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) != "0":
            launcher += ["--max-restarts", restarts]
    return shlex.join([*launcher, sys.argv[0], *arguments, "--resume", "auto"])


def fail(error: Exception) -> int:
    """Say why the run ends, on stderr and in the summary that torchrun prints after it; returns the exit code.

    A ValueError is a sentence for the user, an OSError says what the machine refuses, and where a GPU's memory is full
    there are ways out. Anything else is a defect and shows where.
    """
    if isinstance(error, torch.OutOfMemoryError):
        error = ValueError(
            f"{str(error).partition(chr(10))[0]} Take --recompute full, fewer --micro-packs or more ranks to share the "
            "model; prep plan --model says beforehand what fits"
        )
    if isinstance(error, OSError) and error.strerror:
        error = ValueError(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
    message = f"train: error: {error}" if isinstance(error, ValueError) else traceback.format_exc()
    print(message, file=sys.stderr, flush=True)
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps({"message": message, "timestamp": int(time.time())}), encoding="utf-8")
    return 1
