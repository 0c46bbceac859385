"""Every format gives the same documents; files that are damaged are named."""

import csv
import gzip
import json

import datasets
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from encoding_runs import chats, documents, run, texts, write_jsonl

from prep.encode import readers
from prep.encode.cuts import cut_units
from prep.encode.sources import SourceSpec, find_inputs
from prep.encode.tokenizer import read_tokenizer


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


def call(name, **arguments):
    return {"role": "assistant", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]}


TOOL_CHATS = [
    {
        "messages": [{"role": "user", "content": "w?"}, call("weather", city="Bern"), {"role": "tool", "content": "9"}],
        "tools": [{"function": {"name": "weather", "parameters": {"city": {"type": "string"}}}}],
    },
    {
        "messages": [{"role": "user", "content": "t?"}, call("time", zone="CET", at=[1, 2])],
        "tools": [{"function": {"name": "time", "parameters": {"zone": {"enum": ["CET"]}}}}],
    },
    {"messages": [{"role": "user", "content": "u", "weight": 1.0}, {"role": "assistant", "content": "a"}]},
]
TOOL_TEMPLATE = (
    "{{ tools | tojson if tools }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}"
    "{{ m.tool_calls | tojson if m.tool_calls }}{{ '<|im_end|>\n' }}{% endfor %}"
)


@pytest.mark.parametrize("kind", ["json", "parquet", "arrow", "saved", "hf"])
def test_tool_calls_in_columns_have_no_arguments_of_each_other(kind, tmp_path, byte_level):
    """A struct of a column has every key that any row has, as null."""
    template = tmp_path / "template.jinja"
    template.write_text(TOOL_TEMPLATE)
    (tmp_path / "data").mkdir()
    stores = [
        run(path, tmp_path / f"store{k}", byte_level, chat_template=str(template), keep_untrained=True)
        for k, path in enumerate(
            (write_jsonl(tmp_path / "a.jsonl", TOOL_CHATS), write_as(kind, tmp_path / "data", TOOL_CHATS))
        )
    ]
    assert documents(stores[0]) == documents(stores[1])
    decode = read_tokenizer(byte_level).tokenizer.decode
    text = decode(stores[0].document(1)[0].tolist(), skip_special_tokens=False)
    assert '[{"function": {"name": "time", "arguments": {"zone": "CET", "at": [1, 2]}}}]<|im_end|>' in text


def test_nulls_that_are_written_out_stay(tmp_path, byte_level):
    record = {"messages": [{"role": "user", "content": "u"}, call("f", a=None)]}
    (tmp_path / "template.jinja").write_text(TOOL_TEMPLATE)
    path = write_jsonl(tmp_path / "a.jsonl", [record])
    store = run(path, tmp_path / "s", byte_level, chat_template=str(tmp_path / "template.jinja"))
    decode = read_tokenizer(byte_level).tokenizer.decode
    assert '"arguments": {"a": null}' in decode(store.document(0)[0].tolist())


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


def gzipped(path):
    other = path.with_name(path.name + ".gz")
    other.write_bytes(gzip.compress(path.read_bytes()))
    return other


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
    path.write_bytes(b'{"text": "ok"}\n\xef\xbb\xbf{"text": "files joined with their marks"}\n')
    for marked in (path, gzipped(path)):
        with pytest.raises(ValueError, match="line 2: not readable as JSON"):
            run(marked, tmp_path / "s1", byte_level)
    path.write_bytes(b'{"text": "cut of')
    with pytest.raises(ValueError, match="line 1: not readable as JSON"):
        run(path, tmp_path / "s2", byte_level)
    path.write_bytes(b'{"text": "ok"}\n{"text": "\xff\xfe"}\n')
    with pytest.raises(ValueError, match="line 2"):
        run(path, tmp_path / "s3", byte_level)


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


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_columns_that_nobody_could_read_right(kind, tmp_path, byte_level):
    """Whatever lies beside them: what is left of a source must not pass for all of it."""
    folder = tmp_path / "in"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", texts(3))
    path = write_as(kind, folder, texts(3))
    path.rename(folder / f"data.{kind}.gz")
    with pytest.raises(ValueError, match=rf"data\.{kind}\.gz: is not read as {kind}, .* decompress the file"):
        run(folder, tmp_path / "s", byte_level)
    table = pa.Table.from_arrays([pa.array(["one"]), pa.array(["two"])], names=["text", "text"])
    if kind == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(ValueError, match=rf"data\.{kind}: two columns are called 'text'; rename one"):
        run(path, tmp_path / "s", byte_level)


def test_a_damaged_page_is_an_error_that_names_its_place(tmp_path, byte_level):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(texts(500)), path, compression="zstd", row_group_size=100)
    start = pq.ParquetFile(path).metadata.row_group(2).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[start + 40 : start + 400] = bytes(360)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.parquet, row 201 or soon after: not readable as parquet"):
        run(path, tmp_path / "s", byte_level, unit_bytes=1000)
    assert not (tmp_path / "s").exists()


def rejects(store):
    return [json.loads(line) for line in (store.path / "rejects.jsonl").read_text().splitlines()]


