"""`prep pack` and `prep report` as a user runs them: real files, real processes, kills, and misuse."""

import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from tokenizers import Tokenizer

from byte_tokenizer import write_byte_tokenizer
from formats.dataset import PackedDataset
from formats.layout import check_thd, seqid_to_thd
from formats.manifest import read_manifest
from formats.shard import Shard
from prep.cli import main

KILLS = 5
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "naïve", "日本語", "émigrés"]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(folder)
    return folder


def chats(count, seed=0, longest=6):
    draw = random.Random(seed)

    def words():
        return " ".join(draw.choices(WORDS, k=draw.randint(1, longest)))

    for i in range(count):
        if i % 7 == 3:
            yield {"prompt": words(), "completion": words()}
        elif i % 7 == 5:
            yield {"text": words()}
        else:
            turns = [{"role": ("user", "assistant")[t % 2], "content": words()} for t in range(2 * draw.randint(1, 2))]
            yield {"messages": turns}


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def packed(source, out, tokenizer, *arguments, page=False):
    arguments = [*arguments, *([] if page else ["--no-page"])]
    result = run(
        "pack", source, "--out", out, "--tokenizer", tokenizer, "--seq-len", 256, "--workers", 1, "--quiet", *arguments
    )
    assert result.exit_code == 0, result.output
    return out


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("source") / "chats.jsonl", chats(300))


def documents_of(folder):
    """doc id → (ids, mask) put together from the slots of a packed folder, checking every row on the way."""
    dataset = PackedDataset(folder)
    m, found = dataset.manifest, {}
    for i in range(len(dataset)):
        pack = dataset[i]
        dataset.check(i)
        if m.kind == "thd":
            ids, mask, seq_lens, slots = pack[:4]
        else:
            ids, mask, seq_lens, slots = seqid_to_thd(*(pack[c] for c in (0, 1, 3)), align=m.align)
        check_thd(ids, mask, seq_lens, slots, capacity=m.capacity, align=m.align)
        starts = np.cumsum(slots) - slots
        for start, n, doc, offset in zip(starts, seq_lens, pack.doc_ids, pack.doc_offsets, strict=True):
            piece = (ids[start : start + n].tolist(), mask[start : start + n].tolist())
            assert (doc, offset) not in found
            found[int(doc), int(offset)] = piece
    whole = {}
    for (doc, offset), (ids, mask) in sorted(found.items()):
        so_far = whole.setdefault(doc, ([], []))
        assert len(so_far[0]) == offset
        so_far[0].extend(ids)
        so_far[1].extend(mask)
    return whole


def test_every_document_arrives_whole_and_masked(source, tokenizer, tmp_path):
    folder = packed(source, tmp_path / "out", tokenizer, "--algo", "ffd", "--cp", 2)
    documents = documents_of(folder)
    decode = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).decode
    records = list(chats(300))
    assert sorted(documents) == list(range(300))
    for number, record in enumerate(records):
        ids, mask = documents[number]
        targets = decode([i for i, m in zip(ids, mask, strict=True) if m], skip_special_tokens=False)
        if "messages" in record:
            whole = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in record["messages"])
            trained = "".join(m["content"] + "<|im_end|>" for m in record["messages"] if m["role"] == "assistant")
            assert decode(ids, skip_special_tokens=False) == whole
            assert targets == trained
        elif "prompt" in record:
            assert decode(ids, skip_special_tokens=True) == record["prompt"] + record["completion"]
            assert targets == record["completion"] + "<|im_end|>"
        else:
            assert decode(ids, skip_special_tokens=True) == record["text"]


def test_the_same_documents_in_every_format_and_alignment(source, tokenizer, tmp_path):
    reference = documents_of(packed(source, tmp_path / "a", tokenizer))
    store = tmp_path / "a.store"
    for name, arguments in {
        "b": ["--format", "seqid"],
        "c": ["--format", "seqid", "--cp", 4],
        "d": ["--cp", 8, "--algo", "greedy", "--order", "input"],
        "e": ["--algo", "bfd", "--seed", 3, "--max-docs", 4],
    }.items():
        result = run("pack", store, "--out", tmp_path / name, "--seq-len", 256, "--quiet", "--no-page", *arguments)
        assert result.exit_code == 0, result.output
        assert documents_of(tmp_path / name) == reference
        assert not (tmp_path / f"{name}.store").exists()


