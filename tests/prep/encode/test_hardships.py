"""What input, machines and users do to an encoding: each case ends in the right documents or in one clear sentence."""

import http.server
import json
import os
import signal
import threading
from functools import partial

import numpy as np
import pytest
from click.testing import CliRunner
from encoding_runs import digest
from tokenizers import Tokenizer

from prep.cli import main
from prep.encode import files, hub
from prep.encode.command import progress_note
from prep.encode.mix import take, wanted_tokens
from prep.encode.options import EncodeOptions
from prep.encode.run import Progress, encode
from prep.encode.sources import SourceSpec
from prep.encode.unit import encode_unit
from prep.progress import Progress as Reporter


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


def run(inputs, out, tokenizer, *, workers=1, resume=False, progress=None, **options):
    return encode(
        inputs, out, EncodeOptions(str(tokenizer), **options), workers=workers, resume=resume, progress=progress
    )


def documents(store):
    return [tuple(part.tolist() for part in store.document(i)) for i in range(len(store))]


def user(text):
    return {"role": "user", "content": text}


def model(text):
    return {"role": "assistant", "content": text}


def test_documents_that_break_other_programs(tmp_path, byte_level):
    texts = [
        "x" * 2**20,
        " " * 300_000 + "y",
        "👩‍👩‍👧‍👦🏳️‍🌈👍🏽" * 50,
        "\x00\x01\x7f\x85",
        "e\u0301" * 100,
        "a\u2028b\u2029",
    ]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    store = run([path], tmp_path / "s", byte_level, unit_bytes=100_000)
    tokenizer = Tokenizer.from_file(str(byte_level / "tokenizer.json"))
    decoded = [tokenizer.decode(store.document(i)[0].tolist()) for i in range(len(store))]
    assert decoded == texts
    assert all(mask[1:].all() and not mask[0] for _, mask in (store.document(i) for i in range(len(store))))


def test_empty_swapped_and_endless_chats(tmp_path, byte_level):
    swapped = {"messages": [model("I begin"), user("really?"), model("yes")]}
    several = {"messages": [user("a"), user("b"), model("c"), model("d")]}
    long = {"messages": [m for k in range(250) for m in (user(f"q{k}"), model(f"a{k}"))]}
    no_target = {"messages": [user("hello?")]}
    path = write_jsonl(tmp_path / "a.jsonl", [swapped, several, long, no_target])
    store = run([path], tmp_path / "s", byte_level)
    tokenizer = Tokenizer.from_file(str(byte_level / "tokenizer.json"))
    trained = []
    for i in range(len(store)):
        ids, mask = store.document(i)
        trained.append(tokenizer.decode(ids[mask == 1].tolist(), skip_special_tokens=False).split("<|im_end|>"))
    assert trained[0] == ["I begin", "yes", ""]
    assert trained[1] == ["c", "d", ""]
    assert trained[2] == [*(f"a{k}" for k in range(250)), ""]
    assert store.ledger.total()["dropped"] == {"no_targets": {"documents": 1, "tokens": len(no_target_ids(tokenizer))}}
    write_jsonl(path, [{"messages": []}])
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: messages must be a list with at least one message"):
        run([path], tmp_path / "s2", byte_level)


def no_target_ids(tokenizer):
    return tokenizer.encode("<|im_start|>user\nhello?<|im_end|>\n").ids


def test_an_input_that_vanishes_is_named_and_the_run_goes_on_when_it_is_back(tmp_path, byte_level):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"number {k}"} for k in range(300)])
    data = path.read_bytes()
    whole = documents(run([path], tmp_path / "whole", byte_level, unit_bytes=500))

    def vanish(progress):
        if progress.units_done == 3:
            path.unlink()

    with pytest.raises(OSError, match=r"a\.jsonl.*go on with --resume"):
        run([path], tmp_path / "s", byte_level, unit_bytes=500, progress=vanish)
    assert not (tmp_path / "s" / "store.json").exists()
    with pytest.raises(ValueError, match="no such file"):
        run([path], tmp_path / "s", byte_level, unit_bytes=500, resume=True)
    path.write_bytes(data)
    assert documents(run([path], tmp_path / "s", byte_level, unit_bytes=500, resume=True)) == whole


def test_an_input_that_changes_while_it_is_read_leaves_nothing(tmp_path, byte_level):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"number {k}"} for k in range(300)])

    def append(_):
        with open(path, "a") as file:
            file.write('{"text": "late"}\n')

    with pytest.raises(ValueError, match=r"a\.jsonl: changed while it was read"):
        run([path], tmp_path / "s", byte_level, unit_bytes=500, progress=append)
    assert not (tmp_path / "s").exists()


