"""One run at a time in OUT: who is kept out, for how long, and who is not."""

import errno
import fcntl
import json
import os
import platform
import signal
import subprocess
import sys
import threading

import pytest
from whole_runs import ROOT, cli, read_metrics, run

import train.alone
import train.main
from ranks import run_ranks
from train.alone import LOCK_NAME, hold
from train.checkpoint import whole_checkpoints
from train.config import build
from train.hf_write import save_weights
from train.outdir import RUN_NAME, RunFolder

HOLDER = """
import sys, time
from pathlib import Path
from train.alone import hold
file = hold(Path(sys.argv[1]))
print("holds", flush=True)
time.sleep(600)
"""


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(train.alone, "PATIENCE_SECONDS", 0)


@pytest.fixture
def holder(tmp_path):
    """A process that holds tmp_path."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)}) as process:
        assert process.stdout.readline() == b"holds\n"
        yield process
        process.kill()


def start(out, resume="never"):
    folder = RunFolder(build({"out": str(out), "resume": str(resume)}))
    return folder, folder._find_start()


@pytest.mark.parametrize("resume", ["never", "auto"])
def test_a_second_run_is_refused_as_long_as_the_first_lives(resume, at_once, tmp_path):
    first, _ = start(tmp_path)
    first._claim()
    alive = rf"being written by a run that is alive \(process {os.getpid()} on {platform.node()}\); stop it, or name"
    with pytest.raises(ValueError, match=alive):
        start(tmp_path, resume)
    first = None
    start(tmp_path, "auto")[0]._claim()
    first, _ = start(tmp_path, "auto")
    with pytest.raises(ValueError, match=alive):
        start(tmp_path, resume)


def test_of_two_that_begin_at_once_in_a_new_folder_one_goes_on(at_once, tmp_path):
    out = tmp_path / "out"
    (first, _), (second, _), (third, _) = start(out), start(out, "auto"), start(out)
    assert not out.exists()
    first._claim()
    record = (out / RUN_NAME).read_bytes()
    with pytest.raises(ValueError, match="is alive"):
        second._claim()
    first = None
    with pytest.raises(ValueError, match="another run has begun there meanwhile"):
        third._claim()
    assert (out / RUN_NAME).read_bytes() == record


def test_a_killed_run_keeps_nobody_out(at_once, holder, tmp_path):
    with pytest.raises(ValueError, match=f"process {holder.pid} on "):
        hold(tmp_path)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    start(tmp_path)[0]._claim()
    assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == os.getpid()


def test_a_run_that_is_about_to_end_is_waited_for(holder, tmp_path, capsys):
    threading.Timer(0.5, holder.kill).start()
    hold(tmp_path)
    assert (
        capsys.readouterr().err == f"train: waiting for process {holder.pid} on {platform.node()} to leave {tmp_path}\n"
    )


def test_a_file_system_without_locks_is_told_and_one_that_fails_is_named(tmp_path, monkeypatch, capsys):
    def flock(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    number = errno.ENOLCK
    hold(tmp_path)
    assert capsys.readouterr().err == f"train: nothing keeps a second run out of {tmp_path}: No locks available\n"
    number = errno.EIO
    with pytest.raises(OSError, match="Input/output error"):
        hold(tmp_path)


def cli_at_once(argv):
    train.alone.PATIENCE_SECONDS = 0
    return cli(argv)


def test_a_run_that_finds_another_one_in_its_folder_changes_nothing(flags, finished):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.name != LOCK_NAME}
    with hold(finished):
        ((code, said),) = run_ranks(cli_at_once, 1, flags(resume="auto", steps=7), process_group=False)
    assert (code, len(said.splitlines())) == (1, 1)
    assert said.startswith(f"train: error: --out {finished} is being written by a run that is alive")
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.name != LOCK_NAME} == before


def run_that_tries_at_its_end(argv, out):
    """What another run hears that comes when this one exports."""
    heard = []

    def export(*args):
        try:
            hold(out)
        except ValueError as error:
            heard.append(str(error))
        return save_weights(*args)

    train.alone.PATIENCE_SECONDS = 0
    train.main.hf_write.save_weights = export
    run(argv)
    return heard


def test_the_first_rank_holds_the_folder_to_its_end(flags, tmp_path):
    out = tmp_path / "out"
    heard = run_ranks(run_that_tries_at_its_end, 2, flags(steps=1), out)
    assert [len(of_rank) for of_rank in heard] == [1, 1]
    assert all("is alive" in of_rank[0] for of_rank in heard)
    assert len(read_metrics(out)) == 1
    assert len(whole_checkpoints(out)) == 1
