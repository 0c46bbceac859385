"""What is said at the start of a run that is right, but perhaps not what was meant."""

import numpy as np
import pytest
from whole_runs import run, steps_of

from make_shards import make_shards, random_packs
from ranks import run_ranks
from train import hf
from train.cautions import cautions
from train.data import open_shards
from train.flags import parse
from train.mix import open_training


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """10 packs, of which 8 make a step: an epoch has 2. One is a document of 150 tokens."""
    rows = random_packs(np.random.default_rng(0), 10, 160, 4, 320)
    lens = np.array([150], np.int32)
    rows[7] = np.ones(152, np.int32), np.zeros(152, np.uint8), lens, lens + 2, np.arange(1), np.zeros(1, np.int32)
    return make_shards(tmp_path_factory.mktemp("cautions") / "packs", rows, capacity=160, align=4)


def said(folder, model, *flags, evaluated=()):
    config = parse(["--shards", str(folder), "--model", str(model), "--out", "o", *flags])
    training = open_training(config.data.shards, None, seed=0, batch_packs=8, micro_packs=1)
    return cautions(config, hf.read_config(model), training, {str(path): open_shards(str(path)) for path in evaluated})


def with_positions(model, target, positions):
    text = (model / "config.json").read_text()
    assert '"max_position_embeddings": 512' in text
    target.mkdir()
    (target / "config.json").write_text(text.replace(": 512", f": {positions}"))
    return target


def test_each_has_its_limit(folder, tiny_llama_dir, tmp_path):
    assert said(folder, tiny_llama_dir) == []
    assert said(folder, tiny_llama_dir, "--steps", "2", "--warmup-steps", "1") == []
    (caution,) = said(folder, tiny_llama_dir, "--steps", "5", "--epochs", "2")
    assert caution == "--steps 5 is more than --epochs 2 makes: 4 are trained"
    (caution,) = said(folder, tiny_llama_dir, "--warmup-steps", "2")
    assert caution.startswith("--warmup-steps 2 is all of the 2 steps: ")
    assert said(folder, with_positions(tiny_llama_dir, tmp_path / "150", 150)) == []
    (caution,) = said(folder, with_positions(tiny_llama_dir, tmp_path / "149", 149))
    assert caution.startswith("documents of up to 150 tokens, and the model was made for 149 (max_position_embeddings")


def test_evaluation_packs_are_looked_at_too(folder, tiny_llama_dir, tmp_path):
    rows = random_packs(np.random.default_rng(1), 2, 160, 4, 320)
    other = make_shards(tmp_path / "other", rows, capacity=160, align=4, tokenizer_hash="u")
    (caution,) = said(folder, tiny_llama_dir, evaluated=[other])
    assert caution == f"{other} was made with another tokenizer than what is trained: its loss says little"
    short = with_positions(tiny_llama_dir, tmp_path / "short", 149)
    (caution,) = said(folder, tiny_llama_dir, evaluated=[folder])
    assert caution.startswith(f"{folder} is trained, too: ")
    caution, _ = said(other, short, evaluated=[folder])
    assert caution.startswith("documents of up to 150 tokens")
    assert said(other, short) == []


def test_a_run_says_them_and_does_what_they_say(flags, tmp_path):
    (said,) = run_ranks(run, 1, [*flags(warmup_steps=7, steps=9, save_every=0), "--no-export", "--no-save-last"])
    assert "note: --steps 9 is more than --epochs 2 makes: 6 are trained" in said
    assert "note: --warmup-steps 7 is all of the 6 steps" in said
    assert [line["step"] for line in steps_of(tmp_path / "out")] == [1, 2, 3, 4, 5, 6]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {".lock", "metrics.jsonl", "run.json"}
