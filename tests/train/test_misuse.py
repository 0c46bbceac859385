"""What is wrong is said in one sentence, and nothing is changed."""

import itertools
import json
import os
import resource
import shutil

import pytest
from whole_runs import cli, run, spoil, steps_of

import train.main
from ranks import run_ranks
from train.checkpoint import whole_checkpoints
from train.flags import parse


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("missing", "no such folder of packed shards"),
        ("train and eval", "shards: holds the packed folders train and eval; name one, e.g. "),
        ("init", "--init begins with random weights, but"),
        ("kernel", "Attention backend 'te' is refused: it runs on cuda, not on cpu"),
        ("no weights", "convert its weights to safetensors first, or train from scratch with --init"),
        ("unfinished", "unfinished"),
        ("other version", "format version 99"),
        ("damaged", "is damaged: its hash is not the one in packs.arrow"),
        ("damaged, looked at whole", "00000.arrow: damaged, its checksum is not the one in the manifest"),
        (
            "damaged manifest, ids beyond",
            " and the model has 320 token embeddings, though the manifest says",
        ),
        (
            "damaged evaluation, ids beyond",
            " and the model has 320 token embeddings, though the manifest says",
        ),
        ("truncated", "bytes, but the manifest says"),
        ("sequence ids", "prep convert"),
        ("vocabulary", "the model has 320 token embeddings, but"),
        ("out holds other things", "holds something that is no run of this trainer"),
        ("out is a file", "is a file; name a folder"),
        ("no model", "config.json cannot be read"),
        ("checkpoint missing", "no such folder; say never, auto, or the path"),
        ("no checkpoint there", "no complete checkpoint"),
        ("mesh", "1 ranks cannot be divided by pp 1 × dp_replicate 2"),
        ("tp", "1 ranks cannot be divided by pp 1 × dp_replicate 1 × cp 1 × tp 2"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(case, says, flags, tmp_path):
    ((code, said),) = run_ranks(cli, 1, spoil(case, tmp_path, flags), process_group=False)
    assert code == 1
    last = said.splitlines()[-1]
    assert last.startswith("train: error: ")
    assert says in last
    assert "Traceback" not in said
    assert not list(tmp_path.glob("out/checkpoints/*"))
    begun = case.startswith("damaged") and "whole" not in case  # found when its turn comes
    assert begun or case.startswith("out ") or not (tmp_path / "out").exists(), "nothing to stumble over next time"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seed": 4}, "seed was 3 and is now 4"),
        ({"batch_packs": 5}, "batch_packs was 4 and is now 5"),
        ({"shards": "eval"}, "the shards are not the ones of the checkpoint"),
        ({"model": "other"}, "whose norm_eps is 0.001 and was 1e-06; give --model the folder of the model that was tr"),
        ({"steps": 2}, "stands at step 6, behind the 2 that --steps and --epochs ask for; give more, or"),
        ({"resume": "never"}, "already holds a run; go on with it by --resume auto"),
    ],
)
def test_a_resume_that_does_not_fit_says_what_differs_and_changes_nothing(
    changes, says, flags, finished, data, tmp_path
):
    if "shards" in changes:
        changes = {"shards": data / "eval"}
    if "model" in changes:
        changes = {"model": shutil.copytree(flags.args[1], tmp_path / "other")}
        config = json.loads((tmp_path / "other" / "config.json").read_text())
        (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    before = [(finished / name).read_bytes() for name in ("metrics.jsonl", "run.json")]
    argv = flags(**{"resume": "auto", **changes})
    ((code, said),) = run_ranks(cli, 1, argv, process_group=False)
    assert (code, len(said.splitlines())) == (1, 1)
    assert says in said
    assert [(finished / name).read_bytes() for name in ("metrics.jsonl", "run.json")] == before


def on_a_full_disk(argv, step, room):
    """A run of which no file may grow beyond `room` bytes from that step on; the error that it ends with."""
    real, calls = train.main.train_step, itertools.count(1)

    def filling(*args, **options):
        if next(calls) == step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
        return real(*args, **options)

    train.main.train_step = filling
    try:
        train.main.train(parse(argv))
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(
    ("extra", "save_every", "left"),
    [(["--no-async-save"], 3, ["step-00000003"]), ([], 6, [])],
    ids=["at once", "in the background"],
)
def test_a_checkpoint_on_a_full_disk_leaves_nothing_and_the_run_goes_on_from_the_one_before(
    extra, save_every, left, flags, straight, tmp_path
):
    errors = run_ranks(on_a_full_disk, 2, [*flags(save_every=save_every), *extra], 5, 100_000)
    assert all("step-00000006 cannot be written: " in error and "; make room" in error for error in errors)
    assert [folder.name for folder in (tmp_path / "out" / "checkpoints").iterdir()] == left
    run_ranks(run, 2, flags(resume="auto"))
    assert steps_of(tmp_path / "out") == steps_of(straight)


def test_metrics_on_a_full_disk_are_named(flags):
    (error,) = run_ranks(on_a_full_disk, 1, flags(), 2, 100)
    assert "metrics.jsonl cannot be written: File too large; make room and go on" in error


@pytest.mark.parametrize("spoilt", ["cut short", "lost"])
def test_a_checkpoint_that_cannot_be_read_is_named(spoilt, flags, finished):
    last = whole_checkpoints(finished)[-1]
    if spoilt == "lost":
        (last / ".metadata").unlink()
    else:
        for file in last.glob("*.distcp"):
            os.truncate(file, 5000)
    ((code, said),) = run_ranks(cli, 1, flags(resume="auto"), process_group=False)
    assert (code, len(said.splitlines())) == (1, 1)
    assert f"checkpoint {last} cannot be read: " in said
    assert "remove it to go on from the one before" in said


def test_a_damaged_pack_is_trained_where_nobody_is_to_look(flags, tmp_path):
    argv = [part if part != "pack" else "off" for part in spoil("damaged", tmp_path, flags)]
    ((code, said),) = run_ranks(cli, 1, [*argv, "--steps", "1"], process_group=False)
    assert code == 0, said
    assert len(steps_of(tmp_path / "out")) == 1
