"""`prep pack` and `prep report` over real files: every document arrives, and the sums are right."""

import json
import shutil

import numpy as np
import pytest
from packing_runs import chats, documents_of, packed, run, write_jsonl
from tokenizers import Tokenizer

from formats.dataset import PackedDataset
from formats.manifest import read_manifest
from formats.schema import MAX_CAPACITY
from formats.shard import Shard


def test_every_document_arrives_whole_and_masked(source, tokenizer, tmp_path):
    folder = packed(source, tmp_path / "out", tokenizer, "--algo", "ffd", "--cp", 2)
    documents = documents_of(folder)
    decode = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).decode
    records = list(chats(300))
    assert sorted(documents) == list(range(300))
    for number, record in enumerate(records):
        ids, mask = documents[number]
        targets = decode([i for i, m in zip(ids, mask, strict=True) if m], skip_special_tokens=False)
        if "messages" in record:
            whole = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in record["messages"])
            trained = "".join(m["content"] + "<|im_end|>" for m in record["messages"] if m["role"] == "assistant")
            assert decode(ids, skip_special_tokens=False) == whole
            assert targets == trained
        elif "prompt" in record:
            assert decode(ids, skip_special_tokens=True) == record["prompt"] + record["completion"]
            assert targets == record["completion"] + "<|im_end|>"
        else:
            assert decode(ids, skip_special_tokens=True) == record["text"]


def test_the_same_documents_in_every_format_and_alignment(source, tokenizer, tmp_path):
    reference = documents_of(packed(source, tmp_path / "a", tokenizer))
    store = tmp_path / "a.store"
    for name, arguments in {
        "b": ["--format", "seqid"],
        "c": ["--format", "seqid", "--cp", 4],
        "d": ["--cp", 8, "--algo", "greedy", "--order", "input"],
        "e": ["--algo", "bfd", "--seed", 3, "--max-docs", 4],
    }.items():
        result = run("pack", store, "--out", tmp_path / name, "--seq-len", 256, "--quiet", "--no-page", *arguments)
        assert result.exit_code == 0, result.output
        assert documents_of(tmp_path / name) == reference
        assert not (tmp_path / f"{name}.store").exists()


@pytest.mark.parametrize(
    ("overlong", "kept"), [("drop", "none"), ("truncate", "head"), ("split", "all"), ("stream", "all")]
)
def test_long_documents(tokenizer, tmp_path, overlong, kept):
    source = write_jsonl(tmp_path / "long.jsonl", [{"text": "abcdefgh" * 40}, {"text": "short"}, {"text": "x" * 90}])
    options = ["--algo", "split"] if overlong == "stream" else ["--overlong", overlong]
    result = run("pack", source, "--out", tmp_path / "o", "--tokenizer", tokenizer, "--seq-len", 128, *options)
    assert result.exit_code == 0, result.output
    documents = documents_of(tmp_path / "o")
    length = {"none": None, "head": 128, "all": 321}[kept]
    assert (len(documents[0][0]) if 0 in documents else None) == length
    ledger = json.loads((tmp_path / "o" / "ledger.json").read_text())["total"]
    assert ledger["read"] == {"documents": 3, "tokens": 321 + 6 + 91}
    assert ledger["kept"]["tokens"] == sum(len(ids) for ids, _ in documents.values())
    gone = {"none": ("dropped", 321), "head": ("truncated", 321 - 128), "all": (None, 0)}[kept]
    for book in ("dropped", "truncated"):
        expected = {"overlong": {"documents": int(book == "dropped"), "tokens": gone[1]}} if book == gone[0] else {}
        assert ledger[book] == expected


def test_the_report_adds_up(source, tokenizer, tmp_path):
    folder = packed(source, tmp_path / "out", tokenizer, "--cp", 2)
    result = run("report", folder, "--json")
    assert result.exit_code == 0
    facts = json.loads(result.output)
    assert (folder / "report.html").is_file()
    assert facts == json.loads((folder / "report.json").read_text())
    documents = documents_of(folder)
    dataset = PackedDataset(folder)
    real = sum(len(ids) for ids, _ in documents.values())
    slots = sum(len(dataset[i].input_ids) for i in range(len(dataset)))
    assert facts["documents"] == 300
    assert facts["tokens"] == real
    assert facts["target_tokens"] == sum(sum(mask) for _, mask in documents.values())
    assert facts["slot_padding"] == slots - real
    assert facts["tail_padding"] == len(dataset) * 256 - slots
    assert facts["fill"] == pytest.approx(real / (len(dataset) * 256))
    assert facts["lower_bound_packs"] <= facts["packs"] == len(dataset)
    per_pack = [len(dataset[i].seq_lens) for i in range(len(dataset))]
    assert facts["documents_per_pack"] == {
        "mean": pytest.approx(np.mean(per_pack)),
        "min": min(per_pack),
        "median": np.median(per_pack),
        "max": max(per_pack),
    }
    shown = run("report", folder).output
    for text in (f"{facts['fill']:.2%}", f"{facts['packs']:,}", f"{facts['tokens']:,}", "slot padding", "tail padding"):
        assert text in shown