@pytest.mark.parametrize(
    ("overlong", "kept"), [("drop", "none"), ("truncate", "head"), ("split", "all"), ("stream", "all")]
)
def test_long_documents(tokenizer, tmp_path, overlong, kept):
    source = write_jsonl(tmp_path / "long.jsonl", [{"text": "abcdefgh" * 40}, {"text": "short"}, {"text": "x" * 90}])
    options = ["--algo", "split"] if overlong == "stream" else ["--overlong", overlong]
    result = run("pack", source, "--out", tmp_path / "o", "--tokenizer", tokenizer, "--seq-len", 128, *options)
    assert result.exit_code == 0, result.output
    documents = documents_of(tmp_path / "o")
    length = {"none": None, "head": 128, "all": 321}[kept]
    assert (len(documents[0][0]) if 0 in documents else None) == length
    ledger = json.loads((tmp_path / "o" / "ledger.json").read_text())["total"]
    assert ledger["read"] == {"documents": 3, "tokens": 321 + 6 + 91}
    assert ledger["kept"]["tokens"] == sum(len(ids) for ids, _ in documents.values())
    gone = {"none": ("dropped", 321), "head": ("truncated", 321 - 128), "all": (None, 0)}[kept]
    for book in ("dropped", "truncated"):
        expected = {"overlong": {"documents": int(book == "dropped"), "tokens": gone[1]}} if book == gone[0] else {}
        assert ledger[book] == expected


def test_held_out_documents_stay_held_out_when_data_grows(tokenizer, tmp_path):
    records = list(chats(400, seed=5))
    few = packed(write_jsonl(tmp_path / "few.jsonl", records[:300]), tmp_path / "a", tokenizer, "--eval-fraction", 0.2)
    many = packed(write_jsonl(tmp_path / "many.jsonl", records), tmp_path / "b", tokenizer, "--eval-fraction", 0.2)
    parts = [{s: set(documents_of(folder / s)) for s in ("train", "eval")} for folder in (few, many)]
    for part, count in zip(parts, (300, 400), strict=True):
        assert part["train"].isdisjoint(part["eval"])
        assert len(part["train"] | part["eval"]) == count
        assert 0.1 * count < len(part["eval"]) < 0.3 * count
    assert parts[0]["eval"] == {d for d in parts[1]["eval"] if d < 300}
    assert read_manifest(few / "eval").order == "input"
    total = [json.loads((few / s / "ledger.json").read_text())["total"]["kept"]["tokens"] for s in ("train", "eval")]
    assert sum(total) == json.loads((tmp_path / "a.store" / "store.json").read_text())["tokens"]


def test_bytes_do_not_depend_on_workers_or_place(source, tokenizer, tmp_path):
    one = packed(source, tmp_path / "one", tokenizer, "--eval-fraction", 0.1, "--shard-size", "8K", page=True)
    shutil.copy(source, tmp_path / "chats.jsonl")
    two = packed(
        *(tmp_path / "chats.jsonl", tmp_path / "deep" / "er" / "two", tokenizer),
        *("--eval-fraction", 0.1, "--shard-size", "8K", "--workers", 3),
        page=True,
    )
    assert len(list((one / "train" / "shards").iterdir())) > 3
    assert tree(one) == tree(two)


def test_the_report_adds_up(source, tokenizer, tmp_path):
    folder = packed(source, tmp_path / "out", tokenizer, "--cp", 2)
    result = run("report", folder, "--json")
    assert result.exit_code == 0
    facts = json.loads(result.output)
    assert (folder / "report.html").is_file()
    assert facts == json.loads((folder / "report.json").read_text())
    documents = documents_of(folder)
    dataset = PackedDataset(folder)
    real = sum(len(ids) for ids, _ in documents.values())
    slots = sum(len(dataset[i].input_ids) for i in range(len(dataset)))
    assert facts["documents"] == 300
    assert facts["tokens"] == real
    assert facts["target_tokens"] == sum(sum(mask) for _, mask in documents.values())
    assert facts["slot_padding"] == slots - real
    assert facts["tail_padding"] == len(dataset) * 256 - slots
    assert facts["fill"] == pytest.approx(real / (len(dataset) * 256))
    assert facts["lower_bound_packs"] <= facts["packs"] == len(dataset)
    per_pack = [len(dataset[i].seq_lens) for i in range(len(dataset))]
    assert facts["documents_per_pack"] == {
        "mean": pytest.approx(np.mean(per_pack)),
        "min": min(per_pack),
        "median": np.median(per_pack),
        "max": max(per_pack),
    }
    shown = run("report", folder).output
    for text in (f"{facts['fill']:.2%}", f"{facts['packs']:,}", f"{facts['tokens']:,}", "slot padding", "tail padding"):
        assert text in shown


