"""`encode` as a whole: the same bytes whatever the workers, kills and resumes, and a ledger that adds up."""

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from encoding_runs import chats, digest, documents, run, texts, write_jsonl

from prep.encode import storage
from prep.encode.options import EncodeOptions, MaskPolicy
from prep.encode.run import encode
from prep.encode.store import DocumentStore, UnitWriter

ROOT = Path(__file__).parents[3]


def test_workers_change_no_byte(tmp_path, byte_level):
    inputs = [write_jsonl(tmp_path / "a.jsonl", chats(200)), write_jsonl(tmp_path / "b.jsonl", texts(200))]
    digests = set()
    for workers in (1, 2, 3):
        run(inputs, tmp_path / f"w{workers}", byte_level, workers=workers, unit_bytes=3000)
        digests.add(digest(tmp_path / f"w{workers}"))
    assert len(digests) == 1


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


def test_parts_of_an_array_make_the_same_store(tmp_path, byte_level):
    path = write_jsonl(tmp_path / "a.jsonl", chats(100))
    options = EncodeOptions(str(byte_level), unit_bytes=3000)
    run(path, tmp_path / "whole", byte_level, unit_bytes=3000)
    units, made = len(list((tmp_path / "whole" / "units").glob("*.arrow"))), 0
    for part in (2, 3, 1):
        assert encode([path], tmp_path / "parts", options, unit_range=(part, 3)) is None
        before, made = made, len(list((tmp_path / "parts" / "units").glob("*.arrow")))
        assert made - before in (units // 3, -(-units // 3)), "a part leaves the others their units"
    assert made == units > 3
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


def test_every_unit_is_durable_before_the_store_is_finished(tmp_path, byte_level, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", texts(300))
    synced = []
    real_file, real_folder, real_json = storage.sync_file, storage.sync_folder, storage.FolderStorage.write_json
    monkeypatch.setattr(storage, "sync_file", lambda path: (real_file(path), synced.append(path.name)))
    monkeypatch.setattr(storage, "sync_folder", lambda path: (real_folder(path), synced.append(path.name)))

    def write_json(self, name, value):
        if name == "store.json":
            units = sorted(file.name for file in (tmp_path / "s" / "units").iterdir())
            assert sorted(synced[:-1]) == units
            assert synced[-1] == "units"
            synced.append("finished")
        real_json(self, name, value)

    monkeypatch.setattr(storage.FolderStorage, "write_json", write_json)
    run(path, tmp_path / "s", byte_level, unit_bytes=4096)
    assert len(synced) > 8
    assert synced[-1] == "finished"


@pytest.mark.parametrize("left", [b"", b"{", b"{}"])
def test_a_record_that_did_not_reach_the_disk_costs_its_unit(tmp_path, byte_level, left):
    """What a machine may leave that went down in the middle of a run."""
    path = write_jsonl(tmp_path / "a.jsonl", texts(100))
    run(path, tmp_path / "s", byte_level, unit_bytes=2048)
    expected = digest(tmp_path / "s")
    (tmp_path / "s" / "store.json").unlink()
    (tmp_path / "s" / "units" / "00001.json").write_bytes(left)
    run(path, tmp_path / "s", byte_level, unit_bytes=2048, resume=True)
    assert digest(tmp_path / "s") == expected
