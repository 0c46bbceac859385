"""Runs under torchrun."""

from whole_runs import spoil, steps_of, torchrun


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
    if len(calls) == 5 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **options)

train.main.train_step = train_step
sys.exit(train.main.main(sys.argv[1:]))
"""


def test_under_torchrun_a_killed_worker_resumes_by_itself(flags, straight, tmp_path):
    script = tmp_path / "killed_once.py"
    script.write_text(KILLED_ONCE)
    done = torchrun(flags(), script=str(script), options=["--max-restarts", "1"])
    assert done.returncode == 0, done.stderr
    assert f"resumed at step 3 from {tmp_path / 'out'}" in done.stderr
    assert steps_of(tmp_path / "out") == steps_of(straight)


def test_under_torchrun_a_damaged_shard_ends_all_ranks_with_one_sentence(flags, tmp_path):
    done = torchrun(spoil("damaged", tmp_path, flags))
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("train: error: ")]
    assert len(said) == 1
    assert "is damaged" in said[0]
    ours = done.stderr[: done.stderr.index(said[0])]
    assert "Traceback" not in ours
