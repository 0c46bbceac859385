"""Runs that are killed, stopped or moved to another mesh go on as if nothing had been."""

import os
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import write_tiny_model
from whole_runs import SAME, arguments, read_metrics, run, same_losses, steps_of

import train.ending
import train.main
from ranks import run_ranks
from train.checkpoint import MARK, step_folder, whole_checkpoints


def kill_after_four(flags):
    with pytest.raises(AssertionError, match="rank 1: died with exit code -9"):
        run_ranks(run, 2, [*flags(), "--no-async-save"], (1, 5, signal.SIGKILL))


def test_a_killed_and_resumed_run_is_bit_equal_to_one_without_a_break(flags, straight, tmp_path):
    kill_after_four(flags)
    out = tmp_path / "out"
    assert [line["step"] for line in steps_of(out)] == [1, 2, 3, 4], "one step more than the checkpoint holds"
    assert not (out / "hf").exists()
    run_ranks(run, 2, flags(resume="auto"))
    assert steps_of(out) == steps_of(straight)
    assert (out / "hf" / "model.safetensors").read_bytes() == (straight / "hf" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (1, {}),
        (3, {}),
        (4, {"dp_replicate": 2}),
        (1, {"micro_packs": 4}),
        (2, {"cp": 2}),
        (4, {"cp": 2, "cp_method": "needed"}),
        (4, {"tp": 2}),
    ],
)
def test_a_resume_on_another_mesh_gives_the_same_losses(world, layout, flags, straight, tmp_path):
    first = whole_checkpoints(straight)[0]
    run_ranks(run, world, flags(resume=first, **layout))
    resumed, wanted = steps_of(tmp_path / "out"), steps_of(straight)[3:]
    assert [line["step"] for line in resumed] == [4, 5, 6]
    for got, want in zip(resumed, wanted, strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-6)
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-5)
        exact = [key for key in SAME if key not in ("loss", "grad_norm")]
        assert [got[key] for key in exact] == [want[key] for key in exact]


@pytest.mark.parametrize(
    ("world", "layout"),
    [(2, {"cp": 2, "cp_method": "ulysses"}), (4, {"tp": 4})],  # 2 key/value heads on 4 tensor ranks
    ids=["context", "tensor"],
)
def test_a_run_over_other_ranks_goes_on_without(world, layout, data, flags, straight, tmp_path):
    """The same losses and evaluations, and a checkpoint that one rank can go on from."""
    out, one = tmp_path / "out", tmp_path / "one"
    evaluated = {"eval_shards": data / "eval"}
    run_ranks(run, world, flags(**layout, **evaluated))
    run_ranks(run, 1, flags(out=one, resume=whole_checkpoints(out)[0], **evaluated))
    for got, want in zip(steps_of(out) + steps_of(one), steps_of(straight) + steps_of(straight)[3:], strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-6)
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-5)
    evaluations = [line["eval_loss"] for folder in (out, one) for line in read_metrics(folder) if "eval_loss" in line]
    assert len(evaluations) == 3
    assert evaluations[1] == pytest.approx(evaluations[2], rel=1e-6)