def test_a_store_that_leaves_out_documents(tokenizer, tmp_path):
    records = [{"text": word} for word in ("one", "two", "one", "three", "two", "four")]
    folder = packed(write_jsonl(tmp_path / "in.jsonl", records), tmp_path / "out", tokenizer, "--dedup", "exact")
    decode = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).decode
    texts = {d: decode(ids, skip_special_tokens=True) for d, (ids, _) in documents_of(folder).items()}
    assert texts == {0: "one", 1: "two", 2: "three", 3: "four"}


@pytest.mark.parametrize("kind", ["thd", "seqid"])
def test_compressed_shards_are_shipped_verified_and_decompressed_to_the_same_bytes(source, tokenizer, tmp_path, kind):
    small, plain, back = tmp_path / "small", tmp_path / "plain", tmp_path / "back"
    arguments = ["--seq-len", 256, "--format", kind, "--shard-size", "64K", "--workers", 1]
    assert run("pack", source, "--out", plain, "--tokenizer", tokenizer, *arguments).exit_code == 0
    result = run("pack", tmp_path / "plain.store", "--out", small, "--compress", "zstd", *arguments)
    assert result.exit_code == 0, result.output
    assert f"training cannot map them: prep convert --to {kind} decompresses" in result.stderr
    assert read_manifest(small).fingerprint == read_manifest(plain).fingerprint
    assert documents_of(small) == documents_of(plain)
    size = {f: sum(p.stat().st_size for p in (f / "shards").iterdir()) for f in (plain, small)}
    assert size[small] < 0.6 * size[plain]
    assert run("verify", small, "--deep").exit_code == 0
    assert "compressed for shipping" in (small / "report.html").read_text()
    assert PackedDataset(small).manifest.options["compress"] == "zstd"

    assert run("convert", small, "--to", kind, "--out", back, "--workers", 1).exit_code == 0
    assert run("verify", back, "--deep").exit_code == 0
    for path in sorted(p for p in plain.rglob("*") if p.is_file() and p.name != "manifest.json"):
        if path.parent.name == "shards":  # they repeat a hash of their options, of which compression is one
            shard, again = (Shard(p, kind) for p in (path, back / path.relative_to(plain)))
            for n in range(len(shard)):
                for want, got in zip(shard.row(n), again.row(n), strict=True):
                    np.testing.assert_array_equal(want, got)
            assert not again.compressed
        else:
            assert path.read_bytes() == (back / path.relative_to(plain)).read_bytes(), path
    refused = run("convert", back, "--to", kind, "--out", tmp_path / "x")
    assert refused.exit_code == 1
    assert f"is {kind} already" in refused.output

    (small / "manifest.json").unlink()
    assert run("verify", small, "--rebuild", "--deep").exit_code == 0
    assert read_manifest(small).options["compress"] == "zstd"


def test_drop_last_stands_in_the_ledger(source, tokenizer, tmp_path):
    packed(source, tmp_path / "whole", tokenizer)
    arguments = ["--seq-len", 256, "--drop-last", "--no-page", "--quiet"]
    assert run("pack", tmp_path / "whole.store", "--out", tmp_path / "out", *arguments).exit_code == 0
    totals = read_manifest(tmp_path / "out").totals
    account = json.loads((tmp_path / "out" / "ledger.json").read_text())["total"]
    assert totals["packs"] == read_manifest(tmp_path / "whole").totals["packs"] - 1
    assert account["dropped"]["last_pack"]["documents"] == 300 - totals["documents"] > 0
    assert account["read"]["tokens"] == totals["tokens"] + account["dropped"]["last_pack"]["tokens"]


