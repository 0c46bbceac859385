"""Inputs on a real S3 server on loopback."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prep.encode.options import EncodeOptions
from prep.encode.run import encode

pytest.importorskip("s3fs", reason="NOT TESTED, the package s3fs is absent")
moto_server = pytest.importorskip("moto.server", reason="NOT TESTED, the package moto[server] is absent")
boto3 = pytest.importorskip("boto3", reason="NOT TESTED, the package boto3 is absent")

RECORDS = [{"text": f"hello number {k} – naïve"} for k in range(300)]


@pytest.fixture(scope="module")
def bucket():
    """A bucket with the same records in several formats."""
    with pytest.MonkeyPatch.context() as patch:
        server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        client = boto3.client("s3")
        client.create_bucket(Bucket="data")
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS).encode()
        client.put_object(Bucket="data", Key="in/a.jsonl", Body=lines)
        client.put_object(Bucket="data", Key="gz/a.jsonl.gz", Body=gzip.compress(lines))
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(RECORDS), sink, row_group_size=50)
        client.put_object(Bucket="data", Key="pq/a.parquet", Body=sink.getvalue().to_pybytes())
        yield lines
        server.stop()


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
