"""Whole runs: what they write, how they resume, and what they say when something is wrong."""

import contextlib
import functools
import gzip
import io
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tiny_models import write_tiny_model
from torch.distributed.tensor import DTensor

import train.main
from make_shards import make_shards, random_packs
from ranks import run_ranks
from train.checkpoint import MARK, step_folder, whole_checkpoints
from train.flags import parse

ROOT = Path(__file__).parents[2]
FIELDS = (
    *("step", "epoch", "loss", "grad_norm", "lr", "tokens", "target_tokens", "padding_fraction", "step_seconds"),
    *("data_stall_seconds", "tokens_per_second", "tokens_per_second_per_device", "flops_per_second_per_device"),
    *("mfu", "memory_bytes"),
)
SAME = ("step", "epoch", "loss", "grad_norm", "lr", "tokens", "target_tokens")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Folders of 10 packs to train on and 3 to evaluate on."""
    folder = tmp_path_factory.mktemp("data")
    for name, seed, count in (("train", 0, 10), ("eval", 1, 3)):
        rows = random_packs(np.random.default_rng(seed), count, 160, 4, 320)
        make_shards(folder / name, rows, capacity=160, align=4)
    return folder


def arguments(data, model, out, /, **changes):
    """The arguments of a run of 6 steps of 4 packs, 3 of them in an epoch, with `changes`."""
    values = {"shards": data / "train", "model": model, "out": out, "batch-packs": 4, "steps": 6, "epochs": 2}
    values |= {"lr": 1e-3, "device": "cpu", "threads": 1, "save-every": 3, "seed": 3}
    values |= {name.replace("_", "-"): value for name, value in changes.items()}
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


@pytest.fixture
def flags(data, tiny_llama_dir, tmp_path):
    """`flags(steps=3, …)` → arguments of a run into tmp_path/out."""
    return functools.partial(arguments, data, tiny_llama_dir, tmp_path / "out")


def read_metrics(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def steps_of(out):
    return [{key: line[key] for key in SAME} for line in read_metrics(out) if "loss" in line]


def run(argv, act=None):
    """A whole run on this rank; `act` = (rank, step, signal) sends itself a signal when the rank begins that step."""
    real, calls = train.main.train_step, itertools.count(1)

    def acting(*args, **options):
        if act is not None and dist.get_rank() == act[0] and next(calls) == act[1]:
            os.kill(os.getpid(), act[2])
        return real(*args, **options)

    train.main.train_step = acting
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        train.main.train(parse(argv))
    return said.getvalue()


@pytest.fixture(scope="module")
def straight(data, tiny_llama_dir, tmp_path_factory):
    """The folder of a run of all 6 steps without a break, on 2 ranks; only to be read."""
    out = tmp_path_factory.mktemp("straight") / "out"
    run_ranks(run, 2, arguments(data, tiny_llama_dir, out))
    return out


@pytest.fixture
def finished(straight, tmp_path):
    """A copy of that run, as tmp_path/out."""
    return shutil.copytree(straight, tmp_path / "out")


def kill_after_four(flags):
    with pytest.raises(AssertionError, match="rank 1: died with exit code -9"):
        run_ranks(run, 2, flags(), (1, 5, signal.SIGKILL))


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


def same_losses(got, wanted):
    assert len(got) == len(wanted) > 0
    for line, want in zip(got, wanted, strict=True):
        assert line["loss"] == pytest.approx(want["loss"], rel=1e-6)
        assert line["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-5)
        assert [line[key] for key in ("step", "epoch", "tokens")] == [want[key] for key in ("step", "epoch", "tokens")]


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


@pytest.mark.slow
def test_a_pipeline_in_bfloat16_trains_the_same(flags, straight, tmp_path):
    run_ranks(run, 4, flags(pp=2, dtype="bfloat16"))
    for got, want in zip(steps_of(tmp_path / "out"), steps_of(straight), strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=2e-2)
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=0.2)


SWITCHES = {"recompute": "full", "dp_replicate": 2, "micro_packs": 2}


@pytest.mark.parametrize(
    ("extra", "close"),
    [(["--cpu-offload", "--no-reshard"], 1e-6), (["--dtype", "bfloat16", "--reduce-dtype", "bfloat16"], 2e-2)],
    ids=["all switches", "bfloat16"],
)
def test_switches_change_the_way_and_not_the_losses(extra, close, flags, straight, tmp_path):
    run_ranks(run, 2, [*flags(**SWITCHES), *extra])
    for got, want in zip(steps_of(tmp_path / "out"), steps_of(straight), strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=close)
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=10 * close)


def test_metrics_evaluation_and_export(flags, data, tiny_llama_dir, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (said,) = run_ranks(run, 1, flags(eval_shards=data / "eval", eval_every=2, warmup_steps=2))
    out = tmp_path / "out"
    lines = read_metrics(out)
    assert [(line["step"], "loss" in line) for line in lines] == [
        *(
            (0, False),
            (1, True),
            (2, True),
            (2, False),
            (3, True),
            (4, True),
            (4, False),
            (5, True),
            (6, True),
            (6, False),
        )
    ]
    trained = [line for line in lines if "loss" in line]
    assert all(tuple(line) == FIELDS for line in trained)
    assert [line["epoch"] for line in trained] == [0, 0, 0, 1, 1, 1]
    assert sum(line["tokens"] for line in trained[:3]) == sum(line["tokens"] for line in trained[3:])
    assert trained[0]["lr"] == pytest.approx(5e-4)
    before, after = lines[0], lines[-1]
    assert before["eval_target_tokens"] == after["eval_target_tokens"] > 0
    assert f"step 6  eval loss {after['eval_loss']:.4f}" in said

    theirs = AutoModelForCausalLM.from_pretrained(out / "hf", dtype=torch.float32)
    theirs.eval()
    assert evaluate_with_transformers(theirs, data / "eval") == pytest.approx(after["eval_loss"], rel=1e-5)
    original = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32)
    assert evaluate_with_transformers(original, data / "eval") == pytest.approx(before["eval_loss"], rel=1e-5)
    assert AutoTokenizer.from_pretrained(out / "hf").chat_template


def test_from_scratch_every_layout_begins_with_the_same_weights(flags, data, tiny_llama_dir, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    bare = tmp_path / "bare"
    shutil.copytree(tiny_llama_dir, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    one, two = tmp_path / "one", tmp_path / "two"
    scratch = {"model": bare, "steps": 2}
    run_ranks(run, 1, [*flags(**scratch, out=one), "--init"])
    run_ranks(run, 2, [*flags(**scratch, out=two, cp=2), "--init"])
    assert [line["loss"] for line in steps_of(two)] == pytest.approx([line["loss"] for line in steps_of(one)], rel=1e-6)
    assert steps_of(one)[0]["loss"] == pytest.approx(math.log(320), rel=0.01), "as good as no knowledge at all"
    AutoModelForCausalLM.from_pretrained(two / "hf")
    assert AutoTokenizer.from_pretrained(two / "hf").chat_template


def evaluate_with_transformers(model, folder):
    """Mean loss over the targets, one document at a time."""
    from formats.dataset import PackedDataset

    dataset, total, targets = PackedDataset(folder), 0.0, 0
    for i in range(len(dataset)):
        pack, start = dataset[i], 0
        for real, slot in zip(pack.seq_lens.tolist(), pack.seq_lens_padded.tolist(), strict=True):
            ids = torch.tensor(pack.input_ids[start : start + real], dtype=torch.int64)
            mask = torch.tensor(pack.loss_mask[start : start + real], dtype=torch.bool)[1:]
            start += slot
            with torch.no_grad():
                logits = model(ids[None], use_cache=False).logits[0, :-1]
            total += torch.nn.functional.cross_entropy(logits[mask], ids[1:][mask], reduction="sum").item()
            targets += int(mask.sum())
    return total / targets


@pytest.mark.parametrize(("number", "layout"), [(signal.SIGTERM, {}), (signal.SIGUSR1, {"pp": 2})])
def test_a_signal_to_any_rank_ends_with_a_checkpoint_and_the_way_on(number, layout, flags, straight, tmp_path):
    said = run_ranks(run, 2, flags(**layout), (1, 2, number))
    assert "stopped by a signal after step 2 of 6" in said[0]
    assert "--resume auto" in said[0]
    assert said[1] == ""
    (checkpoint,) = whole_checkpoints(tmp_path / "out")
    assert checkpoint.name == "step-00000002"
    run_ranks(run, 2, flags(resume="auto", **layout))
    same_losses(steps_of(tmp_path / "out"), steps_of(straight))
    assert layout or steps_of(tmp_path / "out") == steps_of(straight), "on the same mesh to the bit"


def test_checkpoints_in_the_background_hold_the_same(flags, straight, tmp_path):
    run_ranks(run, 2, [*flags(save_every=1, keep=0), "--async-save"])
    found = whole_checkpoints(tmp_path / "out")
    assert [folder.name for folder in found] == [f"step-{step:08d}" for step in range(1, 7)]
    assert steps_of(tmp_path / "out") == steps_of(straight)
    run_ranks(run, 2, flags(out=tmp_path / "again", resume=found[2]))
    assert steps_of(tmp_path / "again") == steps_of(straight)[3:]


def test_a_half_written_checkpoint_is_ignored_for_the_last_whole_one(flags, straight, finished):
    (whole_checkpoints(finished)[-1] / MARK).unlink()
    said = run_ranks(run, 2, flags(resume="auto"))
    assert "resumed at step 3" in said[0]
    assert steps_of(finished) == steps_of(straight)


def test_a_finished_run_resumes_to_nothing_but_its_export(flags, straight, finished):
    shutil.rmtree(finished / "hf")
    run_ranks(run, 1, flags(resume="auto"))
    assert read_metrics(finished) == read_metrics(straight)
    assert (finished / "hf" / "model.safetensors").is_file()


def test_a_step_without_targets_has_loss_0_and_is_counted(flags, tmp_path):
    rows = [(ids, mask * 0, *rest) for ids, mask, *rest in random_packs(np.random.default_rng(2), 4, 160, 4, 320)]
    shards = make_shards(tmp_path / "silent", rows, capacity=160, align=4)
    run_ranks(run, 2, flags(shards=shards, steps=2))
    lines = steps_of(tmp_path / "out")
    assert [(line["step"], line["loss"], line["grad_norm"], line["target_tokens"]) for line in lines] == [
        (1, 0.0, 0.0, 0),
        (2, 0.0, 0.0, 0),
    ]


def poisoned(argv):
    """A run whose second step has an infinite weight; returns the error, if it ends with one."""
    real, calls = train.main.train_step, itertools.count(1)

    def poison(model, *args, **options):
        if next(calls) != 2:
            return real(model, *args, **options)
        own = [p.detach().to_local() if isinstance(p, DTensor) else p.detach() for p in model.parameters()]
        kept = own[-1].clone()
        own[-1].fill_(math.inf)
        before = [p.clone() for p in own]
        result = real(model, *args, **options)
        assert all(map(torch.equal, before, own)), "a skipped step must change nothing"
        own[-1].copy_(kept)
        return result

    train.main.train_step = poison
    try:
        train.main.train(parse(argv))
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("layout", [{}, {"pp": 2}], ids=["dp_shard", "pp"])
def test_a_loss_that_is_not_finite_stops_before_the_optimizer(layout, flags, tmp_path):
    errors = run_ranks(poisoned, 2, flags(**layout))
    assert all("not finite, so stopped before the optimizer step; lower --lr" in error for error in errors)
    assert [line["step"] for line in steps_of(tmp_path / "out")] == [1]


def test_or_is_skipped_on_request(flags, tmp_path):
    assert run_ranks(poisoned, 2, flags(on_nonfinite="skip")) == [None, None]
    lines = steps_of(tmp_path / "out")
    assert [line["loss"] is None for line in lines] == [False, True, False, False, False, False]


def cli(argv):
    """(exit code, stderr) of the command line in a process of its own."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = train.main.main(argv)
    return code, said.getvalue()