def command(source, out, tokenizer, *arguments):
    return [
        *(sys.executable, "-m", "prep.cli", "pack", str(source), "--out", str(out), "--tokenizer", str(tokenizer)),
        *(
            "--seq-len",
            "256",
            "--eval-fraction",
            "0.1",
            "--shard-size",
            "4K",
            "--workers",
            "2",
            "--quiet",
            "--no-page",
            *arguments,
        ),
    ]


def test_killed_at_random_moments_and_resumed_gives_the_same_bytes(source, tokenizer, tmp_path):
    root = Path(__file__).parent.parent.parent
    began = time.monotonic()
    subprocess.run(command(source, tmp_path / "whole", tokenizer), check=True, cwd=root)
    whole_seconds = time.monotonic() - began
    draw, kills = random.Random(3), 0
    for attempt in range(KILLS):
        arguments = ["--resume"] if attempt else []
        process = subprocess.Popen(
            command(source, tmp_path / "killed", tokenizer, *arguments), cwd=root, start_new_session=True
        )
        try:
            assert process.wait(draw.uniform(0.3, 1.0) * whole_seconds) == 0
            break
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
        for part in ("train", "eval"):
            folder = tmp_path / "killed" / part
            if not (folder / "manifest.json").exists():
                with pytest.raises(ValueError, match=r"no such folder|unfinished"):
                    PackedDataset(folder)
    else:
        subprocess.run(command(source, tmp_path / "killed", tokenizer, "--resume"), check=True, cwd=root)
    assert kills >= 1
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole")


def unfinished(source, tokenizer, out):
    """A folder as a kill leaves it: some shards, no manifest."""
    packed(source, out, tokenizer, "--shard-size", "8K")
    (out / "manifest.json").unlink()
    (out / "packs.arrow").unlink()
    next((out / "shards").iterdir()).unlink()
    return out


def test_an_unfinished_run_goes_on_only_with_resume_and_equal_options(source, tokenizer, tmp_path):
    whole = packed(source, tmp_path / "whole", tokenizer, "--shard-size", "8K")
    out = unfinished(source, tokenizer, tmp_path / "out")
    before = tree(out)
    arguments = ["pack", source, "--out", out, "--tokenizer", tokenizer, "--seq-len", 256, "--shard-size", "8K"]
    arguments.append("--no-page")
    result = run(*arguments)
    assert result.exit_code == 1
    assert "unfinished run; go on with --resume" in result.output
    result = run(*arguments, "--resume", "--algo", "greedy")
    assert result.exit_code == 1
    assert re.search("an unfinished run with other .*algorithm.*plan", result.output)
    assert tree(out) == before
    assert run(*arguments, "--resume").exit_code == 0
    assert {k: v for k, v in tree(out).items() if k != "report.json"} == {
        k: v for k, v in tree(whole).items() if k != "report.json"
    }


def bad(tmp_path, tokenizer, *arguments, source=None, out="out", records=None, text=None):
    """Run a call that must fail; returns its one sentence. Nothing is left under --out."""
    if text is not None:
        source = tmp_path / "in.jsonl"
        source.write_bytes(text if isinstance(text, bytes) else text.encode())
    if records is not None:
        source = write_jsonl(tmp_path / "in.jsonl", records)
    out = tmp_path / out
    before = tree(out) if out.is_dir() else None
    result = run("pack", source, "--out", out, "--tokenizer", tokenizer, "--seq-len", 64, *arguments)
    assert result.exit_code not in (0, None)
    assert isinstance(result.exception, SystemExit), result.exception
    lines = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1
    assert "Traceback" not in result.output
    assert (tree(out) if out.is_dir() else None) == before
    return lines[0]


GOOD = {"text": "hello"}


