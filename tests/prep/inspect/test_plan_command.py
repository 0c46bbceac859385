"""`prep plan` says what `prep pack` then does, writes nothing, and states the error of a sample."""

import gzip
import json
import random

import numpy as np
import pytest
from click.testing import CliRunner

from byte_tokenizer import write_byte_tokenizer
from formats.dataset import PackedDataset
from prep.cli import main
from prep.encode.options import EncodeOptions
from prep.encode.store import UnitWriter
from prep.inspect import sample
from prep.ledger import Ledger

CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "tie_word_embeddings": True,
}


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("plan")
    write_byte_tokenizer(root)
    draw = random.Random(0)
    lines = [json.dumps({"text": "x" * min(400, int(draw.lognormvariate(4, 1)) + 1)}) + "\n" for _ in range(4000)]
    (root / "in.jsonl").write_text("".join(lines))
    (root / "config.json").write_text(json.dumps(CONFIG))
    arguments = ["--tokenizer", root, "--seq-len", 512, "--cp", 2, "--workers", 1, "--quiet", "--no-page"]
    assert run("pack", root / "in.jsonl", "--out", root / "out", *arguments).exit_code == 0
    return root


def test_the_plan_is_what_packing_gives(root):
    before = sorted(p for p in root.rglob("*"))
    packs = len(PackedDataset(root / "out"))
    for subject, extra in ((root / "in.jsonl", ["--tokenizer", root]), (root / "out.store", []), (root / "out", [])):
        arguments = ["--seq-len", "256,512", "--algo", "greedy,bfd", "--cp", "1,2", "--json", *extra]
        result = run("plan", subject, *arguments)
        assert result.exit_code == 0, result.output
        value = json.loads(result.output)
        rows = {(r["algo"], r["seq_len"], r["cp"]): r for r in value["rows"]}
        assert len(rows) == 8
        assert rows["bfd", 512, 2]["packs"] == packs
        assert rows["bfd", 512, 1]["fill"] > rows["greedy", 512, 1]["fill"]
        assert rows["bfd", 256, 1]["cut"] > 0
        assert value["lengths"]["relative_error_95"] == 0
        assert value["lengths"]["documents"] == 4000
    assert sorted(p for p in root.rglob("*")) == before


