"""A packed folder to look at, sound and to be damaged."""

import json
import random
import shutil
from pathlib import Path

import pytest
from packing_runs import run

from byte_tokenizer import write_byte_tokenizer


@pytest.fixture(scope="session", params=["thd", "seqid"])
def sound(request, tmp_path_factory):
    """A packed folder of several shards, with every file that `prep pack` writes."""
    root = tmp_path_factory.mktemp("verify")
    write_byte_tokenizer(root)
    draw = random.Random(0)
    lines = [json.dumps({"text": "".join(draw.choices("abcdef ", k=draw.randint(3, 90)))}) for _ in range(150)]
    (root / "texts.jsonl").write_text("\n".join(lines))
    out = root / "out"
    arguments = ["--seq-len", 128, "--cp", 2, "--shard-size", "8K", "--workers", 1, "--format", request.param]
    result = run("pack", root / "texts.jsonl", "--out", out, "--tokenizer", root, "--quiet", *arguments)
    assert result.exit_code == 0, result.output
    assert len(list((out / "shards").iterdir())) > 2
    return out


@pytest.fixture
def copy(sound, tmp_path):
    return Path(shutil.copytree(sound, tmp_path / "copy"))
