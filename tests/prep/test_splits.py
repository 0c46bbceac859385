"""Documents and sources that are held out for evaluation."""

import json

import numpy as np
import pytest
from packing_runs import chats, documents_of, packed, run, write_jsonl
from tokenizers import Tokenizer

from formats.manifest import read_manifest
from prep.encode.mix import take


def test_held_out_documents_stay_held_out_when_data_grows(tokenizer, tmp_path):
    """In front of what there was, behind it, and on both sides: what decides is the document, never where it stands."""
    records = list(chats(400, seed=5))
    sides, kept = {}, {}
    for name, some in {"few": records[50:350], "front": records[:350], "behind": records[50:], "both": records}.items():
        source = write_jsonl(tmp_path / f"{name}.jsonl", some)
        folder = packed(source, tmp_path / name, tokenizer, "--eval-fraction", 0.2)
        for part in ("train", "eval"):
            found = documents_of(folder / part)
            assert len(found) == read_manifest(folder / part).totals["documents"]
            sides[name, part] = {(tuple(ids), tuple(mask)) for ids, mask in found.values()}
            account = json.loads((folder / part / "ledger.json").read_text())["total"]["kept"]
            kept[name, part] = account
        assert sides[name, "train"].isdisjoint(sides[name, "eval"])
        assert kept[name, "train"]["documents"] + kept[name, "eval"]["documents"] == len(some)
        assert 0.1 * len(some) < kept[name, "eval"]["documents"] < 0.3 * len(some)
        stored = json.loads((tmp_path / f"{name}.store" / "store.json").read_text())["tokens"]
        assert kept[name, "train"]["tokens"] + kept[name, "eval"]["tokens"] == stored
        for part in ("train", "eval"):
            assert sides["few", part] <= sides[name, part]
    assert read_manifest(folder / "eval").order == "input"


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


def test_documents_that_are_cut_count_for_their_own_source(tokenizer, tmp_path):
    texts = {"a": ["short", "x" * 700, "y" * 300], "b": ["z" * 600], "c": ["short"]}
    files = [write_jsonl(tmp_path / f"{name}.jsonl", [{"text": t} for t in some]) for name, some in texts.items()]
    out = packed(files[0], tmp_path / "out", tokenizer, *files[1:], "--overlong", "split")
    ledger = json.loads((out / "ledger.json").read_text())
    counts = [ledger["sources"][f"{name}.jsonl"]["notes"].get("split_documents") for name in texts]
    assert (counts, ledger["total"]["notes"]["split_documents"]) == ([2, 1, None], 3)


def test_a_source_that_is_none_is_refused_before_anything_is_encoded(source, tokenizer, tmp_path):
    arguments = ["--out", tmp_path / "x", "--tokenizer", tokenizer, "--seq-len", 256]
    result = run("pack", source, *arguments, "--eval-source", "c")
    assert result.output == "Error: --eval-source c is none of the sources chats.jsonl\n"
    assert not list(tmp_path.iterdir())


def test_a_source_that_all_others_copy_leaves_nothing_to_train(tokenizer, tmp_path):
    files = [write_jsonl(tmp_path / f"{name}.jsonl", [{"text": "one"}, {"text": "two"}]) for name in "ab"]
    arguments = ["--tokenizer", tokenizer, "--seq-len", 256, "--workers", 1, "--quiet"]
    result = run("pack", *files, "--out", tmp_path / "x", *arguments, "--eval-source", "b.jsonl")
    sentence = "--eval-source b.jsonl leaves no document for train among 4, of which 2 are copies; change it"
    kept = f"the token ids are kept, go on from them: prep pack {tmp_path / 'x.store'} …"
    assert result.output == f"Error: {sentence}; {kept}\n"