def test_an_input_that_is_touched_costs_nothing(tmp_path, byte_level):
    """Backups and copies give the same bytes another time; what saw them is not thrown away."""
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"number {k}"} for k in range(300)])
    run([path], tmp_path / "whole", byte_level, unit_bytes=500)
    seen = []

    def touch(progress):
        seen.append((progress.units_done, progress.units))
        if len(seen) == 3:
            path.write_bytes(path.read_bytes())

    run([path], tmp_path / "s", byte_level, unit_bytes=500, progress=touch)
    assert digest(tmp_path / "s") == digest(tmp_path / "whole")
    assert seen[3][0] == 1, "it went on by itself"
    times = []

    def always(progress):
        times.append(len(times))
        os.utime(path, ns=(0, len(times)))

    with pytest.raises(ValueError, match=r"a\.jsonl: is written again and again .* go on with --resume"):
        run([path], tmp_path / "t", byte_level, unit_bytes=500, progress=always)
    assert len(times) == 4, "the run and three more that it goes on by itself, each of which does a unit"
    run([path], tmp_path / "t", byte_level, unit_bytes=500, resume=True)
    assert digest(tmp_path / "t") == digest(tmp_path / "whole")


def test_an_input_that_changes_never_takes_away_what_other_parts_made(tmp_path, byte_level):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"number {k}"} for k in range(300)])
    data = path.read_bytes()
    whole = documents(run([path], tmp_path / "whole", byte_level, unit_bytes=500))
    options = EncodeOptions(str(byte_level), unit_bytes=500)
    encode([path], tmp_path / "s", options, unit_range=(1, 2))
    made = len(list((tmp_path / "s" / "units").glob("*.json")))

    def append(_):
        path.write_bytes(data + data)

    with pytest.raises(ValueError, match="changed while it was read"):
        encode([path], tmp_path / "s", options, unit_range=(2, 2), progress=append)
    assert len(list((tmp_path / "s" / "units").glob("*.json"))) == made + 1
    path.write_bytes(data)
    assert documents(run([path], tmp_path / "s", byte_level, unit_bytes=500, resume=True)) == whole


def test_a_store_holds_what_was_hashed(tmp_path, byte_level, monkeypatch):
    """A file that changes while later ones are hashed, and files of a dataset that change before it is read."""
    first, second = (write_jsonl(tmp_path / name, [{"text": "old"}]) for name in ("a.jsonl", "b.jsonl"))
    real = files.file_facts

    def hash_late(path):
        facts = real(path)
        if path == str(second):
            write_jsonl(first, [{"text": "new"}])
        return facts

    monkeypatch.setattr(files, "file_facts", hash_late)
    with pytest.raises(ValueError, match=r"a\.jsonl: changed while it was read"):
        run([str(first), str(second)], tmp_path / "s", byte_level)
    monkeypatch.undo()
    (tmp_path / "data").mkdir()
    path = write_jsonl(tmp_path / "data" / "train.jsonl", [{"text": "old"}])
    read = hub.read_hub
    monkeypatch.setattr(hub, "read_hub", lambda *given: write_jsonl(path, [{"text": "new"}]) and read(*given))
    with pytest.raises(ValueError, match=r"data#train: changed while it was read"):
        run([f"hf:{tmp_path / 'data'}#train"], tmp_path / "t", byte_level)


@pytest.mark.parametrize("package", ["tokenizers", "fastokens"])
def test_another_library_version_is_refused_by_name(tmp_path, byte_level, package):
    pytest.importorskip(package)
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x y z"}])
    run([path], tmp_path / "s", byte_level)
    (tmp_path / "s" / "store.json").unlink()
    plan = json.loads((tmp_path / "s" / "plan.json").read_text())
    assert package in plan["packages"]
    plan["packages"][package] = "0.1.2"
    (tmp_path / "s" / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(ValueError, match=rf'other packages\.{package} \("0\.1\.2", now "'):
        run([path], tmp_path / "s", byte_level, resume=True)


def killed(job, unit):
    if unit.index == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode_unit(job, unit)


def test_a_killed_worker_is_one_sentence(tmp_path, byte_level, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"number {k}"} for k in range(100)])
    command = ["encode", str(path), "--out", str(tmp_path / "s"), "--tokenizer", str(byte_level), "--quiet"]
    command += ["--unit-bytes", "300", "--workers", "2"]
    monkeypatch.setattr("prep.encode.run.encode_unit", killed)
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 1
    assert "killed by SIGKILL (the machine may have run out of memory: use fewer workers)" in result.output
    assert "--resume" in result.output
    monkeypatch.undo()
    assert CliRunner().invoke(main, [*command, "--resume"]).exit_code == 0


