"""`encode` from files to a store: every format, every crash, every refusal."""

import csv
import errno
import gzip
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from prep.cli import main
from prep.encode.command import encode as command
from prep.encode.direct import DirectRenderer
from prep.encode.options import EncodeOptions, MaskPolicy
from prep.encode.run import encode
from prep.encode.sources import SourceSpec, read_mix
from prep.encode.store import DocumentStore, UnitWriter
from prep.encode.tokens import TokenEncoder

WORDS = ["the", "quick", "brown", "fox", "naïve", "日本語", "emigrés", "😀", "x" * 30, "\n", "line\nbreak"]
ROOT = Path(__file__).parents[3]


def texts(count, seed=0, longest=40):
    draw = random.Random(seed)
    return [{"text": " ".join(draw.choices(WORDS, k=draw.randint(1, longest)))} for _ in range(count)]


def chats(count, seed=0):
    draw = random.Random(seed)

    def words():
        return " ".join(draw.choices(WORDS[:-2], k=draw.randint(1, 12)))

    return [
        {
            "messages": [
                {"role": ("user", "assistant")[k % 2], "content": words()} for k in range(2 * draw.randint(1, 4))
            ]
        }
        for _ in range(count)
    ]


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


def documents(store):
    return [tuple(part.tolist() for part in store.document(i)) for i in range(len(store))]


