"""Whole training runs on a few ranks, what they write, and runs with something wrong."""

import contextlib
import io
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

import train.main
from make_shards import make_shards, random_packs
from train.flags import parse

ROOT = Path(__file__).parents[2]
FIELDS = (
    *("step", "epoch", "loss", "grad_norm", "skipped_steps", "lr", "tokens", "target_tokens", "padding_fraction"),
    *("step_seconds", "data_stall_seconds", "tokens_per_second", "tokens_per_second_per_device"),
    *("flops_per_second_per_device", "mfu", "memory_bytes"),
)
SAME = ("step", "epoch", "loss", "grad_norm", "lr", "tokens", "target_tokens")


def arguments(data, model, out, /, **changes):
    """The arguments of a run of 6 steps of 4 packs, 3 of them in an epoch, with `changes`."""
    values = {"shards": data / "train", "model": model, "out": out, "batch-packs": 4, "steps": 6, "epochs": 2}
    values |= {"lr": 1e-3, "device": "cpu", "threads": 1, "save-every": 3, "seed": 3}
    values |= {name.replace("_", "-"): value for name, value in changes.items()}
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def read_metrics(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def steps_of(out):
    return [{key: line[key] for key in SAME} for line in read_metrics(out) if "loss" in line]


def run(argv, act=None):
    """A whole run on this rank; `act` = (rank, step, signal) sends itself a signal, twice, when the rank begins that
    step."""
    real, calls = train.main.train_step, itertools.count(1)

    def acting(*args, **options):
        if act is not None and dist.get_rank() == act[0] and next(calls) == act[1]:
            for _ in range(2):
                os.kill(os.getpid(), act[2])
        return real(*args, **options)

    train.main.train_step = acting
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        train.main.train(parse(argv))
    return said.getvalue()


def same_losses(got, wanted):
    assert len(got) == len(wanted) > 0
    for line, want in zip(got, wanted, strict=True):
        assert line["loss"] == pytest.approx(want["loss"], rel=1e-6)
        assert line["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-5)
        assert [line[key] for key in ("step", "epoch", "tokens")] == [want[key] for key in ("step", "epoch", "tokens")]


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
    if case == "kernel":
        return flags(attention="te")
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
        return flags(shards=make_shards(shards, rows, capacity=160, align=4, largest_id=320))
    if case.endswith("ids beyond"):
        rows = random_packs(np.random.default_rng(5), 3, 160, 4, 400)
        make_shards(shards, rows, capacity=160, align=4, vocab_size=320, largest_id=319)
        return flags(**{"eval_shards" if "evaluation" in case else "shards": shards})
    if case == "train and eval":
        for part in ("train", "eval"):
            make_shards(shards / part, rows, capacity=160, align=4)
        return flags(shards=shards)
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


def torchrun(argv, ranks=2, script="train/main.py", options=(), **process):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), *options, script, *argv]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, **process)
