"""A run from raw input to shards: the same bytes whatever the workers, kills and resumes."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from packing_runs import packed, run, tree

from formats.dataset import PackedDataset

KILLS = 5


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
