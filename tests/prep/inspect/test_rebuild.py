"""`prep verify --rebuild`, and what is said of train and eval when one of them is not what it was."""

import json
import shutil
from pathlib import Path

import pytest
from packing_runs import run

from byte_tokenizer import write_byte_tokenizer
from formats.dataset import PackedDataset
from formats.manifest import is_compressed, read_manifest


def test_a_lost_manifest_and_index_are_rebuilt(copy):
    before = read_manifest(copy)
    index = (copy / "packs.arrow").read_bytes()
    (copy / "manifest.json").unlink()
    (copy / "packs.arrow").unlink()
    result = run("verify", copy, "--rebuild", "--deep")
    assert result.exit_code == 0, result.output
    assert "not recovered: inputs" in result.output
    after = read_manifest(copy)
    assert (copy / "packs.arrow").read_bytes() == index
    same = (
        "kind",
        "capacity",
        "align",
        "cp",
        "order",
        "block",
        "seed",
        "algorithm",
        "split",
        "tokenizer_hash",
        "sources",
    )
    same += ("template_hash", "vocab_size", "largest_id", "pad_id", "bos_id", "eos_id", "fingerprint")
    assert {name: getattr(after, name) for name in same} == {name: getattr(before, name) for name in same}
    assert {**after.totals, "lower_bound_packs": 0} == {**before.totals, "lower_bound_packs": 0}
    assert sorted(after.files) == sorted(before.files)


def test_a_lost_index_is_rebuilt_to_the_same_bytes(copy):
    index = (copy / "packs.arrow").read_bytes()
    (copy / "packs.arrow").unlink()
    assert run("verify", copy, "--rebuild").exit_code == 0
    assert (copy / "packs.arrow").read_bytes() == index


def test_of_compressed_shards_it_is_known_that_they_are(sound, tmp_path):
    """Or the trainer would map what cannot be mapped."""
    out, kind = tmp_path / "out", read_manifest(sound).kind
    options = ["--seq-len", 128, "--cp", 2, "--format", kind, "--compress", "zstd", "--workers", 1, "--quiet"]
    assert run("pack", sound.with_name("out.store"), "--out", out, *options).exit_code == 0
    before = read_manifest(out)
    (out / "manifest.json").unlink()
    assert run("verify", out, "--rebuild").exit_code == 0
    assert is_compressed(before)
    assert is_compressed(read_manifest(out))


def test_of_others_it_is_known_that_they_are_not(copy):
    (copy / "manifest.json").unlink()
    assert run("verify", copy, "--rebuild").exit_code == 0
    assert not is_compressed(read_manifest(copy))


def test_an_index_of_other_shards_is_not_taken_for_theirs(sound, copy, tmp_path):
    options = ["--seq-len", 128, "--cp", 2, "--format", read_manifest(sound).kind, "--workers", 1, "--quiet"]
    other = tmp_path / "other"
    assert run("pack", sound.with_name("out.store"), "--out", other, "--order", "input", *options).exit_code == 0
    shutil.copy(other / "packs.arrow", copy / "packs.arrow")
    (copy / "manifest.json").unlink()
    result = run("verify", copy, "--rebuild")
    sentence = f"Error: {copy / 'packs.arrow'}: does not fit the shards; remove it, too, and rebuild both\n"
    assert (result.exit_code, result.output) == (1, sentence)
    assert not (copy / "manifest.json").exists()
    (copy / "packs.arrow").unlink()
    assert run("verify", copy, "--rebuild").exit_code == 0


def test_nothing_is_rebuilt_from_half_of_the_shards(copy):
    (copy / "manifest.json").unlink()
    max((copy / "shards").iterdir()).unlink()
    result = run("verify", copy, "--rebuild")
    assert result.exit_code == 1
    assert "restore the others" in result.output
    assert not (copy / "manifest.json").exists()


@pytest.fixture(scope="module")
def two_parts(tmp_path_factory):
    """A folder of train and eval."""
    root = tmp_path_factory.mktemp("parts")
    write_byte_tokenizer(root)
    (root / "texts.jsonl").write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(60)))
    arguments = ["--tokenizer", root, "--seq-len", 64, "--workers", 1, "--eval-fraction", 0.3, "--quiet", "--no-page"]
    result = run("pack", root / "texts.jsonl", "--out", root / "out", *arguments)
    assert result.exit_code == 0, result.output
    return root / "out"


@pytest.mark.parametrize("part", ["train", "eval"])
def test_a_part_without_a_manifest_is_named_and_rebuilt(two_parts, tmp_path, part):
    out = Path(shutil.copytree(two_parts, tmp_path / "out"))
    lost = (out / part / "manifest.json").read_bytes()
    (out / part / "manifest.json").unlink()
    for command in (["verify"], ["report"], ["lint"], ["plan", "--seq-len", 64]):
        result = run(command[0], out, *command[1:])
        # A plan is of the training set alone.
        assert (result.exit_code, f"{out / part}: no manifest.json" in result.output) == (
            (0, False) if (command[0], part) == ("plan", "eval") else (1, True)
        ), result.output
    assert run("convert", out, "--to", "seqid", "--out", tmp_path / "converted").exit_code == 1
    assert not (tmp_path / "converted").exists()
    with pytest.raises(ValueError, match=r"holds the packed folders train and eval; name one, e\.g\. .*train$"):
        PackedDataset(out)
    assert run("verify", out, "--rebuild").exit_code == 0
    assert json.loads(lost)["fingerprint"] == read_manifest(out / part).fingerprint


@pytest.mark.parametrize("part", ["train", "eval"])
def test_a_part_that_is_gone_is_named(two_parts, tmp_path, part):
    out = Path(shutil.copytree(two_parts, tmp_path / "out"))
    shutil.rmtree(out / part)
    result = run("verify", out)
    assert result.exit_code == 1
    assert f"{out / part}: no such folder of packed shards" in result.output
    other = out / {"train": "eval", "eval": "train"}[part]
    assert f"{other}: sound" in result.output
    assert run("verify", other).exit_code == 0


def test_parts_that_were_swapped_are_named(two_parts, tmp_path):
    out = Path(shutil.copytree(two_parts, tmp_path / "out"))
    (out / "train").rename(out / "held")
    (out / "eval").rename(out / "train")
    (out / "held").rename(out / "eval")
    result = run("verify", out)
    assert result.exit_code == 1
    assert f"{out / 'train'}: holds the packs of eval" in result.output
    assert f"{out / 'eval'}: holds the packs of train" in result.output
