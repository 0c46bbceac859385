"""From what the command line names to work units: folders, globs, cuts, refusals."""

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from encoding_runs import documents, run, texts, write_jsonl


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
