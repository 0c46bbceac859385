"""Every finding of lint, made on purpose; and none where nothing is wrong."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from byte_tokenizer import CHATML, write_byte_tokenizer
from formats.dataset import PackedDataset
from prep.cli import main
from prep.encode.tokenizer import read_tokenizer
from prep.inspect.documents import Chunk
from prep.inspect.lint import Facts, lint, lint_packed
from prep.inspect.subject import lint_template

BOS, EOS, PAD = 1, 2, 3
SOURCES = (("first.jsonl", 0, 2), ("second.jsonl", 2, 99))


def look(*documents, pad=PAD, truncated=0, notes=(), offsets=None):
    """Lint documents given as (ids, mask), pieces of cut ones with the `offsets` they begin at."""
    lengths = np.array([len(ids) for ids, _ in documents], np.int32)
    count = len(documents)
    chunk = Chunk(
        np.concatenate([np.array(ids, np.int32) for ids, _ in documents]),
        np.concatenate([np.array(mask, np.uint8) for _, mask in documents]),
        np.append(0, np.cumsum(lengths))[:-1].astype(np.int64),
        lengths,
        np.arange(count, dtype=np.int64),
        np.array([0] * count if offsets is None else offsets, np.int32),
        np.full(count, -1, np.int64),
    )
    cut = {"overlong": {"documents": 0, "tokens": truncated}} if truncated else {}
    read = {"documents": count, "tokens": int(lengths.sum()) + truncated}
    ledger = {"total": {"read": read, "truncated": cut, "notes": dict(notes)}}
    result = lint([chunk], Facts(50, BOS, EOS, pad, SOURCES, ledger))
    return {f["check"]: f for f in result["findings"]}, result


def good(word):
    return ([BOS, 7, word, 9, EOS], [0, 0, 1, 1, 1])


def test_nothing_is_found_where_nothing_is_wrong():
    found, result = look(good(10), good(11), good(12))
    assert found == {}
    assert (result["errors"], result["warnings"], result["documents"]) == (0, 0, 3)


CASES = {
    "no-targets": (([BOS, 5, 6, EOS], [0, 0, 0, 0]), "warning"),
    "all-trained": (([BOS, 5, 6, EOS], [0, 1, 1, 1]), "note"),
    "target-at-start": (([BOS, 5, 6, EOS], [1, 0, 1, 1]), "error"),
    "bos-doubled": (([BOS, BOS, 5, 6, EOS], [0, 0, 0, 1, 1]), "error"),
    "bos-missing": (([5, 6, 7, EOS], [0, 0, 1, 1]), "warning"),
    "end-of-turn-untrained": (([BOS, 5, 6, 7, EOS], [0, 0, 1, 1, 0]), "warning"),
    "no-end-token": (([BOS, 5, 6, 7], [0, 0, 1, 1]), "note"),
    "id-out-of-range": (([BOS, 5, 50, EOS], [0, 0, 1, 1]), "error"),
    "repetitive": (([BOS, *[20, 21, 22] * 40, EOS], [0] * 120 + [1, 1]), "warning"),
    "duplicates": (good(10), "warning"),
}


@pytest.mark.parametrize("check", CASES)
def test_each_finding(check):
    document, level = CASES[check]
    found, result = look(good(10), good(11), good(12), document)
    assert set(found) == {check}
    assert (found[check]["level"], found[check]["count"], found[check]["share"]) == (level, 1, 0.25)
    assert found[check]["examples"] == ["document 3 of second.jsonl"]
    assert result["errors"] == (level == "error")


def test_a_later_piece_of_a_document_has_no_begin():
    """Where `--overlong split` cuts: neither the token that begins documents is missing there, nor is it doubled."""
    piece = ([8, BOS, 9, EOS], [0, 0, 1, 1])
    assert set(look(good(10), piece)[0]) == {"bos-missing"}
    assert look(good(10), piece, offsets=[0, 5])[0] == {}
    assert look(good(10), ([BOS, *piece[0]], [0, *piece[1]]), offsets=[0, 5])[0] == {}
    assert look(good(10), ([BOS, BOS, 8, EOS], [0, 0, 1, 1]), offsets=[0, 5])[0] == {}


def test_an_end_that_stands_first_ends_nothing():
    """Families whose begin is their end: <|endoftext|> before and behind."""
    first = ([EOS, BOS, 8, 9], [0, 0, 1, 1])
    assert set(look(good(10), first)[0]) == {"bos-missing", "no-end-token"}


def test_what_is_wrong_everywhere_is_an_error():
    found, _ = look(*[([BOS, 5, word, 7, EOS], [0, 0, 1, 1, 0]) for word in (8, 9, 10, 11)])
    assert found["end-of-turn-untrained"]["level"] == "error"
    assert len(found["end-of-turn-untrained"]["examples"]) == 3
    found, _ = look(*[([BOS, word, EOS], [0, 0, 0]) for word in (8, 9)])
    assert found["no-targets"]["level"] == "error"


def test_pad_and_truncation():
    found, _ = look(good(10), good(11), pad=EOS, truncated=10)
    assert found["pad-is-eos"]["level"] == "note"
    assert (found["truncated"]["level"], found["truncated"]["count"], found["truncated"]["share"]) == (
        "warning",
        10,
        0.5,
    )


def test_what_encoding_could_not_train_is_found():
    found, result = look(good(10), good(11), notes={"turns_without_words": 3, "compared_with_hf": 9})
    assert (found["turns-without-words"]["level"], found["turns-without-words"]["count"]) == ("warning", 3)
    assert result["warnings"] == 1
    found, result = look(good(10), notes={"tool_calls_left_out": 2, "reasoning_left_out": 5})
    assert (found["tool-calls-left-out"]["level"], found["tool-calls-left-out"]["count"]) == ("warning", 2)
    assert (found["reasoning-left-out"]["level"], result["warnings"]) == ("note", 1)


def template(folder: Path, text: str):
    folder.mkdir()
    write_byte_tokenizer(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": text}))
    return folder


def test_unstable_template(tmp_path):
    assert lint_template(read_tokenizer(template(tmp_path / "a", CHATML))) == []
    unstable = "{% for m in messages %}{{ m['role'] if loop.last else '' }}{{ m['content'] }}{% endfor %}"
    (found,) = lint_template(read_tokenizer(template(tmp_path / "b", unstable)))
    assert found["check"] == "template-prefix-unstable"
    refusing = "{{ raise_exception('never') }}"
    (found,) = lint_template(read_tokenizer(template(tmp_path / "c", refusing)))
    assert found["check"] == "template-refuses"


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_raw_store_and_shards_give_the_same_findings(tmp_path):
    write_byte_tokenizer(tmp_path)
    path = tmp_path / "in.jsonl"
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho <b>"}]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for _ in range(4)))
    arguments = ["--tokenizer", tmp_path, "--seq-len", 128, "--workers", 1, "--quiet", "--no-page"]
    assert run("pack", path, "--out", tmp_path / "out", *arguments).exit_code == 0
    counts = []
    for subject in (path, tmp_path / "out.store", tmp_path / "out"):
        result = run("lint", subject, "--tokenizer", tmp_path, "--json")
        assert result.exit_code == 0, result.output
        (value,) = json.loads(result.output).values()
        counts.append({f["check"]: f["count"] for f in value["findings"]})
    assert counts == [{"duplicates": 3, "pad-is-eos": 4}] * 3
    shown = run("lint", tmp_path / "out").output
    assert "warning duplicates: 3 (75.00%)" in shown
    assert "document 1 of in.jsonl, pack 0" in shown
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["lint"]["warnings"] == 1
    assert run("lint", path).exit_code == 1
    assert "raw input needs --tokenizer" in run("lint", path).output


def test_any_number_of_workers_finds_the_same(tmp_path):
    from make_shards import make_shards, random_packs

    rows = random_packs(np.random.default_rng(0), 12, 64, 1, 50)
    rows[11] = rows[1]  # duplicates in another shard
    rows[7][1][0] = 1
    folder = make_shards(tmp_path / "s", rows, capacity=64, shard_packs=5, vocab_size=40)
    ledger = {"total": {"read": {"documents": 1, "tokens": 1}, "truncated": {}, "notes": {}}}
    alone, shared = (lint_packed(PackedDataset(folder), ledger, workers) for workers in (1, 2))
    assert alone == shared
    assert {"duplicates", "target-at-start", "id-out-of-range"} <= {f["check"] for f in alone["findings"]}
    (found,) = (f for f in alone["findings"] if f["check"] == "duplicates")
    assert all(place.endswith("pack 11") for place in found["examples"])


def test_errors_exit_with_1(tmp_path):
    write_byte_tokenizer(tmp_path)
    path = tmp_path / "in.jsonl"
    path.write_text('{"input_ids": [5, 6, 7, 2], "labels": [-100, -100, 7, -100]}\n')
    result = run("lint", path, "--tokenizer", tmp_path)
    assert result.exit_code == 1
    assert "error end-of-turn-untrained" in result.output