def test_nothing_of_eval_is_left_out(source, tokenizer, tmp_path):
    """What is compared over months is the same documents, whether or not training drops its last pack."""
    out = packed(source, tmp_path / "out", tokenizer, "--eval-fraction", 0.3, "--drop-last")
    dropped = {p: json.loads((out / p / "ledger.json").read_text())["total"]["dropped"] for p in ("train", "eval")}
    assert ("last_pack" in dropped["train"], list(dropped["eval"])) == (True, ["to_train"])
    room = [int(tokens) for tokens in PackedDataset(out / "eval").index.tokens]
    assert min(room) < 256, "there is a pack that could have been left out"


def test_a_padding_token_of_id_0_is_one(source, tokenizer, tmp_path):
    folder = shutil.copytree(tokenizer, tmp_path / "tokenizer")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": "<|endoftext|>"}))
    out = packed(source, tmp_path / "out", folder, "--cp", 2)
    assert (read_manifest(out).pad_id, read_manifest(out).eos_id) == (0, 2)
    pack = PackedDataset(out)[0]
    ends = np.cumsum(pack.seq_lens_padded)
    padding = [
        pack.input_ids[end - slot + n : end]
        for end, slot, n in zip(ends, pack.seq_lens_padded, pack.seq_lens, strict=True)
    ]
    assert set(np.concatenate(padding).tolist()) == {0}


@pytest.mark.parametrize("more", [("--overlong", "split"), ("--algo", "split"), ("--overlong", "truncate")])
def test_drop_last_of_documents_in_pieces_stands_in_the_ledger(tokenizer, tmp_path, more):
    """The pack that is left out holds the end of a document, whose other pieces stay, and one that is all there."""
    lengths = (99, 63, 230, 10, 5) if more[0] == "--algo" else (63, 230, 63, 10)  # and the end of each text
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": "x" * n} for n in lengths])
    arguments = ["--tokenizer", tokenizer, "--seq-len", 64, "--drop-last", "--no-page", "--quiet", *more]
    assert run("pack", source, "--out", tmp_path / "out", *arguments).exit_code == 0
    dataset = PackedDataset(tmp_path / "out")
    pieces = [(dataset[n].doc_ids.tolist(), dataset[n].seq_lens.tolist()) for n in range(len(dataset))]
    kept = {}
    for docs, sizes in pieces:
        for doc, size in zip(docs, sizes, strict=True):
            kept[doc] = kept.get(doc, 0) + size
    account = json.loads((tmp_path / "out" / "ledger.json").read_text())["total"]
    whole = {doc: length + 1 for doc, length in enumerate(lengths)}
    assert account["kept"] == {"documents": len(kept), "tokens": sum(kept.values())}
    assert account["dropped"].get("last_pack", {"documents": 0, "tokens": 0}) == {
        "documents": len(whole) - len(kept),
        "tokens": sum(length for doc, length in whole.items() if doc not in kept),
    }
    lost = {r: account["truncated"].get(r, {"tokens": 0})["tokens"] for r in ("overlong", "last_pack")}
    cut = sum(whole[doc] - kept[doc] for doc in kept)
    overlong = max(0, 231 - 64) if more[1] == "truncate" else 0
    assert lost == {"overlong": overlong, "last_pack": cut - overlong}
    assert account["dropped"]["last_pack"]["documents"] > 0
    assert (lost["last_pack"] > 0) == (more[1] == "split")
    assert run("verify", tmp_path / "out", "--deep").exit_code == 0


def test_a_file_address_is_a_folder_of_this_machine(source, tokenizer, tmp_path):
    arguments = ["--tokenizer", tokenizer, "--seq-len", 256, "--quiet", "--no-page"]
    assert run("pack", source, "--out", f"file://{tmp_path}/out/", *arguments).exit_code == 0
    assert run("verify", tmp_path / "out").exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.store"]


def test_the_largest_capacity(source, tokenizer, tmp_path):
    """Its report shows what other lengths would give, as far as there are any."""
    packed(source, tmp_path / "a", tokenizer)
    result = run("pack", tmp_path / "a.store", "--out", tmp_path / "b", "--seq-len", MAX_CAPACITY, "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["whatif"]["rows"]
    assert {row["seq_len"] for row in rows} == {MAX_CAPACITY, MAX_CAPACITY // 2}


def test_optimal_prints_its_bound_and_gap(source, tokenizer, tmp_path):
    packed(source, tmp_path / "a", tokenizer)
    result = run("pack", tmp_path / "a.store", "--out", tmp_path / "b", "--seq-len", 256, "--algo", "optimal")
    assert result.exit_code == 0, result.output
    assert "proven optimal" in result.output or "no packing has fewer than" in result.output
