"""Inputs on a real S3 server and on web servers, both on loopback."""

import gzip
import http.server
import json
import threading
from contextlib import contextmanager

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from prep.cli import main
from prep.encode.options import EncodeOptions
from prep.encode.run import encode

RECORDS = [{"text": f"hello number {k} – naïve"} for k in range(300)]


@pytest.fixture(scope="module")
def bucket(s3):
    """A bucket with the same records in several formats."""
    s3.create_bucket(Bucket="data")
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS).encode()
    s3.put_object(Bucket="data", Key="in/a.jsonl", Body=lines)
    s3.put_object(Bucket="data", Key="gz/a.jsonl.gz", Body=gzip.compress(lines))
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(RECORDS), sink, row_group_size=50)
    s3.put_object(Bucket="data", Key="pq/a.parquet", Body=sink.getvalue().to_pybytes())
    return lines


@pytest.mark.parametrize(
    "address", ["s3://data/in/a.jsonl", "s3://data/in", "s3://data/*/a.parquet", "s3://data/gz/a.jsonl.gz"]
)
def test_remote_inputs_are_like_local_ones(address, bucket, tmp_path, byte_level):
    (tmp_path / "a.jsonl").write_bytes(bucket)
    options = EncodeOptions(str(byte_level), unit_bytes=5000)
    local = encode([tmp_path / "a.jsonl"], tmp_path / "local", options)
    remote = encode([address], tmp_path / "remote", options, workers=2)
    assert remote.doc_hashes.tolist() == local.doc_hashes.tolist()
    assert len(remote) == len(RECORDS)


def test_a_missing_object_is_named(bucket, tmp_path, byte_level):
    with pytest.raises(ValueError, match=r"s3://data/nothing\.jsonl: no such file"):
        encode(["s3://data/nothing.jsonl"], tmp_path / "s", EncodeOptions(str(byte_level)))


def test_an_object_that_is_replaced_while_it_is_read(bucket, s3, tmp_path, byte_level):
    s3.put_object(Bucket="data", Key="re/a.jsonl", Body=bucket)

    def replace(progress):
        if progress.units_done == 2:  # by one of the same size
            s3.put_object(Bucket="data", Key="re/a.jsonl", Body=bucket.replace(b"hello", b"jello"))

    with pytest.raises(ValueError, match=r"re/a\.jsonl: changed while it was read"):
        encode(["s3://data/re"], tmp_path / "s", EncodeOptions(str(byte_level), unit_bytes=5000), progress=replace)
    assert not (tmp_path / "s").exists()


def test_hidden_objects_folder_markers_and_brackets(s3, tmp_path, byte_level):
    s3.create_bucket(Bucket="odd")
    for key in ("in/a.jsonl", "in/.hidden.jsonl", "in/_tmp/b.jsonl", "in/part[1].jsonl"):
        s3.put_object(Bucket="odd", Key=key, Body=json.dumps({"text": key}).encode())
    s3.put_object(Bucket="odd", Key="in/", Body=b"")  # how consoles make a folder
    options = EncodeOptions(str(byte_level))
    for k, (address, count) in enumerate([("in", 2), ("in/", 2), ("in/*.jsonl", 2), ("in/part[1].jsonl", 1)]):
        assert len(encode([f"s3://odd/{address}"], tmp_path / str(k), options)) == count, address


@pytest.mark.parametrize("several", [False, True])
def test_a_saved_dataset_behind_an_address(several, s3, tmp_path, byte_level):
    saved = datasets.Dataset.from_list(RECORDS)
    saved = datasets.DatasetDict(train=saved) if several else saved
    saved.save_to_disk(tmp_path / "saved")
    bucket, split = f"saved-{several}".lower(), "#train" if several else ""
    s3.create_bucket(Bucket=bucket)
    for path in (tmp_path / "saved").rglob("*"):
        if path.is_file():
            s3.upload_file(str(path), bucket, f"d/{path.relative_to(tmp_path / 'saved')}")
    options = EncodeOptions(str(byte_level))
    local = encode([f"{tmp_path}/saved{split}"], tmp_path / "local", options)
    assert len(local) == len(RECORDS)
    for k, address in enumerate((f"s3://{bucket}/d{split}", f"file://{tmp_path}/saved{split}")):
        assert encode([address], tmp_path / str(k), options).doc_hashes.tolist() == local.doc_hashes.tolist()
    if several:
        with pytest.raises(ValueError, match=r"holds several splits; name one as .*#SPLIT, of train"):
            encode([f"s3://{bucket}/d"], tmp_path / "none", options)


@pytest.mark.parametrize("trouble", ["no credentials", "nobody answers", "no bucket"])
def test_a_store_of_objects_that_does_not_answer_is_one_sentence(trouble, tmp_path, byte_level, monkeypatch, s3):
    if trouble == "no credentials":
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        monkeypatch.setenv("HOME", str(tmp_path))
    elif trouble == "nobody answers":
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    try:
        command = ["encode", "s3://elsewhere/a.jsonl", "--out", tmp_path / "s", "--tokenizer", byte_level]
        result = CliRunner().invoke(main, list(map(str, command)))
    finally:
        fsspec.get_filesystem_class("s3").clear_instance_cache()
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit), result.exception
    assert "s3://elsewhere/a.jsonl" in result.output
    assert ("no such file" if trouble == "no bucket" else "cannot be read") in result.output


@contextmanager
def web_server(answers, *, length, ranges):
    """A server of {path: bytes}: it tells their length or does not, and knows ranges or does not."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self):
            self.do_GET(body=False)

        def do_GET(self, body=True):
            data = answers.get(self.path)
            if data is None:
                self.send_error(404)
                return
            first, last = 0, len(data) - 1
            if ranges and "Range" in self.headers:
                first, last = (int(n) for n in self.headers["Range"].removeprefix("bytes=").split("-"))
                last = min(last, len(data) - 1)
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
            else:
                self.send_response(200)
            if ranges:
                self.send_header("Accept-Ranges", "bytes")
            if length:
                self.send_header("Content-Length", str(last + 1 - first))
            else:
                self.send_header("Connection", "close")
                self.close_connection = True
            self.end_headers()
            if body:
                self.wfile.write(data[first : last + 1])

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(("length", "ranges"), [(True, True), (True, False), (False, False)])
def test_web_servers_of_every_kind(length, ranges, tmp_path, byte_level):
    """Names with a query behind them, texts with links, and servers that tell neither length nor ranges."""
    pytest.importorskip("aiohttp", reason="NOT TESTED, the package aiohttp is absent")
    records = [*RECORDS, {"text": '<a href="/b.jsonl">http://127.0.0.1/c.jsonl</a>'}]
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    options = EncodeOptions(str(byte_level), unit_bytes=5000)
    local = encode([tmp_path / "a.jsonl"], tmp_path / "local", options)
    answers = {"/a.jsonl": lines, "/a.jsonl.gz?download=true": gzip.compress(lines)}
    with web_server(answers, length=length, ranges=ranges) as address:
        for k, path in enumerate(answers):
            store = encode([address + path], tmp_path / str(k), options)
            assert store.doc_hashes.tolist() == local.doc_hashes.tolist()
            assert [entry["name"] for entry in store.info.inputs] == [path[1:].split("?")[0]]
        units = len(json.loads((tmp_path / "0" / "store.json").read_text())["units"])
        assert (units > 1) == ranges, "cut where reading can begin in the middle"
        with pytest.raises(ValueError, match=r"nothing\.jsonl: no such file"):
            encode([f"{address}/nothing.jsonl"], tmp_path / "none", options)
