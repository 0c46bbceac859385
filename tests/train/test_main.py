"""Whole runs: what they write and export, and what switches, mixtures and bad losses do to them."""

import gzip
import itertools
import json
import math
import shutil

import numpy as np
import pytest
import torch
from tiny_models import write_tiny_model
from torch.distributed.tensor import DTensor
from whole_runs import FIELDS, cli, read_metrics, run, steps_of

import train.main
import train.model.experts
import train.model.probe
from formats.dataset import PackedDataset
from make_shards import make_shards, random_packs
from ranks import run_ranks
from train.checkpoint import step_folder, whole_checkpoints
from train.flags import parse


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


def test_a_step_without_targets_has_loss_0_and_is_counted(flags, tmp_path):
    rows = [(ids, mask * 0, *rest) for ids, mask, *rest in random_packs(np.random.default_rng(2), 4, 160, 4, 320)]
    shards = make_shards(tmp_path / "silent", rows, capacity=160, align=4)
    run_ranks(run, 2, [*flags(shards=shards, steps=2), "--no-save-last"])
    assert not list((tmp_path / "out").glob("checkpoints/step-*")), "no checkpoint was asked for"
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
    errors = run_ranks(poisoned, 2, flags(save_every=1, **layout))
    assert all("not finite, so stopped before the optimizer step; lower --lr" in error for error in errors)
    assert [line["step"] for line in steps_of(tmp_path / "out")] == [1]
    assert whole_checkpoints(tmp_path / "out") == [step_folder(tmp_path / "out", 1)], (
        "written beside the step that failed"
    )


def test_or_is_skipped_on_request(flags, tmp_path):
    assert run_ranks(poisoned, 2, flags(on_nonfinite="skip")) == [None, None]
    lines = steps_of(tmp_path / "out")
    assert [line["loss"] is None for line in lines] == [False, True, False, False, False, False]


def test_a_mixture_trains_evaluates_on_several_sets_and_resumes_only_as_itself(flags, data, tmp_path):
    two = [f"{data / 'train'}:3", f"{data / 'eval'}:1"]
    mixture = [*flags(shards=two[0], steps=2), "--shards", two[1]]
    sets = ["--eval-shards", str(data / "eval"), "--eval-shards", str(data / "train")]
    (said,) = run_ranks(run, 1, [*mixture, *sets, "--profile", "1", "--eval-packs", "2"])
    assert "--profile traces nothing: it begins after 2 steps, and 2 are left" in said
    assert f"mixture: {data / 'train'} 76.9%, 10 packs an epoch = 1.00 passes; {data / 'eval'} 23.1%" in said
    evaluated = [line for line in read_metrics(tmp_path / "out") if "eval_loss" in line]
    folders = [str(data / "eval"), str(data / "train")]
    assert [line["eval_shards"] for line in evaluated] == 2 * folders
    first_two = [int(PackedDataset(folder).index.target_tokens[:2].sum()) for folder in folders]
    assert [line["eval_target_tokens"] for line in evaluated] == 2 * first_two
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
    assert f"{read_metrics(out)[-1]['tokens_per_second_per_device']:,.0f} tokens/s a device" in said
    for rank in range(2):
        trace = json.loads(gzip.decompress((out / "profile" / f"rank-{rank}.json.gz").read_bytes()))
        steps = [event["name"] for event in trace["traceEvents"] if event.get("name", "").startswith("ProfilerStep")]
        assert steps == ["ProfilerStep#2"], "the third step, and no other"
    assert list((out / "tensorboard").iterdir())


def with_a_wrong_kernel(argv):
    """The error of a run whose grouped products are a little too large; None if it trains with them."""
    right = torch.nn.functional.grouped_mm
    train.model.probe.has_kernel = train.model.experts.has_kernel = lambda x, weight: True
    torch.nn.functional.grouped_mm = lambda x, weight, *, offs: 1.2 * right(x, weight, offs=offs)
    try:
        train.main.train(parse(argv))
    except ValueError as error:
        return str(error)


def test_a_run_looks_at_the_kernel_of_its_experts_before_it_writes_anything(flags, tmp_path):
    model = write_tiny_model(tmp_path / "mixtral", "mixtral", vocab_size=320, intermediate_size=80)
    (error,) = run_ranks(with_a_wrong_kernel, 1, flags(model=model, steps=1))
    assert "computes experts in float32 on cpu (no GPU) wrongly" in str(error)
    assert not (tmp_path / "out").exists()