def test_misuse(tokenizer, tmp_path):
    def fail(*arguments, **options):
        # A finished store stays when packing fails later, and is used again by the same call: each case has its own.
        options.setdefault("out", f"out{next(number)}")
        return bad(tmp_path, options.pop("tokenizer", tokenizer), *arguments, **options)

    number = itertools.count()

    assert "nowhere.jsonl" in fail(source=tmp_path / "nowhere.jsonl")
    assert "in.jsonl" in (message := fail(text='{"text": "a"}\n{"text": \n'))
    assert "2" in message
    assert "in.jsonl" in (message := fail(records=[GOOD, GOOD, {"body": "x"}]))
    assert "3" in message
    assert not list(tmp_path.glob("*.store"))
    assert "tokenizer" in fail(records=[GOOD], tokenizer=tmp_path / "no-tokenizer")
    assert "multiple of 2·cp = 4" in fail("--seq-len", 62, "--cp", 2, records=[GOOD])
    assert "--overlong drop|truncate|split" in fail(records=[{"text": "x" * 100}, GOOD])
    assert "no document" in fail(text="")
    assert "no document is left after --overlong drop" in fail("--overlong", "drop", records=[{"text": "x" * 100}])
    assert "--eval-fraction nan is not in the range" in fail("--eval-fraction", "nan", records=[GOOD])
    assert "leaves no document for eval" in fail("--eval-fraction", 0.0001, records=[GOOD])
    assert "--algo nonsense is none of" in fail("--algo", "nonsense", records=[GOOD])
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("dear")
    assert "already holds thesis.tex" in fail(records=[GOOD], out="taken")
    (tmp_path / "file").write_text("x")
    assert "is a file" in fail(records=[GOOD], out="file")
    assert run("pack", tmp_path / "in.jsonl", "--out", tmp_path / "q", "--seq-len", 64).exit_code == 1


def test_a_finished_folder_is_never_overwritten(tokenizer, tmp_path):
    packed(write_jsonl(tmp_path / "in.jsonl", [GOOD]), tmp_path / "out", tokenizer)
    for arguments in ([], ["--resume"]):
        assert "already holds finished shards" in bad(tmp_path, tokenizer, *arguments, records=[GOOD])


def test_a_store_that_leaves_out_documents(tokenizer, tmp_path):
    records = [{"text": word} for word in ("one", "two", "one", "three", "two", "four")]
    folder = packed(write_jsonl(tmp_path / "in.jsonl", records), tmp_path / "out", tokenizer, "--dedup", "exact")
    decode = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).decode
    texts = {d: decode(ids, skip_special_tokens=True) for d, (ids, _) in documents_of(folder).items()}
    assert texts == {0: "one", 1: "two", 2: "three", 3: "four"}


def test_a_whole_source_is_held_out(tokenizer, tmp_path):
    sources = [write_jsonl(tmp_path / f"{name}.jsonl", chats(60, seed=n)) for n, name in enumerate("ab")]
    arguments = ["--out", tmp_path / "out", "--tokenizer", tokenizer, "--seq-len", 256, "--workers", 1, "--no-page"]
    assert run("pack", *sources, *arguments, "--eval-source", "b.jsonl").exit_code == 0
    named = {s.name: (s.first_row, s.last_row) for s in read_manifest(tmp_path / "out" / "eval").sources}
    for part, name in (("train", "a.jsonl"), ("eval", "b.jsonl")):
        assert sorted(documents_of(tmp_path / "out" / part)) == list(range(*named[name]))
    result = run("pack", tmp_path / "out.store", "--out", tmp_path / "x", "--seq-len", 256, "--eval-source", "c")
    assert result.exit_code == 1
    assert "--eval-source c is none of the sources a.jsonl, b.jsonl" in result.output


@pytest.mark.parametrize("kind", ["thd", "seqid"])
def test_compressed_shards_are_shipped_verified_and_decompressed_to_the_same_bytes(source, tokenizer, tmp_path, kind):
    small, plain, back = tmp_path / "small", tmp_path / "plain", tmp_path / "back"
    arguments = ["--seq-len", 256, "--format", kind, "--shard-size", "64K", "--workers", 1]
    assert run("pack", source, "--out", plain, "--tokenizer", tokenizer, *arguments).exit_code == 0
    result = run("pack", tmp_path / "plain.store", "--out", small, "--compress", "zstd", *arguments)
    assert result.exit_code == 0, result.output
    assert f"training cannot map them: prep convert --to {kind} decompresses" in result.stderr
    assert read_manifest(small).fingerprint == read_manifest(plain).fingerprint
    assert documents_of(small) == documents_of(plain)
    size = {f: sum(p.stat().st_size for p in (f / "shards").iterdir()) for f in (plain, small)}
    assert size[small] < 0.6 * size[plain]
    assert run("verify", small, "--deep").exit_code == 0
    assert "compressed for shipping" in (small / "report.html").read_text()
    assert PackedDataset(small).manifest.options["compress"] == "zstd"

    assert run("convert", small, "--to", kind, "--out", back, "--workers", 1).exit_code == 0
    assert run("verify", back, "--deep").exit_code == 0
    for path in sorted(p for p in plain.rglob("*") if p.is_file() and p.name != "manifest.json"):
        if path.parent.name == "shards":  # they repeat a hash of their options, of which compression is one
            shard, again = (Shard(p, kind) for p in (path, back / path.relative_to(plain)))
            for n in range(len(shard)):
                for want, got in zip(shard.row(n), again.row(n), strict=True):
                    np.testing.assert_array_equal(want, got)
            assert not again.compressed
        else:
            assert path.read_bytes() == (back / path.relative_to(plain)).read_bytes(), path
    refused = run("convert", back, "--to", kind, "--out", tmp_path / "x")
    assert refused.exit_code == 1
    assert f"is {kind} already" in refused.output

    (small / "manifest.json").unlink()
    assert run("verify", small, "--rebuild", "--deep").exit_code == 0
    assert read_manifest(small).options["compress"] == "zstd"


