"""Metrics in TensorBoard and Weights & Biases, and traces: read back from what a run leaves."""

import sys
import types

import pytest

from train.flags import parse
from train.trackers import WANDB_ID, numbers, open_trackers

NEEDED = ["--shards", "s", "--model", "m"]


def config_of(out, *flags):
    return parse([*NEEDED, "--out", str(out), *flags])


def test_tensorboard_reads_every_value_back_and_a_resume_hides_what_it_repeats(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for first, steps in ((0, (1, 2, 3)), (1, (2, 3))):
        (tracker,) = open_trackers(config_of(tmp_path, "--tensorboard"), first)
        for step in steps:
            tracker.log(step, {"loss": step + 0.5 + 10 * first, "lr": 0.25})
        tracker.close()
    read = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert [(event.step, event.value) for event in read.Scalars("loss")] == [(1, 1.5), (2, 12.5), (3, 13.5)]
    assert [event.value for event in read.Scalars("lr")] == [0.25] * 3


def test_wandb_gets_the_records_and_a_resumed_run_keeps_its_id(tmp_path, monkeypatch):
    runs = []

    class Run:
        def __init__(self, **options):
            self.options, self.logged, self.finished = options, [], False

        def log(self, values, step):
            self.logged.append((step, values))

        def finish(self):
            self.finished = True

    def init(**options):
        runs.append(Run(**options))
        return runs[-1]

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for first in (0, 1):
        (tracker,) = open_trackers(config_of(tmp_path, "--wandb", "project"), first)
        tracker.log(first + 1, {"loss": 2.0})
        tracker.close()
    ids = {run.options["id"] for run in runs}
    assert ids == {(tmp_path / WANDB_ID).read_text()}
    assert [run.logged for run in runs] == [[(1, {"loss": 2.0})], [(2, {"loss": 2.0})]]
    assert all(run.finished and run.options["resume"] == "allow" for run in runs)
    assert runs[0].options["project"] == "project"
    assert runs[0].options["config"]["batch_packs"] == 8


@pytest.mark.parametrize(("flags", "package"), [(["--tensorboard"], "tensorboard"), (["--wandb", "p"], "wandb")])
def test_a_missing_package_is_named(flags, package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=rf"needs the package {package}, which is not installed: pip install"):
        open_trackers(config_of(tmp_path, *flags), 0)


def test_what_keeps_wandb_from_beginning_is_one_sentence(tmp_path, monkeypatch):
    class UsageError(Exception):
        pass

    def init(**options):
        raise UsageError("api_key not configured (no-tty). call wandb.login(key=[your_api_key])\nmore")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    with pytest.raises(ValueError, match=r"--wandb p: api_key not configured .*_key\]\); log in with `wandb"):
        open_trackers(config_of(tmp_path, "--wandb", "p"), 0)


def test_no_flag_no_tracker(tmp_path):
    assert open_trackers(config_of(tmp_path), 0) == []
    assert not list(tmp_path.iterdir())


def test_evaluations_on_several_folders_are_curves_of_their_own():
    assert numbers({"step": 3, "loss": 2.0, "mfu": None}) == {"loss": 2.0}
    for folder in ("a/eval", "b/eval"):
        assert numbers({"step": 3, "eval_shards": folder, "eval_loss": 2.0}) == {f"{folder}/eval_loss": 2.0}
