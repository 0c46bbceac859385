"""Inputs on a real S3 server on loopback."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

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
