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

import numpy as np
import pytest
from packing_runs import packed, run, tree

from formats.dataset import PackedDataset
from formats.shard import Shard
from prep.encode.store import DocumentStore

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
            if all((tmp_path / "killed" / part / "manifest.json").exists() for part in ("train", "eval")):
                break  # it had written everything and was about to end
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
    result = run(*arguments, "--resume", "--format", "seqid")
    assert result.exit_code == 1
    assert re.search("an unfinished run with other .*kind", result.output)
    assert tree(out) == before
    assert run(*arguments, "--resume").exit_code == 0
    assert tree(out) == tree(whole)


def test_a_shard_too_many_is_no_part_of_an_unfinished_run(source, tokenizer, tmp_path):
    out = unfinished(source, tokenizer, tmp_path / "out")
    stranger = out / "shards" / "00099.arrow"
    shutil.copy(max((out / "shards").iterdir()), stranger)
    before = tree(out)
    arguments = ["--out", out, "--tokenizer", tokenizer, "--seq-len", 256, "--shard-size", "8K", "--no-page"]
    result = run("pack", source, *arguments, "--resume")
    assert result.exit_code == 1
    assert f"{stranger}: an unfinished run with other options left this shard; remove {out}" in result.output
    assert tree(out) == before


def flip_an_id(data: bytes, ids: bytes) -> bytes:
    """Another token where a pack holds one, as a bad disk leaves it: a file that every reader opens."""
    at = data.index(ids)
    return data[: at + 4] + bytes([data[at + 4] ^ 1]) + data[at + 5 :]


DAMAGES = {
    "flipped": flip_an_id,
    "cut": lambda data, ids: data[: len(data) // 2],
    "empty": lambda data, ids: b"",
    "zeros": lambda data, ids: bytes(len(data)),
    "longer": lambda data, ids: data + b"more",
}


@pytest.mark.parametrize(
    ("damage", "more"),
    [*((name, ()) for name in DAMAGES), ("flipped", ("--format", "seqid")), ("cut", ("--compress", "zstd"))],
)
def test_resume_takes_over_nothing_that_is_not_proven(source, tokenizer, tmp_path, damage, more):
    """A shard that an interrupted run left is kept where it is what would be written, and written anew else."""
    options = ["--shard-size", "16K", *more]
    whole = packed(source, tmp_path / "whole", tokenizer, *options)
    out = packed(source, tmp_path / "out", tokenizer, *options)
    good, bad = sorted((out / "shards").iterdir())[:2]
    ids = np.ascontiguousarray(Shard(bad, "seqid" if "seqid" in more else "thd").row(0)[0]).tobytes()
    (out / "manifest.json").unlink()
    bad.write_bytes(DAMAGES[damage](bad.read_bytes(), ids))
    stamp = good.stat().st_mtime_ns, good.stat().st_ino
    arguments = ["--tokenizer", tokenizer, "--seq-len", 256, "--workers", 1, "--no-page", "--resume", *options]
    result = run("pack", source, "--out", out, *arguments)
    assert result.exit_code == 0, result.output
    assert result.stderr.count("what the interrupted run left was damaged; written anew") == 1
    assert f"{bad}: what the interrupted run left" in result.stderr
    assert tree(out) == tree(whole)
    assert (good.stat().st_mtime_ns, good.stat().st_ino) == stamp


def test_a_part_that_was_finished_is_looked_at_before_it_counts(source, tokenizer, tmp_path):
    options = ["--eval-fraction", 0.1, "--shard-size", "8K"]
    whole = packed(source, tmp_path / "whole", tokenizer, *options)
    out = packed(source, tmp_path / "out", tokenizer, *options)
    (out / "eval" / "manifest.json").unlink()
    damaged = sorted((out / "train" / "shards").iterdir())[1]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    arguments = ["pack", source, "--out", out, "--tokenizer", tokenizer, "--seq-len", 256, "--resume", "--no-page"]
    result = run(*arguments, *options)
    assert result.exit_code == 1
    assert f"Error: {damaged}: damaged (its bytes changed)" in result.output
    assert f"(to make it anew, remove {out / 'train'} and go on with --resume)" in result.output
    shutil.rmtree(out / "train")
    assert run(*arguments, *options).exit_code == 0
    assert tree(out) == tree(whole)


def test_a_part_that_was_finished_with_other_options_is_refused(source, tokenizer, tmp_path):
    out = packed(source, tmp_path / "out", tokenizer, "--eval-fraction", 0.1)
    before = tree(out / "train")
    (out / "eval" / "manifest.json").unlink()
    arguments = ["pack", tmp_path / "out.store", "--out", out, "--seq-len", 256, "--no-page", "--resume"]
    result = run(*arguments, "--eval-fraction", 0.2)
    sentence = f"{out / 'train'}: was finished with other options or input; remove {out}, or name another --out"
    assert (result.exit_code, result.output.splitlines()[-1]) == (1, f"Error: {sentence}")
    assert tree(out / "train") == before


def test_a_store_whose_bytes_changed_is_not_packed(source, tokenizer, tmp_path):
    packed(source, tmp_path / "out", tokenizer)
    unit = tmp_path / "out.store" / "units" / "00000.arrow"
    content = bytearray(unit.read_bytes())
    ids = content.find(DocumentStore.open(tmp_path / "out.store").batches[0][0].tobytes())
    content[ids] ^= 1  # another token, which the vocabulary has
    unit.write_bytes(content)
    result = run("pack", tmp_path / "out.store", "--out", tmp_path / "again", "--seq-len", 256)
    assert result.exit_code == 1
    assert result.output.endswith(
        f"Error: {unit}: damaged (its bytes changed); restore it from a copy, or remove the store and encode again\n"
    )
    assert not (tmp_path / "again").exists()
