"""Stores and packed folders on a real S3 server on loopback: the bytes of local ones, whatever dies on the way."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from prep.cli import main
from prep.encode.options import EncodeOptions
from prep.encode.run import write_store
from prep.encode.sources import SourceSpec
from prep.encode.storage import fetch_store
from prep.encode.store import DocumentStore

ROOT = Path(__file__).parents[3]
RECORDS = [{"text": f"hello number {k} – naïve " + "very " * (k % 30)} for k in range(800)]


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return path


@pytest.fixture
def bucket(s3, request):
    """A new bucket: (address, a function that gives its objects as a dict of name → bytes)."""
    name = "b" + hashlib.sha256(request.node.name.encode()).hexdigest()[:20]
    s3.create_bucket(Bucket=name)

    def objects(prefix=""):
        found = s3.get_paginator("list_objects_v2").paginate(Bucket=name, Prefix=prefix)
        keys = [entry["Key"] for page in found for entry in page.get("Contents", ())]
        return {key.removeprefix(prefix): s3.get_object(Bucket=name, Key=key)["Body"].read() for key in keys}

    return f"s3://{name}", objects


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def options(tokenizer, **more):
    return EncodeOptions(str(tokenizer), unit_bytes=8000, **more)


def test_a_remote_store_has_the_bytes_of_a_local_one(bucket, lines, tmp_path, byte_level):
    address, objects = bucket
    local = write_store([lines], tmp_path / "local", options(byte_level))
    remote = write_store([lines], f"{address}/store/", options(byte_level), workers=2)
    assert remote == local
    assert objects("store/") == files(tmp_path / "local")
    assert len(local["units"]) > 5
    assert write_store([lines], f"{address}/store", options(byte_level)) == local  # finished: left as it is
    with pytest.raises(ValueError, match=r"s3://.*/store: was made with other options.dedup"):
        write_store([lines], f"{address}/store", options(byte_level, dedup="exact"))
    with pytest.raises(ValueError, match="read from a folder of this machine"):
        DocumentStore.open(f"{address}/store")


def test_tokenizer_and_template_behind_addresses(bucket, lines, tmp_path, byte_level, s3):
    address, objects = bucket
    for path in byte_level.iterdir():
        s3.upload_file(str(path), address[5:], f"model/{path.name}")
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}"
    (tmp_path / "t.jinja").write_text(template)
    s3.put_object(Bucket=address[5:], Key="t.jinja", Body=template.encode())
    local = write_store([lines], tmp_path / "a", options(byte_level, chat_template=str(tmp_path / "t.jinja")))
    there = options(f"{address}/model/", chat_template=f"{address}/t.jinja")
    assert write_store([lines], f"{address}/store", there) == local
    assert objects("store/") == files(tmp_path / "a")
    with pytest.raises(ValueError, match=r"no tokenizer\.json there"):
        write_store([lines], f"{address}/s", options(f"{address}/nothing"))


def test_shares_duplicates_and_rejects_of_a_remote_store(bucket, lines, tmp_path, byte_level):
    address, objects = bucket
    bad = tmp_path / "bad.jsonl"
    bad.write_text(lines.read_text() + "{\n" + lines.read_text())
    specs = [SourceSpec("a", (str(lines),), weight=1), SourceSpec("b", (str(bad),), weight=2, max_epochs=1.5)]
    more = options(byte_level, dedup="exact", on_error="skip")
    for place in (tmp_path / "local", f"{address}/deep/er"):
        with pytest.raises(ValueError, match="source b: no document is left"):
            write_store(specs, place, more)
    assert not {"deep/er/store.json", "deep/er/rows.arrow"} & objects().keys()
    more = options(byte_level, on_error="skip")
    for place in (tmp_path / "local", f"{address}/deep/er"):
        write_store(specs, place, more, resume=True)
    assert objects("deep/er/") == files(tmp_path / "local")
    assert {"rows.arrow", "rejects.jsonl", "ledger.json"} <= objects("deep/er/").keys()
    ledger = json.loads(objects("deep/er/")["ledger.json"])
    assert ledger["sources"]["b"]["dropped"]["error"]["documents"] == 1


@pytest.mark.parametrize("wanted", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_kills_at_random_moments_and_resumes(wanted, bucket, lines, tmp_path, byte_level):
    address, objects = bucket
    write_store([lines], tmp_path / "local", options(byte_level))
    script = (
        "import sys; from prep.encode.run import write_store; from prep.encode.options import EncodeOptions\n"
        "if __name__ == '__main__':\n"
        "    print('begun', flush=True)\n"
        "    write_store(sys.argv[3:], sys.argv[1], EncodeOptions(sys.argv[2], unit_bytes=8000), resume=True)\n"
    )
    (tmp_path / "run.py").write_text(script)
    draw, kills = random.Random(3), 0
    while kills < wanted:
        process = subprocess.Popen(
            [sys.executable, tmp_path / "run.py", f"{address}/{kills // 3}", byte_level, lines],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
        )
        process.stdout.readline()
        try:
            process.wait(draw.uniform(1.0, 2.2))
            assert process.returncode == 0, "the run failed by itself"
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
    for k in range(-(-kills // 3)):
        write_store([lines], f"{address}/{k}", options(byte_level), resume=True, workers=2)
        assert objects(f"{k}/") == files(tmp_path / "local")


def test_a_refused_put_is_named_and_can_be_resumed(bucket, lines, tmp_path, byte_level, monkeypatch):
    """The server refuses the seventh put, as one with a quota does."""
    from moto.s3.exceptions import S3AclAndGrantError
    from moto.s3.models import S3Backend

    address, objects = bucket
    real, puts = S3Backend.put_object, []

    def refuse(self, *args, **kwargs):
        puts.append(1)
        if len(puts) >= 7:
            raise S3AclAndGrantError
        return real(self, *args, **kwargs)

    monkeypatch.setattr(S3Backend, "put_object", refuse)
    result = CliRunner().invoke(main, encode_command(lines, f"{address}/s", byte_level))
    assert result.exit_code == 1
    assert f"Error: {address}/s/units/" in result.output
    assert "cannot be written" in result.output
    assert "go on with --resume" in result.output
    assert len(objects("s/")) == 6
    assert "store.json" not in objects("s/")
    monkeypatch.undo()
    result = CliRunner().invoke(main, encode_command(lines, f"{address}/s", byte_level))
    assert "--resume" in result.output, "an unfinished store is gone on with only on request"
    assert CliRunner().invoke(main, [*encode_command(lines, f"{address}/s", byte_level), "--resume"]).exit_code == 0
    write_store([lines], tmp_path / "local", options(byte_level))
    assert objects("s/") == files(tmp_path / "local")


def encode_command(lines, out, tokenizer):
    names = ["encode", lines, "--out", out, "--tokenizer", tokenizer, "--unit-bytes", "8000", "--workers", "1"]
    return [str(name) for name in [*names, "--quiet"]]


def test_a_damaged_object_is_made_again_on_resume(bucket, lines, tmp_path, byte_level, s3):
    address, objects = bucket
    write_store([lines], f"{address}/s", options(byte_level))
    before = objects("s/")
    s3.delete_object(Bucket=address[5:], Key="s/store.json")
    s3.delete_object(Bucket=address[5:], Key="s/units/00002.arrow")
    data = bytearray(before["units/00001.arrow"])
    data[len(data) // 2] ^= 1
    s3.put_object(Bucket=address[5:], Key="s/units/00001.arrow", Body=bytes(data))
    s3.put_object(Bucket=address[5:], Key="s/units/00003.json", Body=b'{"index": ')
    done = []
    write_store([lines], f"{address}/s", options(byte_level), resume=True, progress=done.append)
    assert objects("s/") == before


def test_what_is_not_ours_is_refused(bucket, lines, byte_level, s3):
    address, objects = bucket
    s3.put_object(Bucket=address[5:], Key="made/", Body=b"")  # a folder as consoles make it is empty
    write_store([lines], f"{address}/made", EncodeOptions(str(byte_level)))
    s3.delete_objects(Bucket=address[5:], Delete={"Objects": [{"Key": f"made/{name}"} for name in objects("made/")]})
    s3.put_object(Bucket=address[5:], Key="s/precious.txt", Body=b"x")
    with pytest.raises(ValueError, match="already holds something"):
        write_store([lines], f"{address}/s", options(byte_level))
    result = CliRunner().invoke(main, pack_command(lines, f"{address}/s", byte_level))
    assert "precious.txt, which is none of ours" in result.output
    assert set(objects()) == {"s/precious.txt"}


def pack_command(source, out, tokenizer=None, *more):
    names = ["pack", source, "--out", out, "--seq-len", 256, "--shard-size", "64K", "--quiet", "--workers", 1, *more]
    return [str(name) for name in (names if tokenizer is None else [*names, "--tokenizer", tokenizer])]


def test_packing_from_and_to_an_address(bucket, lines, tmp_path, byte_level, s3):
    address, objects = bucket
    assert CliRunner().invoke(main, pack_command(lines, tmp_path / "local", byte_level)).exit_code == 0
    to = CliRunner().invoke(main, pack_command(lines, f"{address}/packed", byte_level))
    assert to.exit_code == 0, to.output
    assert objects("packed/") == files(tmp_path / "local")
    assert objects("packed.store/") == files(tmp_path / "local.store")
    assert len([name for name in objects("packed/") if name.startswith("shards/")]) > 1
    back = CliRunner().invoke(main, pack_command(f"{address}/packed.store", tmp_path / "back"))
    assert back.exit_code == 0, back.output
    assert files(tmp_path / "back") == files(tmp_path / "local")
    again = CliRunner().invoke(main, pack_command(lines, f"{address}/packed", byte_level))
    assert "already holds finished shards" in again.output
    # An interrupted put is gone on with; shards of other options are not mixed in.
    before = objects("packed/")
    for name in ("manifest.json", "shards/00001.arrow"):
        s3.delete_object(Bucket=address[5:], Key=f"packed/{name}")
    refused = CliRunner().invoke(main, pack_command(lines, f"{address}/packed", byte_level))
    assert "holds an unfinished run; go on with --resume" in refused.output
    assert CliRunner().invoke(main, pack_command(lines, f"{address}/packed", byte_level, "--resume")).exit_code == 0
    assert objects("packed/") == before


def test_two_runs_to_one_address_are_not_mixed(bucket, lines, byte_level, monkeypatch):
    """An address has no lock: what another run put while this one packed is left as it is."""
    from prep import pack_command as module

    address, objects = bucket
    read_reports, first = module.read_reports, []

    def meanwhile(folders):
        if not first:
            first.append(CliRunner())
            other = pack_command(lines, f"{address}/packed", byte_level, "--algo", "greedy")
            assert first[0].invoke(main, other).exit_code == 0
            first.append(objects("packed/"))
        return read_reports(folders)

    monkeypatch.setattr(module, "read_reports", meanwhile)
    refused = CliRunner().invoke(main, pack_command(lines, f"{address}/packed", byte_level))
    assert refused.exit_code == 1
    assert "another run put ledger.json there meanwhile" in refused.output
    assert objects("packed/") == first[1]


def test_a_full_temporary_folder_is_named_with_what_to_do(bucket, lines, byte_level, monkeypatch):
    import errno

    from prep import pipeline

    def full(*arguments, **more):
        raise OSError(errno.ENOSPC, "No space left on device", "/somewhere/00000.arrow")

    monkeypatch.setattr(pipeline, "materialize", full)
    address, objects = bucket
    result = CliRunner().invoke(main, pack_command(lines, f"{address}/packed", byte_level))
    assert result.exit_code == 1
    advice = "it is made there and then put: set TMPDIR to a folder with more room"
    assert result.output == f"Error: /somewhere/00000.arrow: No space left on device; {advice}\n"
    assert objects("packed/") == {}


def test_a_copied_store_is_whole_or_refused(bucket, lines, tmp_path, byte_level, s3):
    address, objects = bucket
    with pytest.raises(ValueError, match="no finished document store"):
        fetch_store(f"{address}/s", tmp_path / "copy")
    write_store([lines], f"{address}/s", options(byte_level))
    data = bytearray(objects()["s/units/00001.arrow"])
    data[len(data) // 2] ^= 1
    s3.put_object(Bucket=address[5:], Key="s/units/00001.arrow", Body=bytes(data))
    with pytest.raises(ValueError, match=r"s/units/00001.arrow: is damaged"):
        fetch_store(f"{address}/s", tmp_path / "copy")
    assert not (tmp_path / "copy" / "store.json").exists()
    data[len(data) // 2] ^= 1
    s3.put_object(Bucket=address[5:], Key="s/units/00001.arrow", Body=bytes(data))
    fetch_store(f"{address}/s", tmp_path / "copy")
    assert len(DocumentStore.open(tmp_path / "copy")) == len(RECORDS)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("x")
    with pytest.raises(ValueError, match="holds something else"):
        fetch_store(f"{address}/s", tmp_path / "other")
