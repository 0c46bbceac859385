"""Runs under torchrun."""

import functools
import os
import shlex
import signal
import sys

import pytest
from whole_runs import run, spoil, steps_of, torchrun

from ranks import run_ranks
from train.checkpoint import step_folder, whole_checkpoints
from train.ending import resume_command


def test_torchrun_trains_and_exports(flags, straight, tmp_path):
    done = torchrun(flags())
    assert done.returncode == 0, done.stderr
    assert steps_of(tmp_path / "out") == steps_of(straight)
    assert f"exported {tmp_path / 'out' / 'hf'}" in done.stderr


KILLED_ONCE = """
import os, signal, sys
import train.main
real, calls = train.main.train_step, []

def train_step(*args, **options):
    calls.append(args)
    if len(calls) == CALL and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **options)

train.main.train_step = train_step
sys.exit(train.main.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("begins", ["at 0", pytest.param("at a checkpoint", marks=pytest.mark.slow)])
def test_under_torchrun_a_killed_worker_resumes_by_itself(begins, flags, straight, tmp_path):
    first, changes = (0, {}) if begins == "at 0" else (3, {"resume": whole_checkpoints(straight)[0], "save_every": 1})
    script = tmp_path / "killed_once.py"
    script.write_text(KILLED_ONCE.replace("CALL", str(5 - first)))
    arguments = [*flags(**changes), "--no-async-save"]
    done = torchrun(arguments, script=str(script), options=["--max-restarts", "1"])
    assert done.returncode == 0, done.stderr
    assert f"resumed at step {4 if first else 3} from {tmp_path / 'out'}" in done.stderr
    assert steps_of(tmp_path / "out") == steps_of(straight)[first:]


SIGNALLED = """
import os, signal, sys, time
import train.main
real, calls, stops, number = train.main.train_step, [], [], int(sys.argv.pop())

class StopSignal(train.main.StopSignal):
    def __init__(self):
        super().__init__()
        stops.append(self)

def train_step(*args, **options):
    calls.append(args)
    if len(calls) == 2:
        if os.environ["RANK"] == "0":
            os.kill(os.getppid(), number)
        if number == signal.SIGUSR1:
            os.kill(os.getpid(), number)
        while not stops[0].received:
            time.sleep(0.05)
        os.kill(os.getpid(), number)
        time.sleep(0.1)
    return real(*args, **options)

train.main.train_step, train.main.StopSignal = train_step, StopSignal
sys.exit(train.main.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_a_signal_to_torchrun_and_every_rank_leaves_a_checkpoint(number, flags, straight, tmp_path):
    """As Slurm does: SIGTERM reaches a rank twice; SIGUSR1 would end torchrun unless it was told to ignore it."""
    script = tmp_path / "signalled.py"
    script.write_text(SIGNALLED)
    before = functools.partial(signal.signal, signal.SIGUSR1, signal.SIG_IGN)
    done = torchrun([*flags(), str(int(number))], script=str(script), preexec_fn=before)
    assert "stopped by a signal after step 2 of 6; go on with:" in done.stderr
    assert (done.returncode == 0) == (number == signal.SIGUSR1), "torchrun itself fails when it is terminated"
    assert whole_checkpoints(tmp_path / "out") == [step_folder(tmp_path / "out", 2)]
    run_ranks(run, 2, flags(resume="auto"))
    assert steps_of(tmp_path / "out") == steps_of(straight)


def test_the_way_on_names_launcher_nodes_and_restarts(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train/main.py", "--out", "a run", "--resume=never", "--steps", "9"])
    arguments = "train/main.py --out 'a run' --steps 9 --resume auto"
    for name in [name for name in os.environ if name.startswith("TORCHELASTIC") or name.endswith("WORLD_SIZE")]:
        monkeypatch.delenv(name)
    assert resume_command() == f"python {arguments}"
    for name, value in {"LOCAL_WORLD_SIZE": "8", "WORLD_SIZE": "8", "MASTER_ADDR": "node-1"}.items():
        monkeypatch.setenv(name, value)
    assert resume_command() == f"torchrun --nproc-per-node 8 {arguments}"
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    nodes = "--nnodes 2 --rdzv-backend c10d --rdzv-endpoint node-1 --max-restarts 3"
    assert resume_command() == f"torchrun --nproc-per-node 8 {nodes} {arguments}"
    assert shlex.split(resume_command())[-6:-2] == ["--out", "a run", "--steps", "9"]


def test_under_torchrun_a_damaged_shard_ends_all_ranks_with_one_sentence(flags, tmp_path):
    done = torchrun(spoil("damaged", tmp_path, flags))
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("train: error: ")]
    assert len(said) == 1
    assert "is damaged" in said[0]
    ours = done.stderr[: done.stderr.index(said[0])]
    assert "Traceback" not in ours