def test_ctrl_c_in_pack_says_how_to_go_on(tmp_path, byte_level, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}])
    monkeypatch.setattr("prep.pipeline.write_store", stop)
    command = ["pack", path, "--out", tmp_path / "p", "--tokenizer", byte_level, "--seq-len", "64"]
    result = CliRunner().invoke(main, list(map(str, command)))
    assert result.exit_code == 1
    assert f"stopped; what is finished is kept in {tmp_path / 'p'}: go on with --resume" in result.output


def test_progress_tells_rates_skipped_records_and_the_time_left(capsys, monkeypatch):
    done = Progress(3, 12, 6_000_000, 24_000_000, 100, 5_000, 7, 4)
    assert progress_note(done, 2.0) == (
        "6 of 24 MB, 3.0 MB/s, 100 documents, 5,000 tokens, 2,500 tokens/s, 3 dropped, 4 bad records skipped"
    )
    clock = iter([100.0, 110.0])
    monkeypatch.setattr("prep.progress.time.monotonic", lambda: next(clock))
    with Reporter().stage("encoding", "units") as update:
        update(3, 12, "note")
    assert capsys.readouterr().err == "encoding: 3/12 units, 10 s, ETA 30 s, note\n"


def test_a_dataset_by_name_is_read_once_and_known_by_its_files(tmp_path, byte_level, monkeypatch):
    folder = tmp_path / "data"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", [{"text": "one"}, {"text": "two"}])
    real, reads = hub.read_hub, []
    monkeypatch.setattr(hub, "read_hub", lambda *given: reads.append(given) or real(*given))
    store = run([f"hf:{folder}#train"], tmp_path / "s", byte_level)
    assert (len(store), len(reads)) == (2, 1)
    assert "datasets" in store.info.packages
    with pytest.raises(ValueError, match="no split 'tset'; name one as hf:NAME#SPLIT, of train"):
        run([f"hf:{folder}#tset"], tmp_path / "t", byte_level)
    write_jsonl(folder / "train.jsonl", [{"text": "one"}, {"text": "six"}])
    with pytest.raises(ValueError, match="other inputs"):
        run([f"hf:{folder}#train"], tmp_path / "s", byte_level)
    with pytest.raises(ValueError, match="datasets cannot open it"):
        run([f"hf:{tmp_path}/nothing"], tmp_path / "u", byte_level)


def test_an_address_of_a_plain_web_server(tmp_path, byte_level):
    """One that knows no ranges, as Python's: the file is streamed."""
    pytest.importorskip("aiohttp", reason="NOT TESTED, the package aiohttp is absent")
    (tmp_path / "web").mkdir()
    path = write_jsonl(tmp_path / "web" / "a.jsonl", [{"text": f"number {k}"} for k in range(300)])
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "web"))
    handler.log_message = lambda *_: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        store = run([f"http://127.0.0.1:{server.server_port}/a.jsonl"], tmp_path / "s", byte_level)
    finally:
        server.shutdown()
        server.server_close()
    assert documents(store) == documents(run([path], tmp_path / "local", byte_level))


def test_a_share_is_exact_to_one_document_and_within_its_epochs():
    draw = np.random.default_rng(0)
    for _ in range(200):
        lengths = draw.integers(1, 400, draw.integers(1, 60)).astype(np.int32)
        hashes = draw.integers(0, 2**63, lengths.size).astype(np.uint64)
        rows, have = np.arange(lengths.size), int(lengths.sum())
        want = int(draw.integers(1, 4 * have))
        taken = take(rows, lengths, hashes, want)
        assert 2 * abs(int(lengths[taken].sum()) - want) <= lengths.max()  # half of the document at the border
        assert np.bincount(taken, minlength=1).max() <= -(
            -want // have
        )  # no document more often than the passes that are begun
        weights, caps = draw.uniform(0.1, 5, 3), draw.uniform(0.5, 4, 3)
        tokens = draw.integers(1000, 10**6, 3).tolist()
        specs = [SourceSpec(str(k), (), weight=weights[k], max_epochs=caps[k]) for k in range(3)]
        wanted = wanted_tokens(specs, tokens)
        assert all(w <= round(t * c) for w, t, c in zip(wanted, tokens, caps, strict=True))
        shares = np.array(wanted) / sum(wanted) - weights / weights.sum()
        assert np.abs(shares).max() < 1e-2 * max(1, 1e4 / min(wanted))
        # As much as the caps allow: one source is at its cap.
        assert any(w >= round(t * c) - 1 for w, t, c in zip(wanted, tokens, caps, strict=True))
