"""Whole runs of a mixture of experts: elastic over expert, tensor and pipeline ranks, with balanced experts."""

import contextlib
import io
import json
import logging

import numpy as np
import pytest
import torch
from reference import distance
from safetensors.torch import load_file
from tiny_models import write_tiny_model

import train.main
from make_shards import make_shards, random_packs
from ranks import run_ranks
from train.checkpoint import whole_checkpoints
from train.flags import parse

STEPS = 6


def run(argv):
    with contextlib.redirect_stderr(io.StringIO()):
        train.main.train(parse(argv))


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def arguments(tmp_path):
    model = write_tiny_model(tmp_path / "model", "deepseek_v3", vocab_size=320)
    rows = random_packs(np.random.default_rng(0), 10, 160, 4, 320)
    shards = make_shards(tmp_path / "shards", rows, capacity=160, align=4, cp=2)

    def make(out, **changes):
        values = {"shards": shards, "model": model, "out": tmp_path / out, "batch-packs": 4, "steps": STEPS}
        values |= {"epochs": 2, "lr": 1e-3, "device": "cpu", "threads": 1, "save-every": 2, "keep": 0}
        values |= {"router-aux-loss": 0.01, "router-z-loss": 0.001, "router-bias-rate": 0.01, "router-log-every": 1}
        values |= {name.replace("_", "-"): value for name, value in changes.items()}
        return [part for name, value in values.items() for part in (f"--{name}", str(value))]

    return make


def test_from_ep_4_to_ep_2_tp_2_to_pp_2_ep_2(arguments, tmp_path):
    """Same losses, loads and biases as one rank without a break, and the same export from each."""
    run_ranks(run, 1, arguments("alone", recompute="full"))
    run_ranks(run, 4, arguments("ep", ep=4))
    second, third = (whole_checkpoints(tmp_path / "ep")[0], lambda: whole_checkpoints(tmp_path / "ep-tp")[0])
    run_ranks(run, 4, arguments("ep-tp", ep=2, tp=2, resume=second))
    run_ranks(run, 4, arguments("pp-ep", pp=2, ep=2, resume=third()))
    alone = lines(tmp_path / "alone")
    exported = load_file(tmp_path / "alone" / "hf" / "model.safetensors")
    biases = [name for name in exported if name.endswith("e_score_correction_bias")]
    original = load_file(tmp_path / "model" / "model.safetensors")
    assert biases
    for name in biases:
        # Steps of the rate, as many as there were, up or down.
        assert ((exported[name] - original[name]).abs() <= STEPS * 0.01 + 1e-6).all()
        assert (exported[name] != original[name]).any()
    for out, first in (("ep", 1), ("ep-tp", 3), ("pp-ep", 5)):
        got = lines(tmp_path / out)
        assert [line["step"] for line in got] == list(range(first, STEPS + 1))
        for line, want in zip(got, alone[first - 1 :], strict=True):
            assert line["loss"] == pytest.approx(want["loss"], rel=1e-6)
            assert line["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-5)
            assert line["expert_tokens"] == want["expert_tokens"]
            assert line["expert_max_over_mean"] == want["expert_max_over_mean"]
            assert line["dropped_tokens"] == 0
            for loss in ("router_aux_loss", "router_z_loss"):
                assert line[loss] == pytest.approx(want[loss], rel=1e-6)
        weights = load_file(tmp_path / out / "hf" / "model.safetensors")
        assert weights.keys() == exported.keys()
        assert max(distance(weights[name], exported[name]) for name in weights) < 1e-4
        assert all(torch.equal(weights[name], exported[name]) for name in biases)


def test_the_exported_folder_is_what_was_read(arguments, tmp_path):
    """With a learning rate of next to nothing no weight moves: experts pass through every mesh bit by bit."""
    original = load_file(tmp_path / "model" / "model.safetensors")
    # Of 8 experts over 3 ranks each is cut within.
    layouts = ((2, {"ep": 2}), (4, {"ep": 2, "dp_replicate": 2}), (2, {"tp": 2}), (3, {}))
    for out, (world, layout) in zip("abcd", layouts, strict=True):
        unmoved = {"lr": 1e-30, "weight_decay": 0, "router_bias_rate": 0, "steps": 1}
        run_ranks(run, world, arguments(out, **layout, **unmoved))
        weights = load_file(tmp_path / out / "hf" / "model.safetensors")
        assert weights.keys() == original.keys()
        assert all(torch.equal(weights[name], original[name]) for name in original)


def watched(argv):
    """(whether the run made a mesh of experts, what torch warned of)."""
    meshes, said, parallelize = [], [], train.main.parallelize

    class Note(logging.Handler):
        def emit(self, record):
            said.append(record.getMessage())

    def noted(model, mesh, config):
        meshes.append(mesh)
        return parallelize(model, mesh, config)

    logging.getLogger("torch.distributed.tensor").addHandler(Note(logging.WARNING))  # torch cuts off those above
    train.main.parallelize = noted
    run(argv)
    return meshes[0].experts is not None, said


@pytest.mark.parametrize(("family", "layout"), [("llama", {"tp": 2}), ("deepseek_v3", {"tp": 2, "ep": 2})])
def test_a_run_makes_no_mesh_that_it_does_not_need_and_exports_without_warnings(family, layout, arguments, tmp_path):
    model = write_tiny_model(tmp_path / family, family, vocab_size=320)
    given = {"model": model, "steps": 1, "lr": 1e-30, "weight_decay": 0, **layout}
    unbalanced = {f"router-{name}": 0 for name in ("aux-loss", "z-loss", "bias-rate")}
    assert run_ranks(watched, 4, arguments("out", **given, **unbalanced)) == 4 * [(family != "llama", [])]
    written, original = (load_file(f / "model.safetensors") for f in (tmp_path / "out" / "hf", model))
    assert written.keys() - original.keys() <= {"lm_head.weight"}
    assert all(torch.equal(written[name], original[name]) for name in original)