def test_bad_rows_of_csv_are_bad_records(tmp_path, byte_level):
    path = tmp_path / "a.csv"
    path.write_bytes(
        b"\xef\xbb\xbftext,n\n"
        b"one,1\n"
        b"too few\n"
        b"too,many,fields\n"
        b"\n"
        b"caf\xe9,2\n"
        b'"a"b,3\n'
        b'"two\nlines, \xff",4\n'
        b'"fine,\nin ""two"" lines",5\n'
        b'last,6\n"cut of'
    )
    with pytest.raises(ValueError, match=r"a\.csv, row 2: 1 fields where the header has 2"):
        run(path, tmp_path / "s", byte_level)
    store = run(path, tmp_path / "s", byte_level, on_error="skip")
    good = write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in ("one", 'fine,\nin "two" lines', "last")])
    assert documents(store) == documents(run(good, tmp_path / "t", byte_level))
    assert [(r["where"], r["reason"], r["record"]) for r in rejects(store)] == [
        ("a.csv, row 2", "1 fields where the header has 2", "too few"),
        ("a.csv, row 3", "3 fields where the header has 2", "too,many,fields"),
        ("a.csv, row 5", "it is not UTF-8", "caf\\xe9,2"),
        ("a.csv, row 6", "not readable as csv (',' expected after '\"')", '"a"b,3'),
        ("a.csv, row 7", "it is not UTF-8", '"two\nlines, \\xff",4'),
        ("a.csv, row 10", "not readable as csv (unexpected end of data)", '"cut of'),
    ]
    # A quote that swallows more than its own line is no bad record: nobody knows how many it took.
    path.write_text('text\none\n"never closed\ntwo\nthree\n')
    with pytest.raises(ValueError, match=r"row 2: .* a quote that opens there is never closed, and 2"):
        run(path, tmp_path / "u", byte_level, on_error="skip")
    path.write_text("text,n,text\na,1,b\n")
    with pytest.raises(ValueError, match="two columns are called 'text'"):
        run(path, tmp_path / "u", byte_level)
    path.write_text("text,,\na,1,b\n")
    assert len(run(path, tmp_path / "v", byte_level)) == 1


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_bad_rows_of_columns_are_bad_records(kind, tmp_path, byte_level):
    """Rows have the numbers that they have in the file, whichever unit they are read in."""
    values = [f"row {k} ".encode() * 20 for k in range(400)]
    bad = [7, 123, 124, 399]
    for row in bad:
        values[row] = b"\xff\xfe"
    column = pa.array(values, pa.binary()).view(pa.string())
    table = pa.table({"text": column, "n": list(range(400))})
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=50)
    else:
        with pa.ipc.new_file(str(path), table.schema) as writer:
            for batch in table.to_batches(max_chunksize=50):
                writer.write_batch(batch)
    with pytest.raises(ValueError, match=rf"a\.{kind}, row 8: column text: it is not UTF-8"):
        run(path, tmp_path / "s", byte_level)
    store = run(path, tmp_path / "s", byte_level, on_error="skip", unit_bytes=15_000)
    assert len(store) == 396
    assert len(json.loads((store.path / "store.json").read_text())["units"]) > 2
    assert [r["where"] for r in rejects(store)] == [f"a.{kind}, row {row + 1}" for row in bad]
    assert rejects(store)[0]["record"] == r"{'text': b'\xff\xfe', 'n': 7}"


@pytest.mark.parametrize("kind", ["parquet", "feather"])
def test_large_rows_become_objects_a_few_at_a_time(kind, tmp_path, monkeypatch):
    """256 rows of 16 MB would be 4 GB, and as many again as text."""
    path, texts = tmp_path / f"a.{kind}", [f"{k:02}" * (1 << 20) for k in range(40)]
    table = pa.table({"text": texts})
    if kind == "parquet":
        pq.write_table(table, path)
    else:
        pyarrow.feather.write_feather(table, path)
    real, sizes = readers._records, []
    monkeypatch.setattr(readers, "_records", lambda batch: sizes.append(batch.nbytes) or real(batch))
    spec = SourceSpec("a", (str(path),))
    (unit,) = cut_units(find_inputs([spec])[0], [spec], 1 << 30)
    assert [record["text"] for _, record in readers.read_unit(unit, spec)] == texts
    assert max(sizes) < 6 << 20
    pq.write_table(pa.table({"text": [str(k) for k in range(1000)]}), tmp_path / "b.parquet")
    sizes.clear()
    spec = SourceSpec("b", (str(tmp_path / "b.parquet"),))
    (unit,) = cut_units(find_inputs([spec])[0], [spec], 1 << 30)
    assert len(list(readers.read_unit(unit, spec))) == 1000
    assert len(sizes) == 4, "small ones go together"


def test_a_text_of_bytes_is_called_what_it_is(tmp_path, byte_level):
    pq.write_table(pa.table({"text": [b"plain text"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet, row 1: text must be text, but it is bytes; cast the column"):
        run(tmp_path / "a.parquet", tmp_path / "s", byte_level)
