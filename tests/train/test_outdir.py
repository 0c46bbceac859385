"""The folder of a run: who may use it, and where torchrun's restarts go on."""

import json

import pytest

from train.checkpoint import MARK, step_folder
from train.config import build
from train.outdir import RUN_NAME, RunFolder


def claim(out, resume="never"):
    config = build({"out": str(out), "resume": str(resume)})
    folder = RunFolder(config)
    start = folder._find_start()
    folder._claim()
    return start


def checkpoint_of(out, step):
    folder = step_folder(out, step)
    folder.mkdir(parents=True)
    (folder / MARK).write_text("{}")
    return folder


@pytest.fixture
def restarted(monkeypatch):
    """Says that torchrun has started this process again; `restarted(host=…)`: what the run's record then holds."""

    def say(out, **launcher):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        record = json.loads((out / RUN_NAME).read_bytes())
        record["launcher"] |= launcher
        (out / RUN_NAME).write_text(json.dumps(record))

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-7")
    return say


@pytest.mark.parametrize("resume", ["never", "auto", "path"])
def test_a_restart_goes_on_from_the_runs_own_last_checkpoint_however_it_began(resume, restarted, tmp_path):
    out, earlier = tmp_path / "out", checkpoint_of(tmp_path / "earlier", 3)
    resume = earlier if resume == "path" else resume
    began = claim(out, resume)
    assert began == (earlier if resume == earlier else None)
    restarted(out)
    assert claim(out, resume) == began, "no checkpoint of its own yet"
    for step in (5, 10):
        own = checkpoint_of(out, step)
    assert claim(out, resume) == own


@pytest.mark.parametrize(
    ("launcher", "same"),
    [
        ({}, True),
        ({"pid": -1}, False),  # another launch on this machine
        ({"host": "node-2", "pid": -1}, True),  # rank 0 was on another machine of this launch
        ({"host": "node-2", "pid": -1, "run_id": "job-6"}, False),
        ({"host": "node-2", "run_id": "none"}, False),
    ],
)
def test_only_a_restart_of_the_same_launch_goes_on_unasked(launcher, same, restarted, tmp_path, monkeypatch):
    if launcher.get("run_id") == "none":
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    claim(tmp_path)
    own = checkpoint_of(tmp_path, 5)
    restarted(tmp_path, **launcher)
    if same:
        assert claim(tmp_path) == own
    else:
        with pytest.raises(ValueError, match="already holds a run; go on with it by --resume auto"):
            claim(tmp_path)


def test_a_first_start_never_goes_on_unasked(tmp_path):
    claim(tmp_path)
    checkpoint_of(tmp_path, 5)
    with pytest.raises(ValueError, match="already holds a run"):
        claim(tmp_path)
    with pytest.raises(ValueError, match="is not the last checkpoint"):
        claim(tmp_path, checkpoint_of(tmp_path / "other", 3))


@pytest.mark.parametrize("flag", ["shards", "eval_shards"])
def test_a_packed_folder_is_no_place_for_a_run(flag, tmp_path):
    packed = tmp_path / "packed"
    packed.mkdir()
    (tmp_path / "link").symlink_to(packed)
    (other := tmp_path / "packed-run").mkdir()
    named = f"{packed}:0.5" if flag == "shards" else str(packed)
    for out in (packed, packed / "run", tmp_path / "link" / "a" / "run"):
        with pytest.raises(ValueError, match=f"lies in the packed folder {packed}, which is only read; name another"):
            RunFolder(build({"out": str(out), flag: (named,)}))._find_start()
    assert not list(packed.iterdir())
    assert RunFolder(build({"out": str(other), flag: (named,)}))._find_start() is None
