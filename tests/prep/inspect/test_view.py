"""`prep view` shows every document whole, marks what is trained, and escapes what comes from data."""

import json
import re
import shutil
from html.parser import HTMLParser

import pytest
from click.testing import CliRunner

from byte_tokenizer import write_byte_tokenizer
from formats.manifest import read_manifest
from formats.shard import Shard
from prep.cli import main
from prep.encode.store import DocumentStore

CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u061c\u202a-\u202e\u2066-\u2069]")
"""What a terminal or a browser obeys instead of showing it; line ends and tabs apart."""


class Collect(HTMLParser):
    """Tags and attributes as a browser would find them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.attributes += attributes


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


def test_all_packs_of_a_document_in_pieces_are_shown(packed, tmp_path):
    kind = read_manifest(packed / "out").kind
    options = ["--seq-len", 8, "--overlong", "split", "--format", kind, "--workers", 1, "--quiet", "--no-page"]
    assert run("pack", packed / "out.store", "--out", tmp_path / "out", *options).exit_code == 0
    found = json.loads(run("view", tmp_path / "out", "--doc", 3, "--json", "--tokenizer", packed).output)
    pieces = sorted((d["offset"], d["tokens"]) for pack in found for d in pack["documents"] if d["doc"] == 3)
    assert len(pieces) > 3
    assert [offset for offset, _ in pieces] == [8 * k for k in range(len(pieces))]
    assert sum(tokens for _, tokens in pieces) == int(DocumentStore.open(packed / "out.store").lengths[3])


def test_a_damaged_pack_is_not_shown(packed, tmp_path):
    folder = shutil.copytree(packed / "out", tmp_path / "out")
    shard, kind = folder / "shards" / "00000.arrow", read_manifest(folder).kind
    ids, data = Shard(shard, kind).row(0)[0].tobytes(), bytearray(shard.read_bytes())
    data[data.index(ids)] ^= 1
    shard.write_bytes(data)
    result = run("view", folder)
    assert result.exit_code == 1
    assert "00000.arrow: row 0 (pack 0) is damaged" in result.output


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
    for count in (0, -1):
        assert "not in the range x>=1" in run("view", packed / "out", "--random", count).output


def test_page_escapes_and_is_deterministic(packed, tmp_path):
    for name in ("a.html", "b.html"):
        result = run("view", packed / "out", "--random", 99, "--tokenizer", packed, "--html", tmp_path / name)
        assert result.exit_code == 0, result.output
    page = (tmp_path / "a.html").read_text()
    assert page == (tmp_path / "b.html").read_text()
    assert "<script" not in page
    assert page.count("<b>&lt;script&gt;alert(4)&lt;/script&gt;</b>") == 1


HOSTILE = (
    "</pre></style><script>alert(1)</script>",
    "\" onmouseover='alert(2)' x=\"",
    "\x1b]0;owned\x07\x1b[2J\x00\r\x08\x85",
    "\u202efdp.exe\u202c \u2066\u200f",
    "<!-- --> &lt; &amp;lt; ]]>",
)


def test_hostile_documents_are_shown_and_do_nothing(tmp_path):
    """Markup, quotes, control characters (a terminal obeys them) and characters that turn the direction of what
    follows: on the page, in the terminal and in names of sources."""
    write_byte_tokenizer(tmp_path)
    name = "a\u202e\x1b[31m<b>&'\".jsonl"
    (tmp_path / name).write_text("".join(json.dumps({"prompt": "q", "completion": h}) + "\n" for h in HOSTILE))
    out = tmp_path / "out"
    arguments = ["--tokenizer", tmp_path, "--seq-len", 256, "--workers", 1, "--quiet"]
    result = run("pack", tmp_path / name, "--out", out, *arguments)
    assert result.exit_code == 0, result.output
    path = tmp_path / "page.html"
    assert run("view", out, "--random", 9, "--tokenizer", tmp_path, "--html", path).exit_code == 0
    for page in (path.read_bytes().decode(), (out / "report.html").read_bytes().decode()):
        found = Collect(page)
        assert not {tag for tag, _ in found.tags} & {"script", "img", "iframe"}
        assert not [n for n, _ in found.attributes if n.startswith("on")]
        assert not CONTROLS.search(page)
        assert "a‹U+202E›␛[31m&lt;b&gt;&amp;&#" in page  # the source, with whatever number its quotes are written
    page = path.read_text()
    for shown in ("&lt;/pre&gt;&lt;/style&gt;&lt;script&gt;alert(1)", "&quot; onmouseover=&#x27;alert(2)"):
        assert shown in page
    assert "␛]0;owned␇␛[2J␀␍␈‹U+0085›" in page
    assert "‹U+202E›fdp.exe‹U+202C› ‹U+2066›‹U+200F›" in page
    assert "&lt;!-- --&gt; &amp;lt; &amp;amp;lt; ]]&gt;" in page
    for command in (["view", out, "--random", 9, "--tokenizer", tmp_path], ["report", out], ["lint", out]):
        shown = run(*command).output
        assert not CONTROLS.search(shown), command
    assert "␛[2J␀" in run("view", out, "--random", 9, "--tokenizer", tmp_path).output


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
