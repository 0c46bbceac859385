"""What every command has: --quiet, which prints errors only, and --json."""

import json

import pytest
from packing_runs import packed, run

from prep.cli import COMMANDS


@pytest.fixture(scope="module")
def folder(source, tokenizer, tmp_path_factory):
    return packed(source, tmp_path_factory.mktemp("packed") / "out", tokenizer, "--eval-fraction", 0.1)


@pytest.mark.parametrize("name", COMMANDS)
def test_quiet_prints_nothing_and_json_prints_json_alone(name, folder, source, tokenizer, tmp_path):
    part = folder / "train"
    arguments = {
        "encode": lambda out: [source, "--out", out, "--tokenizer", tokenizer, "--workers", 1],
        "pack": lambda out: [folder.with_name("out.store"), "--out", out, "--seq-len", 256, "--workers", 1],
        "report": lambda out: [folder],
        "verify": lambda out: [folder],
        "lint": lambda out: [folder, "--workers", 1],
        "view": lambda out: [part, *(["--html", f"{out}.html"] if out.name == "quiet" else [])],
        "plan": lambda out: [folder, "--seq-len", 256, "--algo", "bfd", "--cp", 1],
        "convert": lambda out: [folder, "--to", "seqid", "--out", out, "--workers", 1],
    }[name]
    quiet = run(name, *arguments(tmp_path / "quiet"), "--quiet")
    assert (quiet.exit_code, quiet.output) == (0, "")
    for more in ([], ["--quiet"]):
        result = run(name, *arguments(tmp_path / f"json{len(more)}"), "--json", *more)
        assert result.exit_code == 0
        value = json.loads(result.stdout)
        assert value
    if name == "convert":
        assert set(value) == {str(tmp_path / "json1" / part) for part in ("train", "eval")}
        for place, said in value.items():
            assert said == {"format": "seqid", "packs": json.loads(run("report", place, "--json").stdout)["packs"]}
    if name == "view":
        assert (tmp_path / "quiet.html").is_file()
        [pack] = value
        assert pack["capacity"] == 256
        assert sum(d["tokens"] + d["padding"] for d in pack["documents"]) <= 256
        ids = [run["text"].split() for d in pack["documents"] for run in d["runs"]]
        assert sum(map(len, ids)) == sum(d["tokens"] for d in pack["documents"])