@pytest.mark.parametrize(("dedup", "mix"), [("none", False), ("exact", False), ("none", True), ("exact", True)])
def test_copies_of_a_held_out_source_are_not_trained_and_do_not_count_twice(dedup, mix, tokenizer, tmp_path):
    """Also where --dedup took the held-out documents for the copies, and where a mix reads the other source twice."""
    records = [{"text": f"text {i}"} for i in range(60)]
    named = {"a": records, "b": [*records[50:], *records[50:53], *({"text": f"more {i}"} for i in range(10))]}
    sources = [write_jsonl(tmp_path / f"{name}.jsonl", some) for name, some in named.items()]
    arguments = ["--tokenizer", tokenizer, "--seq-len", 256, "--workers", 1, "--no-page", "--dedup", dedup]
    (tmp_path / "mix.yaml").write_text("sources: [{name: a.jsonl, repeat: 2}, {name: b.jsonl}]")
    result = run("encode", *sources, "--out", tmp_path / "s", *arguments[:2], *arguments[-2:])
    assert result.exit_code == 0, result.output
    arguments = ["--seq-len", 256, "--no-page", *(["--mix", tmp_path / "mix.yaml"] if mix else [])]
    result = run("pack", tmp_path / "s", "--out", tmp_path / "out", *arguments, "--eval-source", "b.jsonl")
    assert result.exit_code == 0, result.output
    decode = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).decode
    texts = {
        part: sorted(decode(ids, skip_special_tokens=True) for ids, _ in documents_of(tmp_path / "out" / part).values())
        for part in ("train", "eval")
    }
    assert texts["train"] == sorted(f"text {i}" for i in range(50) for _ in range(2 if mix else 1))
    as_read = [record["text"] for record in named["b"]]
    assert texts["eval"] == sorted(as_read if dedup == "none" else set(as_read))
    ledgers = {p: json.loads((tmp_path / "out" / p / "ledger.json").read_text())["sources"] for p in ("train", "eval")}
    copies = {("none", False): 10, ("none", True): 20, ("exact", True): 10}.get((dedup, mix), 0)
    for part, ledger in ledgers.items():
        dropped = ledger["a.jsonl"]["dropped"]
        assert dropped.get("held_out_copy", {"documents": 0})["documents"] == copies, part
    kept = {part: ledger["a.jsonl"]["kept"]["documents"] for part, ledger in ledgers.items()}
    assert kept == {"train": 100 if mix else 50, "eval": 10 if dedup == "exact" else 0}
    assert "held_out_copy" not in ledgers["train"]["b.jsonl"]["dropped"]


def test_a_copy_of_a_held_out_source_is_not_held_out_by_the_fraction(tokenizer, tmp_path):
    texts = {"a": [f"text {i}" for i in range(60)], "b": [f"text {i}" for i in range(30)]}
    files = [write_jsonl(tmp_path / f"{name}.jsonl", [{"text": t} for t in some]) for name, some in texts.items()]
    held_out = ["--eval-source", "b.jsonl", "--eval-fraction", 0.5]
    out = packed(files[0], tmp_path / "out", tokenizer, files[1], *held_out)
    decode = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).decode
    train, evaluated = (
        [decode(ids, skip_special_tokens=True) for ids, _ in documents_of(out / part).values()]
        for part in ("train", "eval")
    )
    assert sorted(text for text in evaluated if text in texts["b"]) == sorted(texts["b"]), "each once"
    assert set(train).isdisjoint(texts["b"])
    assert sorted([*train, *evaluated]) == sorted(texts["a"])
    assert 5 < len(train) < 25


def test_what_is_held_out_of_a_share_is_the_fraction_asked_for():
    """The documents of a share and those that are held out are chosen by one hash, but not by the same end of it."""
    hashes = np.random.default_rng(0).integers(0, 2**64, 20_000, dtype=np.uint64)
    rows, lengths = np.arange(len(hashes)), np.full(len(hashes), 10, np.int32)
    for share in (0.05, 0.1, 0.5):
        taken = take(rows, lengths, hashes, round(share * 10 * len(hashes)))
        held_out = (hashes[taken] < np.uint64(int(0.1 * 2**64))).mean()
        assert abs(held_out - 0.1) < 0.03