def test_of_many_compressed_files_a_few_are_read(tmp_path, root):
    """Each is one unit, however large: reading all of them is what a sample is to spare."""
    lines = (root / "in.jsonl").read_bytes().splitlines(keepends=True)
    for k in range(12):
        (tmp_path / f"{k:02}.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[: 4000 if k % 3 else 1000])))
    found = sample.read_lengths([str(tmp_path)], EncodeOptions(str(root)), 1000)
    sizes = [path.stat().st_size for path in sorted(tmp_path.iterdir())]
    assert (len(found.lengths), found.scale) == (4 * 1000, sum(sizes) / sum(sizes[::3]))
    assert "4 places" in found.origin
    truth = 12 * 4000 - 4 * 3000
    assert abs(len(found.lengths) * found.scale / truth - 1) < 0.1, "the larger files count by their bytes"


def test_units_are_counted_beyond_five_digits(tmp_path):
    """A sample of many gigabytes has more: each must stand beside its own bytes, or its error is another's."""
    (tmp_path / "units").mkdir()
    for number, length in ((10_000, 1), (99_999, 2), (100_000, 3)):
        with UnitWriter(tmp_path, number, "a") as writer:
            writer.write(np.ones(length, np.int32), np.ones(length, np.uint8), np.array([0, length]))
        writer.finish(Ledger())
    assert [lengths.tolist() for lengths in sample._read_units(tmp_path)] == [[1], [2], [3]]


def test_a_sample_states_its_error(root, monkeypatch):
    monkeypatch.setattr(sample, "UNIT_BYTES", 4096)
    truth = sample.read_lengths([str(root / "out.store")], None)
    guess = sample.read_lengths([str(root / "in.jsonl")], EncodeOptions(str(root)), 60_000)
    assert guess.scale > 3
    assert 0 < guess.error < 0.3
    tokens = guess.lengths.sum() * guess.scale
    assert abs(tokens / truth.lengths.sum() - 1) < 2 * guess.error


def test_training(root):
    arguments = ["--seq-len", "256,512", "--algo", "bfd", "--cp", "1", "--model", root, "--gpus", 4]
    value = json.loads(run("plan", root / "out", *arguments, "--batch-tokens", 16384, "--json").output)
    for t in value["training"]:
        assert t["batch_packs"] * t["seq_len"] == 16384
        assert t["steps_per_epoch"] == -(-t["packs"] // t["batch_packs"])
        parts = {name: size for name, size in t["memory_gib"].items() if name != "total"}
        assert t["memory_gib"]["total"] == pytest.approx(sum(parts.values()))
        assert any("optimizer steps an epoch" in w for w in t["warnings"])
    aligned = json.loads(
        run("plan", root / "out", "--seq-len", 256, "--algo", "bfd", "--cp", 32, "--gpus", 32, "--json").output
    )
    assert any("slot padding: documents are short for it" in w for w in aligned["training"][0]["warnings"])
    shown = run("plan", root / "out", *arguments).output
    assert "steps an epoch" in shown
    assert "warning" in shown


def test_experts_that_cannot_be_cut_evenly_are_named(root, tmp_path):
    """4 experts of 64 × 112 over 3 ranks: one has 2 of them. Over 2 ranks, or 8, all have the same."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"num_experts": 4, "num_experts_per_tok": 2}))
    arguments = [root / "out", "--seq-len", 256, "--algo", "bfd", "--cp", "1", "--model", tmp_path, "--json"]
    for gpus, skewed in ((3, True), (2, False), (8, False)):
        (training,) = json.loads(run("plan", *arguments, "--gpus", gpus).output)["training"]
        named = [w for w in training["warnings"] if "the fullest of its ranks holds 1.5 times their mean" in w]
        assert bool(named) == skewed, gpus


def test_misuse(root, tmp_path):
    of_model = [root / "out", "--seq-len", 512, "--cp", 1, "--model", root]
    mixture, sparse = tmp_path, {"num_experts": 4, "num_experts_per_tok": 2}
    (mixture / "config.json").write_text(json.dumps(CONFIG | sparse))
    for arguments, message in (
        ([root / "in.jsonl", "--seq-len", 512], "needs --tokenizer"),
        ([root / "out", "--seq-len", 511, "--cp", 2], "is a multiple of 2·cp"),
        ([root / "out", "--seq-len", 512, "--algo", "x"], "--algo x is none of"),
        ([root / "out", "--seq-len", 512, "--model", root / "none"], "no such file"),
        ([root / "out", "--seq-len", 512, "--gpus", 6, "--tp", 4, "--cp", 1], "is not a multiple of pp 1"),
        ([root / "out", "--seq-len", 512, "--gpus", 6, "--ep", 4, "--cp", 1], "--ep 4 does not divide"),
        ([root / "none.jsonl", "--seq-len", 512, "--tokenizer", root], "none.jsonl"),
        ([*of_model, "--ep", 4], "--ep 4 is for mixtures of experts, and this model has none"),
        ([*of_model, "--gpus", 128, "--pp", 64], "--pp 64 makes more stages than the"),
        (
            [*of_model, "--pp", 2, "--batch-tokens", 2048],
            "--pp 2 needs at least 2 rows a rank and step, and 2048 tokens",
        ),
        ([*of_model[:-1], mixture, "--ep", 8], "--ep 8 does not divide the 4 experts"),
    ):
        result = run("plan", *arguments)
        assert result.exit_code == 1, result.output
        assert message in result.output


@pytest.mark.parametrize(
    "option",
    [("--sample-mb", 0), ("--sample-mb", -1), ("--batch-tokens", 0), ("--mfu", 0), ("--mfu", 7), ("--peak-tflops", 0)],
)
def test_numbers_that_mean_nothing_are_refused(root, option):
    result = run("plan", root / "out", "--seq-len", 512, "--model", root, *option)
    assert result.exit_code == 2
    assert option[0] in result.output
    assert "range" in result.output


def test_a_config_that_is_none_is_named(root, tmp_path):
    wrong = [("nonsense", "config.json: not readable as JSON"), ("[]", "config.json: holds no object")]
    for change, message in (
        ({"hidden_size": None}, "the model's config.json has no 'hidden_size', which its size and cost follow from"),
        ({"num_experts": 4}, "the model's config.json has no 'num_experts_per_tok'"),
        ({"vocab_size": "32"}, "vocab_size of the model's config.json must be a whole number from 1 on, not '32'"),
        ({"model_type": ["llama"]}, "model_type of the model's config.json must be a string, not ['llama']"),
        ({"sliding_window": -1}, "sliding_window of the model's config.json must be a whole number from 0 on, not -1"),
        ({"text_config": [1]}, "text_config of the model's config.json must be an object, not [1]"),
    ):
        wrong.append((json.dumps(CONFIG | change), message))
    for content, message in wrong:
        (tmp_path / "config.json").write_text(content)
        result = run("plan", root / "out", "--seq-len", 512, "--model", tmp_path)
        assert result.exit_code == 1
        assert message in result.output