def spoil(case, folder, flags):
    """Arguments of a run with something wrong, made from good ones."""
    shards = folder / "shards"
    rows = random_packs(np.random.default_rng(5), 3, 160, 4, 320)
    if case == "missing":
        return flags(shards=folder / "nowhere")
    if case == "out holds other things":
        (folder / "out").mkdir()
        (folder / "out" / "thesis.tex").write_text("")
        return flags()
    if case == "out is a file":
        (folder / "out").write_text("")
        return flags()
    if case == "no model":
        return flags(model=folder)
    if case == "init":
        return [*flags(), "--init"]
    if case == "no weights":
        (folder / "config.json").write_text((flags.args[1] / "config.json").read_text())
        return flags(model=folder)
    if case == "checkpoint missing":
        return flags(resume=folder / "nowhere")
    if case == "no checkpoint there":
        return flags(resume=folder)
    if case in ("mesh", "tp"):
        return flags(**({"dp_replicate": 2} if case == "mesh" else {"tp": 2}))
    if case == "sequence ids":
        return flags(shards=make_shards(shards, rows, capacity=160, align=4, kind="seqid"))
    if case == "vocabulary":
        return flags(shards=make_shards(shards, rows, capacity=160, align=4, vocab_size=321))
    make_shards(shards, rows, capacity=160, align=4)
    if case == "unfinished":
        (shards / "manifest.json").unlink()
    elif case == "other version":
        text = (shards / "manifest.json").read_text()
        (shards / "manifest.json").write_text(text.replace('"format_version": 1', '"format_version": 99'))
    elif case.startswith("damaged"):
        shard = shards / "shards" / "00000.arrow"
        content = bytearray(shard.read_bytes())
        content[content.find(rows[1][0].tobytes()) + 8] ^= 1
        shard.write_bytes(content)
    elif case == "truncated":
        shard = shards / "shards" / "00000.arrow"
        shard.write_bytes(shard.read_bytes()[:-100])
    return flags(shards=shards, verify="full" if case == "damaged, looked at whole" else "pack")


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("missing", "no such folder of packed shards"),
        ("init", "--init begins with random weights, but"),
        ("no weights", "convert its weights to safetensors first, or train from scratch with --init"),
        ("unfinished", "unfinished"),
        ("other version", "format version 99"),
        ("damaged", "is damaged: its hash is not the one in packs.arrow"),
        ("damaged, looked at whole", "00000.arrow: damaged, its checksum is not the one in the manifest"),
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


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seed": 4}, "seed was 3 and is now 4"),
        ({"batch_packs": 5}, "batch_packs was 4 and is now 5"),
        ({"shards": "eval"}, "the shards are not the ones of the checkpoint"),
        ({"resume": "never"}, "already holds a run; go on with it by --resume auto"),
    ],
)
def test_a_resume_that_does_not_fit_says_what_differs_and_changes_nothing(changes, says, flags, finished, data):
    if "shards" in changes:
        changes = {"shards": data / "eval"}
    before = (finished / "metrics.jsonl").read_bytes()
    argv = flags(**{"resume": "auto", **changes})
    ((code, said),) = run_ranks(cli, 1, argv, process_group=False)
    assert (code, len(said.splitlines())) == (1, 1)
    assert says in said
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_a_mixture_trains_evaluates_on_several_sets_and_resumes_only_as_itself(flags, data, tmp_path):
    two = [f"{data / 'train'}:3", f"{data / 'eval'}:1"]
    mixture = [*flags(shards=two[0], steps=2), "--shards", two[1]]
    sets = ["--eval-shards", str(data / "eval"), "--eval-shards", str(data / "train")]
    (said,) = run_ranks(run, 1, [*mixture, *sets])
    assert f"mixture: {data / 'train'} 76.9%, 10 packs an epoch = 1.00 passes; {data / 'eval'} 23.1%" in said
    evaluated = [line["eval_shards"] for line in read_metrics(tmp_path / "out") if "eval_loss" in line]
    assert evaluated == 2 * [str(data / "eval"), str(data / "train")]
    run_ranks(run, 2, [*mixture, "--resume", "auto", "--steps", "4"])
    assert [line["step"] for line in steps_of(tmp_path / "out")] == [1, 2, 3, 4]
    other = [*flags(shards=two[0], steps=6), "--shards", str(data / "eval") + ":2", "--resume", "auto"]
    ((code, said),) = run_ranks(cli, 1, other, process_group=False)
    assert (code, len(said.splitlines())) == (1, 1)
    assert "weights was (0.75, 0.25) and is now (0.6, 0.4)" in said


def test_a_run_is_traced_logged_and_measured_against_the_peak(flags, tmp_path):
    (said, _) = run_ranks(run, 2, [*flags(steps=4, peak_tflops=0.001, profile=1), "--tensorboard"])
    out = tmp_path / "out"
    for line in read_metrics(out):
        assert line["mfu"] == pytest.approx(line["flops_per_second_per_device"] / 1e9)
        assert 2 * line["tokens_per_second_per_device"] == pytest.approx(line["tokens_per_second"])
    assert "MFU" in said
    for rank in range(2):
        trace = json.loads(gzip.decompress((out / "profile" / f"rank-{rank}.json.gz").read_bytes()))
        steps = [event["name"] for event in trace["traceEvents"] if event.get("name", "").startswith("ProfilerStep")]
        assert steps == ["ProfilerStep#2"], "the third step, and no other"
    assert list((out / "tensorboard").iterdir())


def torchrun(argv, ranks=2, script="train/main.py", options=()):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), *options, script, *argv]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)


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
