"""`prep view` shows every document whole, marks what is trained, and escapes what comes from data."""

import json

import pytest
from click.testing import CliRunner

from byte_tokenizer import write_byte_tokenizer
from prep.cli import main


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture(scope="module", params=["thd", "seqid"])
def packed(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("view")
    write_byte_tokenizer(root)
    records = [{"prompt": f"ask {i} ", "completion": f"<script>alert({i})</script>"} for i in range(9)]
    (root / "in.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    arguments = ["--tokenizer", root, "--seq-len", 100, "--cp", 2, "--workers", 1, "--quiet", "--no-page"]
    result = run("pack", root / "in.jsonl", "--out", root / "out", "--format", request.param, *arguments)
    assert result.exit_code == 0, result.output
    return root


def test_text_ids_and_choice(packed):
    shown = run("view", packed / "out", "--random", 99, "--tokenizer", packed).output
    for i in range(9):
        assert shown.count(f"ask {i} <script>alert({i})</script>") == 1
    assert "tail padding" in shown
    assert "(in.jsonl): " in shown
    by_doc = run("view", packed / "out", "--doc", 5).output
    assert "document 5 (in.jsonl)" in by_doc
    assert by_doc.count("pack ") == 1
    two = run("view", packed / "out", "--random", 2, "--seed", 1).output
    assert two.count("targets\n") >= 2 or two.count(" of ") >= 2
    assert run("view", packed / "out", "--random", 2, "--seed", 1).output == two


def test_page_escapes_and_is_deterministic(packed, tmp_path):
    for name in ("a.html", "b.html"):
        result = run("view", packed / "out", "--random", 99, "--tokenizer", packed, "--html", tmp_path / name)
        assert result.exit_code == 0, result.output
    page = (tmp_path / "a.html").read_text()
    assert page == (tmp_path / "b.html").read_text()
    assert "<script" not in page
    assert page.count("<b>&lt;script&gt;alert(4)&lt;/script&gt;</b>") == 1


def test_misuse(packed):
    for arguments, message in (
        (["--pack", 99], "has packs 0 to"),
        (["--doc", 99], "document 99 is in no pack"),
        (["--pack", 0, "--doc", 1], "exclude each other"),
        (["--tokenizer", packed / "none"], "no such file"),
    ):
        result = run("view", packed / "out", *arguments)
        assert result.exit_code == 1
        assert message in result.output