def test_a_run_goes_on_over_any_pipeline(data, tmp_path):
    """Stages 4 → 1 → 4 of another kind: the losses, evaluations and weights of a run on one rank without a break."""
    model = write_tiny_model(tmp_path / "model", "qwen2", num_hidden_layers=4)  # tied embeddings
    chain = [  # (ranks, layout, the step it goes on from)
        (1, {}, 0),
        (2, {"pp": 2, "pp_schedule": "interleaved"}, 0),
        (1, {}, 2),
        (4, {"pp": 4}, 4),
        (4, {"pp": 2, "pp_schedule": "gpipe"}, 4),
    ]
    outs = [tmp_path / f"out-{number}" for number in range(len(chain))]
    before = None
    for out, (world, layout, step) in zip(outs, chain, strict=True):
        options = {"save_every": 2, "keep": 0, "eval_shards": data / "eval", **layout}
        if step:
            options["resume"] = step_folder(before, step)
        said = run_ranks(run, world, arguments(data, model, out, **options), timeout=200)
        assert ("pipeline" in said[0]) == ("pp" in layout)
        before = before if world == 4 else out
    wanted = steps_of(outs[0])
    for out, (_, _, step) in zip(outs[1:], chain[1:], strict=True):
        same_losses(steps_of(out), wanted[step:])
    evaluations = [[line["eval_loss"] for line in read_metrics(out) if "eval_loss" in line] for out in outs]
    assert evaluations[1] == pytest.approx(evaluations[0], rel=1e-6)
    assert [found[-1] for found in evaluations] == pytest.approx([evaluations[0][-1]] * len(outs), rel=1e-6)
    weights = load_file(outs[0] / "hf" / "model.safetensors")
    for out in outs[1:]:
        exported = load_file(out / "hf" / "model.safetensors")
        assert exported.keys() == weights.keys()
        for name, value in weights.items():
            torch.testing.assert_close(exported[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("number", "layout"), [(signal.SIGTERM, {}), (signal.SIGUSR1, {"pp": 2})])
def test_a_signal_to_any_rank_ends_with_a_checkpoint_and_the_way_on(number, layout, data, flags, straight, tmp_path):
    """The evaluation that was due at that step is made by the run that goes on."""
    evaluated = {"eval_shards": data / "eval", "eval_every": 2}
    said = run_ranks(run, 2, flags(**layout, **evaluated), (1, 2, number))
    assert "stopped by a signal after step 2 of 6" in said[0]
    assert "--resume auto" in said[0]
    assert said[1] == ""
    (checkpoint,) = whole_checkpoints(tmp_path / "out")
    assert checkpoint.name == "step-00000002"
    assert [line["step"] for line in read_metrics(tmp_path / "out") if "eval_loss" in line] == [0]
    run_ranks(run, 2, flags(resume="auto", **layout, **evaluated))
    evaluations = [line for line in read_metrics(tmp_path / "out") if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == [0, 2, 4, 6]
    run_ranks(run, 2, flags(resume="auto", **layout, **evaluated))
    assert [line for line in read_metrics(tmp_path / "out") if "eval_loss" in line] == evaluations, "none twice"
    same_losses(steps_of(tmp_path / "out"), steps_of(straight))
    assert layout or steps_of(tmp_path / "out") == steps_of(straight), "on the same mesh to the bit"


def test_a_resume_says_which_flags_of_the_recipe_changed_and_obeys_them(flags, straight, finished):
    shutil.rmtree(whole_checkpoints(finished)[-1])
    (said,) = run_ranks(run, 1, flags(resume="auto", weight_decay=0.3, steps=5))
    assert "changed since that checkpoint, and in force from here on: --weight-decay 0.01 → 0.3, --steps 6 → 5" in said


def test_and_which_flags_of_the_router(data, tmp_path):
    """One who goes on without them would train without balance."""
    given = data, write_tiny_model(tmp_path / "model", "deepseek_v3", vocab_size=320), tmp_path / "out"
    run_ranks(run, 1, arguments(*given, steps=3, router_aux_loss=0.01, router_bias_rate=0.001, router_log_every=1))
    (said,) = run_ranks(run, 1, arguments(*given, steps=4, router_z_loss=0.1, resume="auto"))
    assert (
        "in force from here on: --steps 3 → 4, --router-aux-loss 0.01 → 0.0, --router-z-loss 0.0 → 0.1, "
        "--router-bias-rate 0.001 → 0.0" in " ".join(said.split())
    )


@pytest.mark.parametrize("when", ["--async-save", "--no-async-save"])
def test_checkpoints_in_the_background_or_in_turn_hold_the_same(when, flags, straight, tmp_path):
    run_ranks(run, 2, [*flags(save_every=1, keep=0), when])
    found = whole_checkpoints(tmp_path / "out")
    assert [folder.name for folder in found] == [f"step-{step:08d}" for step in range(1, 7)]
    assert steps_of(tmp_path / "out") == steps_of(straight)
    run_ranks(run, 2, flags(out=tmp_path / "again", resume=found[2]))
    assert steps_of(tmp_path / "again") == steps_of(straight)[3:]


def test_a_half_written_checkpoint_is_ignored_for_the_last_whole_one(flags, straight, finished):
    (whole_checkpoints(finished)[-1] / MARK).unlink()
    said = run_ranks(run, 2, flags(resume="auto"))
    assert "resumed at step 3" in said[0]
    assert "changed since" not in said[0]
    assert steps_of(finished) == steps_of(straight)


def test_a_finished_run_resumes_to_nothing_but_its_export(flags, straight, finished):
    shutil.rmtree(finished / "hf")
    run_ranks(run, 1, flags(resume="auto"))
    assert read_metrics(finished) == read_metrics(straight)
    assert (finished / "hf" / "model.safetensors").is_file()


def interrupted(count, echo_seconds):
    """Whether the run has noted that it is to stop, after so many SIGINTs on each other's heels."""
    train.ending.ECHO_SECONDS = echo_seconds
    stop = train.main.StopSignal()
    for _ in range(count):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
    return stop.received


def test_ctrl_c_that_torchrun_repeats_counts_once_and_a_later_one_ends_the_run():
    assert run_ranks(interrupted, 1, 3, 60.0) == [True]
    assert run_ranks(interrupted, 1, 1, 0.001) == [True]
    with pytest.raises(AssertionError, match="died with exit code -2"):
        run_ranks(interrupted, 1, 2, 0.001)
