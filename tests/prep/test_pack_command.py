"""Misuse of `prep pack` and `prep report`, gates, and what --help imports."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from packing_runs import packed, run, tree, write_jsonl


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
    for number in ("1.2.3", ".", "1e", "0.9.%"):
        result = run("pack", source, "--out", tmp_path / "no", *arguments, "--gate", f"fill>={number}")
        assert f"--gate 'fill>={number}': write METRIC<=NUMBER" in result.output
    assert not (tmp_path / "no").exists()


def test_what_is_held_out_is_not_dropped_to_a_gate(tokenizer, tmp_path):
    texts = [*("x" * 9 + str(i % 10) for i in range(60)), "z" * 300]  # which the hash leaves in train
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": text} for text in texts])
    packed(source, tmp_path / "a", tokenizer, "--overlong", "drop")
    arguments = ["--seq-len", 256, "--overlong", "drop", "--eval-fraction", 0.3, "--no-page", "--quiet"]
    total = json.loads((tmp_path / "a" / "ledger.json").read_text())["total"]
    share = total["dropped"]["overlong"]["tokens"] / total["read"]["tokens"]
    assert 0.25 < share < 0.4
    for limit, code in ((share * 1.01, 0), (share * 0.99, 3)):
        out = tmp_path / f"out{code}"
        result = run("pack", tmp_path / "a.store", "--out", out, *arguments, "--gate", f"dropped<={limit:.6f}")
        assert result.exit_code == code, result.output


LIMITED = """
import resource, sys
from prep.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), -1))  # as a full disk, write() fails half-way
main(sys.argv[2:])
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_named_with_what_to_do(source, tokenizer, tmp_path, workers):
    root = Path(__file__).parent.parent.parent

    def limited(*arguments):
        # Coverage or compiled kernels are files, too, but small ones.
        code = [sys.executable, "-c", LIMITED, 30_000, *arguments]
        return subprocess.run([str(c) for c in code], capture_output=True, text=True, cwd=root)

    store = packed(source, tmp_path / "whole", tokenizer).with_name("whole.store")
    options = ["--seq-len", 256, "--quiet", "--no-page", "--workers", workers]
    arguments = ["pack", store, "--out", tmp_path / "out", *options]
    full = limited(*arguments)
    assert full.returncode == 1
    shard = tmp_path / "out" / "shards" / "00000.arrow"
    advice = f"make room and go on with --resume, what is finished is kept in {tmp_path / 'out'}"
    assert full.stderr == f"Error: {shard}: File too large; {advice}\n"
    assert tree(tmp_path / "out") == {}
    assert run(*arguments, "--resume").exit_code == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    full = limited("convert", tmp_path / "out", "--to", "seqid", "--out", tmp_path / "seqid")
    assert full.stderr.endswith("shards/00000.arrow: File too large; make room and run the same command again\n")
    assert not list(tmp_path.glob("seqid*"))


def test_report_of_what_is_no_packed_folder(tmp_path):
    (tmp_path / "file").touch()
    for folder, message in (
        (tmp_path, "holds no packed shards"),
        (tmp_path / "none", "no such folder of packed shards"),
        (tmp_path / "file", "is a file and no folder of packed shards"),
    ):
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