def digest(folder):
    """A hash over all names and bytes below a folder."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def run(inputs, out, tokenizer, *, workers=1, resume=False, **options):
    inputs = inputs if isinstance(inputs, list) else [inputs]
    return encode(inputs, out, EncodeOptions(str(tokenizer), **options), workers=workers, resume=resume)


def write_as(kind, folder, records):
    """The same records in another format; returns what names them."""
    path = folder / f"data.{kind}"
    table = pa.Table.from_pylist(records)
    if kind == "jsonl":
        return write_jsonl(path, records)
    if kind == "jsonl.gz":
        path.write_bytes(gzip.compress(write_jsonl(folder / "x", records).read_bytes()))
        (folder / "x").unlink()
    elif kind == "jsonl.zst":
        path.write_bytes(pa.compress(write_jsonl(folder / "x", records).read_bytes(), "zstd", asbytes=True))
        (folder / "x").unlink()
    elif kind == "json":
        path.write_text(json.dumps(records, indent=1, ensure_ascii=False), encoding="utf-8")
    elif kind == "parquet":
        pq.write_table(table, path, row_group_size=17)
    elif kind == "arrow":
        with pa.ipc.new_file(str(path), table.schema) as writer:
            for batch in table.to_batches(max_chunksize=13):
                writer.write_batch(batch)
    elif kind == "feather":
        pyarrow.feather.write_feather(table, path, compression="zstd", chunksize=19)
    elif kind in ("csv", "tsv"):
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["text"], delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(records)
    elif kind == "saved":
        datasets.Dataset.from_list(records).save_to_disk(folder / "saved", num_shards=2)
        return folder / "saved"
    elif kind == "saved-split":
        datasets.DatasetDict(train=datasets.Dataset.from_list(records)).save_to_disk(folder / "dict")
        return f"{folder / 'dict'}#train"
    elif kind == "hf":
        write_jsonl(folder / "train.jsonl", records)
        return f"hf:{folder}#train"
    return path


FORMATS = [
    "jsonl",
    "jsonl.gz",
    "jsonl.zst",
    "json",
    "parquet",
    "arrow",
    "feather",
    "csv",
    "tsv",
    "saved",
    "saved-split",
    "hf",
]


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_same_documents(kind, tmp_path, byte_level):
    records = texts(60)
    expected = documents(run(write_jsonl(tmp_path / "a.jsonl", records), tmp_path / "expected", byte_level))
    folder = tmp_path / "data"
    folder.mkdir()
    store = run(write_as(kind, folder, records), tmp_path / "store", byte_level, unit_bytes=1000)
    assert documents(store) == expected
    assert len(expected) == 60


@pytest.mark.parametrize("kind", ["json", "parquet", "saved"])
def test_chats_in_columns_are_chats(kind, tmp_path, byte_level):
    records = chats(20)
    expected = documents(run(write_jsonl(tmp_path / "a.jsonl", records), tmp_path / "expected", byte_level))
    folder = tmp_path / "data"
    folder.mkdir()
    assert documents(run(write_as(kind, folder, records), tmp_path / "store", byte_level)) == expected


def test_plain_text_by_line_paragraph_and_document(tmp_path, byte_level):
    path = tmp_path / "a.txt"
    path.write_bytes("one\ntwo\r\n\n\nthree\nfour\n".encode("utf-8-sig"))
    for by, expected in (
        ("line", ["one", "two", "three", "four"]),
        ("paragraph", ["one\ntwo", "three\nfour"]),
        ("document", ["one\ntwo\r\n\n\nthree\nfour\n"]),
    ):
        store = run([SourceSpec("t", (str(path),), text_by=by)], tmp_path / by, byte_level)
        lines = write_jsonl(
            tmp_path / f"{by}.jsonl", [{"text": t.replace("\r\n", "\n") if by == "paragraph" else t} for t in expected]
        )
        if by == "paragraph":
            lines = write_jsonl(lines, [{"text": "one\ntwo"}, {"text": "three\nfour"}])
        assert documents(store) == documents(run(lines, tmp_path / f"{by}.store", byte_level))


def test_folders_and_globs(tmp_path, byte_level):
    records = texts(30)
    (tmp_path / "in" / "deep").mkdir(parents=True)
    write_jsonl(tmp_path / "in" / "a.jsonl", records[:10])
    write_jsonl(tmp_path / "in" / "deep" / "b.jsonl", records[10:20])
    pq.write_table(pa.Table.from_pylist(records[20:]), tmp_path / "in" / "deep" / "c.parquet")
    (tmp_path / "in" / "_ignored.jsonl").write_text("not read")
    (tmp_path / "in" / "README").write_text("not read either")
    expected = documents(run(write_jsonl(tmp_path / "all.jsonl", records), tmp_path / "expected", byte_level))
    store = run(tmp_path / "in", tmp_path / "s1", byte_level)
    assert documents(store) == expected
    assert store.info.sources == (("in", 0, 30),)
    assert documents(run(f"{tmp_path}/in/**/[ab].jsonl", tmp_path / "s2", byte_level)) == expected[:20]


@pytest.mark.parametrize("unit_bytes", [1, 7, 100, 5000, 10**9])
def test_the_cut_into_units_changes_no_document(unit_bytes, tmp_path, byte_level):
    path = write_jsonl(tmp_path / "a.jsonl", texts(12, longest=6))
    whole = documents(run(path, tmp_path / "whole", byte_level))
    assert documents(run(path, tmp_path / "cut", byte_level, unit_bytes=unit_bytes)) == whole


def test_workers_change_no_byte(tmp_path, byte_level):
    inputs = [write_jsonl(tmp_path / "a.jsonl", chats(200)), write_jsonl(tmp_path / "b.jsonl", texts(200))]
    digests = set()
    for workers in (1, 2, 3):
        run(inputs, tmp_path / f"w{workers}", byte_level, workers=workers, unit_bytes=3000)
        digests.add(digest(tmp_path / f"w{workers}"))
    assert len(digests) == 1


def test_engines_give_the_same_documents(tmp_path, byte_level):
    pytest.importorskip("fastokens")
    path = write_jsonl(tmp_path / "a.jsonl", [*chats(300), *texts(300)])
    fast = run(path, tmp_path / "fast", byte_level, engine="fast")
    assert documents(fast) == documents(run(path, tmp_path / "hf", byte_level, engine="hf"))
    assert fast.ledger.total()["notes"]["compared_with_hf"] > 0


@pytest.mark.parametrize("wanted", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_at_random_moments_and_resumes_give_the_same_bytes(wanted, tmp_path, byte_level):
    inputs = [write_jsonl(tmp_path / "a.jsonl", chats(1500)), write_jsonl(tmp_path / "b.jsonl", texts(800))]
    expected = run(inputs, tmp_path / "whole", byte_level, unit_bytes=8000)
    script = (
        "import sys; from prep.encode.run import encode; from prep.encode.options import EncodeOptions\n"
        "if __name__ == '__main__':\n"
        "    print('begun', flush=True)\n"
        "    encode(sys.argv[3:], sys.argv[1], EncodeOptions(sys.argv[2], unit_bytes=8000), workers=2, resume=True)\n"
    )
    (tmp_path / "run.py").write_text(script)
    draw = random.Random(1)
    out = tmp_path / "killed"
    kills = 0
    while kills < wanted:
        # Every kill lands somewhere else in what a run does: start, first units, middle of writes, end.
        process = subprocess.Popen(
            [sys.executable, tmp_path / "run.py", out, byte_level, *inputs],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
        )
        process.stdout.readline()
        try:
            process.wait(draw.uniform(0.05, 1.6))
            assert process.returncode == 0, "the run failed by itself"
            assert digest(out) == digest(tmp_path / "whole")
            shutil.rmtree(out)  # it got through: begin anew
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            if not (out / "store.json").exists() and out.exists():
                with pytest.raises(ValueError, match="unfinished"):
                    DocumentStore.open(out)
    store = run(inputs, out, byte_level, unit_bytes=8000, resume=True)
    assert documents(store) == documents(expected)
    assert digest(out) == digest(tmp_path / "whole")


def test_a_damaged_unit_is_made_again_on_resume(tmp_path, byte_level):
    path = write_jsonl(tmp_path / "a.jsonl", texts(100))
    run(path, tmp_path / "whole", byte_level, unit_bytes=2000)
    before = digest(tmp_path / "whole")
    (tmp_path / "whole" / "store.json").unlink()
    unit = tmp_path / "whole" / "units" / "00001.arrow"
    data = bytearray(unit.read_bytes())
    data[len(data) // 2] ^= 1
    unit.write_bytes(data)
    run(path, tmp_path / "whole", byte_level, unit_bytes=2000, resume=True)
    assert digest(tmp_path / "whole") == before


def test_a_finished_store_is_reused_and_a_different_one_refused(tmp_path, byte_level, byte_level_nfc):
    path = write_jsonl(tmp_path / "a.jsonl", chats(5))
    out = tmp_path / "store"
    run(path, out, byte_level)
    stamp = (out / "store.json").stat().st_mtime_ns
    assert len(run(path, out, byte_level)) == 5
    assert (out / "store.json").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="tokenizer_hash"):
        run(path, out, byte_level_nfc)
    with pytest.raises(ValueError, match=r"options\.mask\.end_of_turn"):
        run(path, out, byte_level, mask=MaskPolicy(end_of_turn="none"))
    write_jsonl(path, chats(6))
    with pytest.raises(ValueError, match="inputs"):
        run(path, out, byte_level)


def test_an_unfinished_store_needs_resume_and_equal_options(tmp_path, byte_level):
    path = write_jsonl(tmp_path / "a.jsonl", chats(5))
    out = tmp_path / "store"
    run(path, out, byte_level)
    (out / "store.json").unlink()
    with pytest.raises(ValueError, match="--resume"):
        run(path, out, byte_level)
    with pytest.raises(ValueError, match=r"options\.keep_untrained"):
        run(path, out, byte_level, keep_untrained=True, resume=True)
    assert len(run(path, out, byte_level, resume=True)) == 5
    other = tmp_path / "other"
    other.mkdir()
    (other / "thing").write_text("x")
    with pytest.raises(ValueError, match="already holds something"):
        run(path, other, byte_level)


def test_bad_records_stop_with_file_and_line(tmp_path, byte_level):
    good = '{"text": "fine"}\n'
    cases = {
        "not readable as JSON": ('{"text": "x"', "line 101"),
        "no known field": ('{"txt": 1}', "line 101"),
    }
    for reason, (line, where) in cases.items():
        path = tmp_path / "bad.jsonl"
        path.write_text(good * 100 + line + "\n" + good)
        with pytest.raises(ValueError, match=reason) as caught:
            run(path, tmp_path / "store", byte_level, unit_bytes=300)
        assert f"bad.jsonl, {where}:" in str(caught.value)
        assert not (tmp_path / "store").exists()


def test_nasty_lines(tmp_path, byte_level):
    path = tmp_path / "nasty.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf"
        + b'{"text": "bom"}\r\n\n   \n'  # a BOM, blank lines, Windows ends of line
        + json.dumps({"text": "x" * 10**6}).encode()
        + b"\n"  # one long line
        + json.dumps({"text": " " * 30000 + "y"}).encode()
        + b"\n"
        + json.dumps({"text": "\x00\x01\x1f"}).encode()
        + b"\n"
        + b'{"text": "no newline at the end"}'
    )
    store = run(path, tmp_path / "store", byte_level, unit_bytes=5000)
    assert len(store) == 5
    assert store.ledger.total()["read"]["documents"] == 5
    path.write_bytes(b'{"text": "cut of')
    with pytest.raises(ValueError, match="line 1: not readable as JSON"):
        run(path, tmp_path / "s2", byte_level)
    path.write_bytes(b'{"text": "ok"}\n{"text": "\xff\xfe"}\n')
    with pytest.raises(ValueError, match="line 2"):
        run(path, tmp_path / "s3", byte_level)


def test_skipping_bad_records(tmp_path, byte_level):
    good = json.dumps({"text": "fine"})
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([good, "{", good, '{"no": 1}', good]) + "\n")
    store = run(path, tmp_path / "store", byte_level, on_error="skip")
    total = store.ledger.total()
    assert (total["read"]["documents"], total["kept"]["documents"]) == (5, 3)
    assert total["dropped"]["error"]["documents"] == 2
    rejects = [json.loads(line) for line in (tmp_path / "store" / "rejects.jsonl").read_text().splitlines()]
    assert [r["where"] for r in rejects] == ["a.jsonl, line 2", "a.jsonl, line 4"]
    assert rejects[1]["record"] == '{"no": 1}'
    assert "no known field" in rejects[1]["reason"]
    for limit in ("1", "39%"):
        with pytest.raises(ValueError, match="max-errors"):
            run(path, tmp_path / f"s{limit}", byte_level, on_error="skip", max_errors=limit)
    assert len(run(path, tmp_path / "s40", byte_level, on_error="skip", max_errors="40%")) == 3


def test_too_many_bad_records_leave_their_list_behind(tmp_path, byte_level):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n{\n{\n')
    given = ["--tokenizer", byte_level, "--on-error", "skip", "--max-errors", "1", "--quiet"]
    encode_it = ["encode", path, "--out", tmp_path / "b.store"]
    for arguments in (encode_it, ["pack", path, "--out", tmp_path / "a", "--seq-len", 64]):
        result = CliRunner().invoke(main, [str(a) for a in [*arguments, *given]])
        assert result.exit_code == 1
        assert "max-errors" in result.output
    for name in ("a.store", "b.store"):
        assert len((tmp_path / name / "units" / "00000.rejects.jsonl").read_text().splitlines()) == 2
    assert not (tmp_path / "a").exists()


def test_damaged_files(tmp_path, byte_level):
    data = gzip.compress(write_jsonl(tmp_path / "a.jsonl", texts(1000)).read_bytes())
    (tmp_path / "cut.jsonl.gz").write_bytes(data[: len(data) // 2])
    zst = pa.compress((tmp_path / "a.jsonl").read_bytes(), "zstd", asbytes=True)
    (tmp_path / "cut.jsonl.zst").write_bytes(zst[: len(zst) // 2])
    (tmp_path / "cut.json").write_text('[{"text": "a"}, {"text": "b"')
    (tmp_path / "cut.parquet").write_bytes(b"PAR1" + b"x" * 100)
    (tmp_path / "cut.csv").write_text('text\n"never closed\n')
    for name, reason in (
        ("cut.jsonl.gz", "damaged or cut off"),
        ("cut.jsonl.zst", "damaged or cut off"),
        ("cut.json", "cut off"),
        ("cut.parquet", "not readable as Parquet"),
        ("cut.csv", "not readable as csv"),
    ):
        with pytest.raises(ValueError, match=reason) as caught:
            run(tmp_path / name, tmp_path / f"{name}.store", byte_level)
        assert name in str(caught.value)


def test_refusals_before_any_work(tmp_path, byte_level):
    path = write_jsonl(tmp_path / "a.jsonl", texts(3))
    (tmp_path / "empty").mkdir()
    cases = [
        (tmp_path / "missing.jsonl", byte_level, "no such file"),
        (tmp_path / "empty", byte_level, "no file"),
        (f"{tmp_path}/*.nothing", byte_level, "no file matches"),
        (path, tmp_path / "no-tokenizer", "no such tokenizer folder"),
        (path, tmp_path / "empty", "no tokenizer.json"),
        ([], byte_level, "no input"),
    ]
    for inputs, tokenizer, reason in cases:
        with pytest.raises(ValueError, match=reason):
            run(inputs, tmp_path / "store", tokenizer)
        assert not (tmp_path / "store").exists()


def test_no_document_left(tmp_path, byte_level):
    path = tmp_path / "a.jsonl"
    path.write_text("")
    with pytest.raises(ValueError, match="no document is left"):
        run(path, tmp_path / "s1", byte_level)
    write_jsonl(path, [{"messages": [{"role": "user", "content": "alone"}]}, {"text": ""}])
    with pytest.raises(ValueError, match="1 empty, 1 no_targets"):
        run(path, tmp_path / "s2", byte_level)
    assert len(run(path, tmp_path / "s3", byte_level, keep_untrained=True)) == 1


def test_the_ledger_adds_up(tmp_path, byte_level):
    records = [*texts(20), {"text": ""}, {"messages": [{"role": "user", "content": "alone"}]}, {"input_ids": [3, 4, 5]}]
    store = run(write_jsonl(tmp_path / "a.jsonl", records), tmp_path / "store", byte_level)
    total = store.ledger.total()
    store.ledger.check()
    assert total["read"]["documents"] == 23
    assert total["kept"] == {"documents": len(store), "tokens": int(store.lengths.sum())}
    assert {reason: count["documents"] for reason, count in total["dropped"].items()} == {"empty": 1, "no_targets": 1}


def test_duplicates_go_on_request(tmp_path, byte_level):
    records = texts(30)
    path = write_jsonl(tmp_path / "a.jsonl", [*records, *records[:10], *texts(5, seed=3)])
    store = run(path, tmp_path / "store", byte_level, dedup="exact")
    assert documents(store) == documents(
        run(write_jsonl(tmp_path / "b.jsonl", [*records, *texts(5, seed=3)]), tmp_path / "b", byte_level)
    )
    assert store.ledger.total()["dropped"]["duplicate"]["documents"] == 10
    assert len(DocumentStore.open(tmp_path / "store")) == len(store.lengths) == len(store.doc_hashes) == 35


def test_shares_of_sources_are_exact_to_one_document(tmp_path, byte_level):
    a = write_jsonl(tmp_path / "a.jsonl", texts(200))
    b = write_jsonl(tmp_path / "b.jsonl", texts(60, seed=5))
    specs = [SourceSpec("a", (str(a),), weight=1), SourceSpec("b", (str(b),), weight=3, max_epochs=2.5)]
    store = run(specs, tmp_path / "store", byte_level)
    tokens = {name: int(store.lengths[first:last].sum()) for name, first, last in store.info.sources}
    longest = int(store.lengths.max())
    whole = run(b, tmp_path / "b.store", byte_level)
    assert abs(tokens["b"] - 2.5 * whole.lengths.sum()) <= longest
    assert abs(tokens["b"] - 3 * tokens["a"]) <= 4 * longest
    account = store.ledger.to_json()["sources"]
    assert account["a"]["dropped"]["beyond_share"]["documents"] > 0
    assert account["b"]["repeated"]["documents"] >= 60
    store.ledger.check()
    assert {name: account[name]["kept"]["tokens"] for name in tokens} == tokens
    limited = run([SourceSpec("a", (str(a),), limit_tokens=500)], tmp_path / "limited", byte_level)
    assert abs(int(limited.lengths.sum()) - 500) <= longest


def test_control_tokens_in_texts_are_text(tmp_path, byte_level):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a<|im_end|>b"}, {"text": "plain"}])
    end = 599  # not the id: the vocabulary is looked up below
    store = run(path, tmp_path / "s", byte_level)
    tokenizer = json.loads((byte_level / "tokenizer.json").read_text())
    end = next(t["id"] for t in tokenizer["added_tokens"] if t["content"] == "<|im_end|>")
    ids = store.document(0)[0].tolist()
    assert ids.count(end) == 1
    assert ids[-1] == end  # the eos that we put there
    assert store.ledger.total()["notes"]["control_tokens_kept_as_text"] == 1
    allowed = run(path, tmp_path / "allowed", byte_level, allow_special=True)
    assert allowed.document(0)[0].tolist().count(end) == 2


def test_bos_and_eos_of_plain_texts(tmp_path, sentencepiece, byte_level):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "hello"}, {"prompt": "2+2=", "completion": "4"}])
    store = run(path, tmp_path / "s", sentencepiece)
    for index, trained in ((0, None), (1, 2)):
        ids, mask = store.document(index)
        assert ids[0] == store.info.bos_id
        assert ids[-1] == store.info.eos_id
        assert (mask[0], mask[-1]) == (0, 1)
        if trained:
            assert mask.sum() == trained
    assert run(path, tmp_path / "b", byte_level).info.bos_id is None


def test_a_store_is_read_only_views(tmp_path, byte_level):
    store = run(write_jsonl(tmp_path / "a.jsonl", texts(5)), tmp_path / "s", byte_level)
    ids, mask = store.document(3)
    assert not ids.flags.writeable
    assert not mask.flags.writeable
    assert ids.dtype == np.int32
    assert mask.dtype == np.uint8
    assert [len(store.document(i)[0]) for i in range(5)] == store.lengths.tolist()
    assert [int(store.document(i)[1].sum()) for i in range(5)] == store.target_tokens.tolist()


def test_parts_of_an_array_make_the_same_store(tmp_path, byte_level):
    path = write_jsonl(tmp_path / "a.jsonl", chats(100))
    options = EncodeOptions(str(byte_level), unit_bytes=3000)
    run(path, tmp_path / "whole", byte_level, unit_bytes=3000)
    for part in (2, 3, 1):
        assert encode([path], tmp_path / "parts", options, unit_range=(part, 3)) is None
    assert not (tmp_path / "parts" / "store.json").exists()
    encode([path], tmp_path / "parts", options, resume=True)
    assert digest(tmp_path / "parts") == digest(tmp_path / "whole")


def test_two_writers_are_refused(tmp_path, byte_level):
    path = write_jsonl(tmp_path / "a.jsonl", chats(10))
    caught = []

    def second(_):
        with pytest.raises(ValueError, match="another process is writing") as error:
            run(path, tmp_path / "s", byte_level, resume=True)
        caught.append(error)

    encode([path], tmp_path / "s", EncodeOptions(str(byte_level)), progress=second)
    assert caught


def test_a_mix_from_yaml(tmp_path, byte_level):
    write_jsonl(tmp_path / "a.jsonl", [{"body": "one"}, {"body": "two"}])
    (tmp_path / "b.txt").write_text("three\n\nfour\n")
    (tmp_path / "mix.yaml").write_text(
        "sources:\n"
        "  - {name: first, paths: a.jsonl, columns: {text: body}, repeat: 2}\n"
        "  - {name: second, paths: [b.txt], text_by: paragraph}\n"
    )
    store = run(read_mix(str(tmp_path / "mix.yaml")), tmp_path / "s", byte_level)
    assert store.info.sources == (("first", 0, 4), ("second", 4, 6))
    for text, reason in (
        ("sources: []", "a list under"),
        ("sources: [{name: x}]", "no paths"),
        ("sources: [{name: x, pats: y}]", "unknown field pats"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ValueError, match=reason):
            read_mix(str(tmp_path / "bad.yaml"))


def test_the_command(tmp_path, byte_level):
    path = write_jsonl(tmp_path / "a.jsonl", [*chats(5), {"text": ""}])
    result = CliRunner().invoke(command, [str(path), "--out", str(tmp_path / "s"), "--tokenizer", str(byte_level)])
    assert result.exit_code == 0, result.output
    assert "5 documents" in result.output
    assert "dropped, empty: 1 documents" in result.output
    result = CliRunner().invoke(command, ["--out", "x", "--tokenizer", "y"])
    assert result.exit_code == 2
    assert "either INPUTS or --mix" in result.output


def test_turns_that_cannot_be_trained_stand_in_ledger_summary_and_lint(tmp_path, byte_level):
    """A template that never closes a turn, and answers without words: nothing of it is silent."""
    (tmp_path / "open.jinja").write_text("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}")
    answerless = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]}
    path = write_jsonl(tmp_path / "a.jsonl", [*chats(5), answerless])
    turns = sum(len(record["messages"]) // 2 for record in chats(5))
    given = [path, "--out", tmp_path / "s", "--tokenizer", byte_level, "--chat-template", tmp_path / "open.jinja"]
    result = CliRunner().invoke(main, ["encode", *map(str, given), "--json", "--quiet"])
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    notes = {"turns_without_a_trained_end": turns, "turns_without_words": 1}
    assert notes.items() <= summary["ledger"]["total"]["notes"].items()
    assert summary["ledger"] == json.loads((tmp_path / "s" / "ledger.json").read_text())
    assert (summary["rows"], summary["finished"]) == (5, True)
    again = CliRunner().invoke(main, ["encode", *map(str, given)])  # a finished store is summed up as well
    assert f"turns without a trained end: {turns}" in again.output
    linted = json.loads(CliRunner().invoke(main, ["lint", str(tmp_path / "s"), "--json"]).stdout)
    assert {"turns-without-a-trained-end", "turns-without-words"} <= {f["check"] for f in _findings(linted)}


def _findings(linted):
    return linted["findings"] if "findings" in linted else next(iter(linted.values()))["findings"]


def test_a_full_disk_is_an_error_that_can_be_resumed(tmp_path, byte_level, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", chats(100))
    run(path, tmp_path / "whole", byte_level, unit_bytes=4000)
    real, calls = UnitWriter.write, []

    def full(self, *columns):
        calls.append(1)
        if len(calls) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, *columns)

    monkeypatch.setattr(UnitWriter, "write", full)
    with pytest.raises(OSError, match="No space left"):
        run(path, tmp_path / "s", byte_level, unit_bytes=4000)
    monkeypatch.undo()
    assert not list((tmp_path / "s").rglob("*.tmp"))
    run(path, tmp_path / "s", byte_level, unit_bytes=4000, resume=True)
    assert digest(tmp_path / "s") == digest(tmp_path / "whole")


CTRL_C_AFTER_THREE_UNITS = """
import os, signal
from prep.encode.command import encode
from prep.engine.local import Workers

