"""Documents and sources that are held out for evaluation."""

import json

import numpy as np
from packing_runs import chats, documents_of, packed, run, write_jsonl

from formats.manifest import read_manifest
from prep.encode.mix import take


def test_held_out_documents_stay_held_out_when_data_grows(tokenizer, tmp_path):
    records = list(chats(400, seed=5))
    few = packed(write_jsonl(tmp_path / "few.jsonl", records[:300]), tmp_path / "a", tokenizer, "--eval-fraction", 0.2)
    many = packed(write_jsonl(tmp_path / "many.jsonl", records), tmp_path / "b", tokenizer, "--eval-fraction", 0.2)
    parts = [{s: set(documents_of(folder / s)) for s in ("train", "eval")} for folder in (few, many)]
    for part, count in zip(parts, (300, 400), strict=True):
        assert part["train"].isdisjoint(part["eval"])
        assert len(part["train"] | part["eval"]) == count
        assert 0.1 * count < len(part["eval"]) < 0.3 * count
    assert parts[0]["eval"] == {d for d in parts[1]["eval"] if d < 300}
    assert read_manifest(few / "eval").order == "input"
    total = [json.loads((few / s / "ledger.json").read_text())["total"]["kept"]["tokens"] for s in ("train", "eval")]
    assert sum(total) == json.loads((tmp_path / "a.store" / "store.json").read_text())["tokens"]


def test_a_whole_source_is_held_out(tokenizer, tmp_path):
    sources = [write_jsonl(tmp_path / f"{name}.jsonl", chats(60, seed=n)) for n, name in enumerate("ab")]
    arguments = ["--out", tmp_path / "out", "--tokenizer", tokenizer, "--seq-len", 256, "--workers", 1, "--no-page"]
    assert run("pack", *sources, *arguments, "--eval-source", "b.jsonl").exit_code == 0
    named = {s.name: (s.first_row, s.last_row) for s in read_manifest(tmp_path / "out" / "eval").sources}
    for part, name in (("train", "a.jsonl"), ("eval", "b.jsonl")):
        assert sorted(documents_of(tmp_path / "out" / part)) == list(range(*named[name]))
    result = run("pack", tmp_path / "out.store", "--out", tmp_path / "x", "--seq-len", 256, "--eval-source", "c")
    assert result.exit_code == 1
    assert "--eval-source c is none of the sources a.jsonl, b.jsonl" in result.output


def test_copies_of_a_held_out_source_are_not_trained(tokenizer, tmp_path):
    records = list(chats(60, seed=0))
    sources = [write_jsonl(tmp_path / f"{name}.jsonl", some) for name, some in (("a", records), ("b", records[:20]))]
    arguments = ["--out", tmp_path / "out", "--tokenizer", tokenizer, "--seq-len", 256, "--workers", 1, "--no-page"]
    assert run("pack", *sources, *arguments, "--eval-source", "b.jsonl").exit_code == 0
    held_out = [row for row, record in enumerate(records) if record in records[:20]]
    assert sorted(documents_of(tmp_path / "out" / "train")) == sorted({*range(60)} - {*held_out})
    assert sorted(documents_of(tmp_path / "out" / "eval")) == [*held_out, *range(60, 80)]
    ledger = json.loads((tmp_path / "out" / "train" / "ledger.json").read_text())["sources"]
    dropped = {name: account["dropped"]["to_eval"]["documents"] for name, account in ledger.items()}
    assert dropped == {"a.jsonl": len(held_out), "b.jsonl": 20}


def test_what_is_held_out_of_a_share_is_the_fraction_asked_for():
    """The documents of a share and those that are held out are chosen by one hash, but not by the same end of it."""
    hashes = np.random.default_rng(0).integers(0, 2**64, 20_000, dtype=np.uint64)
    rows, lengths = np.arange(len(hashes)), np.full(len(hashes), 10, np.int32)
    for share in (0.05, 0.1, 0.5):
        taken = take(rows, lengths, hashes, round(share * 10 * len(hashes)))
        held_out = (hashes[taken] < np.uint64(int(0.1 * 2**64))).mean()
        assert abs(held_out - 0.1) < 0.03