def test_drop_last_stands_in_the_ledger(source, tokenizer, tmp_path):
    packed(source, tmp_path / "whole", tokenizer)
    arguments = ["--seq-len", 256, "--drop-last", "--no-page", "--quiet"]
    assert run("pack", tmp_path / "whole.store", "--out", tmp_path / "out", *arguments).exit_code == 0
    totals = read_manifest(tmp_path / "out").totals
    account = json.loads((tmp_path / "out" / "ledger.json").read_text())["total"]
    assert totals["packs"] == read_manifest(tmp_path / "whole").totals["packs"] - 1
    assert account["dropped"]["last_pack"]["documents"] == 300 - totals["documents"] > 0
    assert account["read"]["tokens"] == totals["tokens"] + account["dropped"]["last_pack"]["tokens"]


def test_a_gate_that_is_not_met_exits_with_3_after_everything_is_written(source, tokenizer, tmp_path):
    arguments = ["--tokenizer", tokenizer, "--seq-len", 256, "--workers", 1, "--no-page", "--quiet"]
    gates = ["--gate", "fill>=0.5", "--gate", "dropped<=1%", "--gate", "packs < 10"]
    result = run("pack", source, "--out", tmp_path / "out", *arguments, *gates)
    assert result.exit_code == 3
    assert result.output.count("Error:") == 1
    assert "gate packs < 10 is not met: packs is" in result.output
    assert (tmp_path / "out" / "manifest.json").exists()
    assert run("pack", source, "--out", tmp_path / "ok", *arguments, "--gate", "fill>=0.5").exit_code == 0
    assert (
        "with a metric of fill, dropped"
        in run("pack", source, "--out", tmp_path / "no", *arguments, "--gate", "x>1").output
    )
    assert not (tmp_path / "no").exists()


def test_report_of_what_is_no_packed_folder(tmp_path):
    for folder, message in ((tmp_path, "unfinished"), (tmp_path / "none", "no such folder")):
        result = run("report", folder)
        assert result.exit_code == 1
        assert message in result.output


@pytest.mark.parametrize(("command", "name"), [("report", "out/ledger.json"), ("pack", "out.store/store.json")])
def test_a_file_that_is_no_json_is_named(command, name, source, tokenizer, tmp_path):
    packed(source, tmp_path / "out", tokenizer)
    file = tmp_path / name
    file.write_bytes(b"{" * file.stat().st_size)
    more = ["--out", tmp_path / "again", "--seq-len", 256] if command == "pack" else []
    result = run(command, file.parent, *more)
    assert result.exit_code == 1
    assert f"{file}: not readable as JSON" in result.output
    assert not (tmp_path / "again").exists()


def test_help_is_instant_because_it_imports_nothing_heavy():
    code = "import sys; from prep.cli import main\ntry:\n main(['pack', '--help'])\nexcept SystemExit: pass\n"
    heavy = "numpy pyarrow numba torch tokenizers jinja2 rich matplotlib"
    code += f"bad = [m for m in '{heavy}'.split() if m in sys.modules]; sys.exit(' '.join(bad) or 0)"
    root = Path(__file__).parent.parent.parent
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert result.returncode == 0, result.stderr
    assert "prep pack chats.jsonl" in result.stdout


def test_prep_never_imports_torch():
    code = "import sys, prep.cli, prep.pipeline, prep.inspect.terminal; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent.parent).returncode == 0


def test_optimal_prints_its_bound_and_gap(source, tokenizer, tmp_path):
    packed(source, tmp_path / "a", tokenizer)
    result = run("pack", tmp_path / "a.store", "--out", tmp_path / "b", "--seq-len", 256, "--algo", "optimal")
    assert result.exit_code == 0, result.output
    assert "proven optimal" in result.output or "no packing has fewer than" in result.output