real, done = Workers.run, []

def interrupted(self, function, units, on_done):
    def note(unit, result):
        done.append(unit)
        if on_done:
            on_done(unit, result)
        if len(done) == 3:
            os.kill(os.getpid(), signal.SIGINT)
    return real(self, function, units, note)

if __name__ == "__main__":
    # A suite that was started in the background hands its children an ignored SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    Workers.run = interrupted
    encode()
"""


def test_ctrl_c_ends_cleanly_and_can_be_resumed(tmp_path, byte_level):
    path = write_jsonl(tmp_path / "a.jsonl", chats(500))
    (tmp_path / "program.py").write_text(CTRL_C_AFTER_THREE_UNITS)
    program = [sys.executable, tmp_path / "program.py", path, "--out", tmp_path / "s"]
    program += ["--tokenizer", byte_level, "--workers", "2", "--unit-bytes", "2000"]
    done = subprocess.run(
        program, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert "go on with --resume" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "s").rglob("*.tmp"))
    run(path, tmp_path / "whole", byte_level, unit_bytes=2000)
    run(path, tmp_path / "s", byte_level, unit_bytes=2000, resume=True)
    assert digest(tmp_path / "s") == digest(tmp_path / "whole")


def test_a_unit_in_which_the_fast_engine_differs_is_done_again_with_hf(tmp_path, byte_level, monkeypatch):
    pytest.importorskip("fastokens")
    path = write_jsonl(tmp_path / "a.jsonl", texts(3000))
    expected = run(path, tmp_path / "hf", byte_level, engine="hf", unit_bytes=10**6)
    real = TokenEncoder._encode_fast

    def wrong(self, given):
        ids, offsets = real(self, given)
        return ids + (ids == ids[0]).astype(np.int32), offsets

    monkeypatch.setattr(TokenEncoder, "_encode_fast", wrong)
    store = run(path, tmp_path / "fast", byte_level, engine="fast", unit_bytes=10**6)
    assert documents(store) == documents(expected)
    assert store.ledger.total()["notes"]["engine_differed_units"] >= 1


def test_a_unit_in_which_direct_rendering_differs_is_done_again_through_jinja(tmp_path, byte_level, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", chats(300))
    expected = run(path, tmp_path / "right", byte_level)
    real = DirectRenderer.render

    def wrong(self, messages):
        rendering = real(self, messages)
        if rendering is not None:
            rendering.text += "!"
        return rendering

    monkeypatch.setattr(DirectRenderer, "render", wrong)
    store = run(path, tmp_path / "wrong", byte_level)
    assert documents(store) == documents(expected)
    assert store.ledger.total()["notes"]["direct_rendering_differed_units"] == 1


def test_shares_that_cannot_be_are_refused_before_any_work(tmp_path, byte_level):
    path = (str(write_jsonl(tmp_path / "a.jsonl", texts(3))),)
    for specs, reason in (
        ([SourceSpec("a", path, weight=1), SourceSpec("b", path)], "source b: with weights every source has a weight"),
        ([SourceSpec("a", path, weight=1, repeat=2)], "none a repeat"),
        ([SourceSpec("a", path, repeat=0)], "repeat is 0"),
        ([SourceSpec("a", path), SourceSpec("a", path)], "two sources are called a"),
    ):
        with pytest.raises(ValueError, match=reason):
            run(specs, tmp_path / "s", byte_level)
        assert not (tmp_path / "s").exists()
