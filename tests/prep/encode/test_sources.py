"""From what the command line names to work units: folders, globs, cuts, refusals."""

import errno
import json
import os

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import xxhash
from click.testing import CliRunner
from encoding_runs import documents, run, texts, write_jsonl

from prep.cli import main
from prep.encode.sources import SourceSpec, as_sources, find_inputs
from prep.encode.store import DocumentStore


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
    assert documents(run(f"file://{tmp_path}/in", tmp_path / "s3", byte_level)) == expected


def test_globs_leave_hidden_files_as_folders_do(tmp_path, byte_level):
    for name in ("a.jsonl", "_b.jsonl", ".c.jsonl", "_tmp/d.jsonl", ".git/e.jsonl", "f/g.jsonl", "f/_h/i.jsonl"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(tmp_path / "in" / name, [{"text": name}])
    for k, (pattern, count) in enumerate(
        [("in/**/*.jsonl", 2), ("in/*.jsonl", 1), ("in/_*.jsonl", 1), ("in/_tmp/*", 1), ("in/*/_h/*", 1), ("i*", 0)]
    ):
        if count:
            assert len(run(f"{tmp_path}/{pattern}", tmp_path / f"s{k}", byte_level)) == count, pattern
        else:
            with pytest.raises(ValueError, match="no file matches"):
                run(f"{tmp_path}/{pattern}", tmp_path / f"s{k}", byte_level)


@pytest.fixture
def linked(tmp_path):
    """Three files, two of them behind links to their folder, and two links that lead back up."""
    for name in ("in/a.jsonl", "real/b.jsonl", "real/c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_jsonl(tmp_path / name, [{"text": name}])
    (tmp_path / "in" / "linked").symlink_to("../real")
    (tmp_path / "in" / "again").symlink_to("../real")
    (tmp_path / "in" / "one.jsonl").symlink_to("../real/b.jsonl")
    for name in ("up", "up2"):
        (tmp_path / "in" / name).symlink_to(".")
    return tmp_path


@pytest.mark.parametrize(
    ("named", "names"),
    [
        ("in", ["a.jsonl", "again/c.jsonl", "one.jsonl"]),
        ("in/**/*.jsonl", ["a.jsonl", "again/c.jsonl", "one.jsonl"]),
        ("in/**", ["a.jsonl", "again/c.jsonl", "one.jsonl"]),
        ("**/a*.jsonl", ["in/a.jsonl"]),
        ("*/up/up/**/a.jsonl", ["in/up/up/a.jsonl"]),
        ("in/*/b.jsonl", ["again/b.jsonl"]),
        ("in/link*/../real/*", ["real/b.jsonl", "real/c.jsonl"]),
        ("in/*.jsonl", ["a.jsonl", "one.jsonl"]),
    ],
)
def test_links_are_followed_and_each_file_is_read_once(linked, byte_level, monkeypatch, named, names):
    monkeypatch.chdir(linked)
    store = run(named, linked.parent / f"{linked.name} store", byte_level)
    assert [entry["name"] for entry in store.info.inputs] == names
    assert len(store) == len(names)


def test_nothing_below_a_folder_is_left_out_silently(linked, byte_level, monkeypatch):
    (linked / "in" / "broken.jsonl").symlink_to("nowhere")
    for named in ("in", "in/*", "in/**/a.jsonl", "in/b*"):
        with pytest.raises(ValueError, match=r"in/broken\.jsonl: a link that leads nowhere .*; mend it or remove it"):
            run(linked / named, linked / "s", byte_level)
    assert len(run(linked / "in/[ao]*.jsonl", linked / "s", byte_level)) == 2
    scan = os.scandir

    def closed(folder):
        if os.path.basename(folder) in ("linked", "_hidden"):
            raise PermissionError(errno.EACCES, "Permission denied", folder)
        return scan(folder)

    (linked / "in" / "broken.jsonl").unlink()
    (linked / "in" / "again").unlink()
    (linked / "in" / "_hidden").mkdir()
    monkeypatch.setattr(os, "scandir", closed)
    for named in ("in", "in/**/*.jsonl", "in/*/*.jsonl"):
        with pytest.raises(OSError, match=r"Permission denied: .*in/linked"):
            run(linked / named, linked / "t", byte_level)


def test_a_pipe_is_called_one(tmp_path, byte_level):
    """Of a pipe nothing would be left when its hash is known."""
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in" / "a.jsonl", texts(2))
    pipe = tmp_path / "in" / "pipe.jsonl"
    os.mkfifo(pipe)
    for named in (pipe, pipe.parent, f"{pipe.parent}/*.jsonl"):
        with pytest.raises(ValueError, match=r"pipe\.jsonl: is a pipe or a device.*; write it to a file first"):
            run(named, tmp_path / "s", byte_level)
    assert len(run(f"{pipe.parent}/a*", tmp_path / "s", byte_level)) == 2


def test_files_of_unknown_format_are_counted_and_named(tmp_path, byte_level):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    write_jsonl(tmp_path / "in" / "a.jsonl", texts(3))
    (tmp_path / "in" / "b.jsonl.bz2").write_bytes(b"x")
    (tmp_path / "in" / "deep" / "README").write_text("x")
    command = ["encode", tmp_path / "in", "--out", tmp_path / "s", "--tokenizer", byte_level]
    result = CliRunner().invoke(main, list(map(str, command)))
    assert "left out of in, of unknown format: b.jsonl.bz2, deep/README" in result.output
    store = DocumentStore.open(tmp_path / "s")
    assert store.ledger.total()["notes"]["files_of_unknown_format"] == 2
    # Nothing else there: not taken for JSONL, as a file that is named by itself is.
    with pytest.raises(ValueError, match=r"no file of a known format \(but README\)"):
        run(tmp_path / "in" / "deep", tmp_path / "t", byte_level)
    write_jsonl(tmp_path / "in" / "deep" / "README", texts(2))
    assert len(run(tmp_path / "in" / "deep" / "README", tmp_path / "u", byte_level)) == 2


def test_a_file_that_is_named_twice_is_not_read_twice(tmp_path, byte_level):
    (tmp_path / "in").mkdir()
    path = write_jsonl(tmp_path / "in" / "a.jsonl", texts(3))
    (tmp_path / "link.jsonl").symlink_to(path)
    for again in (path, tmp_path / "link.jsonl", f"{tmp_path}/i*/*.jsonl"):
        with pytest.raises(ValueError, match=r"a?\.jsonl is named twice; name it once"):
            run([tmp_path / "in", again], tmp_path / "s", byte_level)
    # A mix that says so reads it in two ways.
    both = [SourceSpec("x", (str(path),)), SourceSpec("y", (str(path),), repeat=2)]
    assert len(run(both, tmp_path / "s", byte_level)) == 9


def test_columns_are_fields_of_records_and_each_is_named_once():
    for columns, reason in (
        ((("text", "a"), ("text", "b")), "source x: two columns are to be text; name one"),
        ((("txet", "a"),), "source x: column txet is no field of a record here; known are input_ids"),
    ):
        with pytest.raises(ValueError, match=reason):
            SourceSpec("x", (), columns=columns)


def test_a_rejected_record_is_named_by_its_place_in_the_folder(tmp_path, byte_level):
    for name in ("x/a.jsonl", "y/a.jsonl"):
        (tmp_path / "in" / name).parent.mkdir(parents=True)
        (tmp_path / "in" / name).write_text('{"text": "fine"}\n{\n')
    for k, named in enumerate(("in", "in/*/a.jsonl")):
        store = run(f"{tmp_path}/{named}", tmp_path / f"s{k}", byte_level, on_error="skip")
        lines = (store.path / "rejects.jsonl").read_text().splitlines()
        assert [json.loads(line)["where"] for line in lines] == ["x/a.jsonl, line 2", "y/a.jsonl, line 2"]
        assert [entry["name"] for entry in store.info.inputs] == ["x/a.jsonl", "y/a.jsonl"]


def test_an_arrow_stream_without_its_end_is_cut_off(tmp_path, byte_level):
    """Cut where a record batch ends, it would pass for a whole one."""
    table = pa.Table.from_pylist(texts(40))
    path = tmp_path / "a.arrow"
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        for batch in table.to_batches(max_chunksize=10):
            writer.write_batch(batch)
    assert len(run(path, tmp_path / "s", byte_level)) == 40
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"a\.arrow: the Arrow stream is cut off"):
        run(path, tmp_path / "t", byte_level)


@pytest.mark.parametrize("unit_bytes", [1, 7, 100, 5000, 10**9])
def test_the_cut_into_units_changes_no_document(unit_bytes, tmp_path, byte_level):
    path = write_jsonl(tmp_path / "a.jsonl", texts(12, longest=6))
    whole = documents(run(path, tmp_path / "whole", byte_level))
    assert documents(run(path, tmp_path / "cut", byte_level, unit_bytes=unit_bytes)) == whole


def test_a_file_is_hashed_when_the_hash_is_asked_for_and_must_be_as_it_was_found(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}])
    (found,), _ = find_inputs(as_sources([path]))
    assert found.to_json()["xxh3_128"] == xxhash.xxh3_128(path.read_bytes()).hexdigest()
    (found,), _ = find_inputs(as_sources([path]))
    with open(path, "a") as file:
        file.write('{"text": "two"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl: changed while it was read"):
        found.to_json()


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
