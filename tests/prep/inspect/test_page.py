"""report.html: the same bytes again, nothing from the network, data escaped; in a browser no errors, all figures."""

import json
import random
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner

from byte_tokenizer import write_byte_tokenizer
from formats.dataset import PackedDataset
from prep.cli import main
from prep.inspect.page import render
from prep.inspect.report import make_report
from prep.inspect.verify import verify

EVIL = "<img src=x onerror=alert(1)>.jsonl"
FIGURES = ("flow", "lengths", "fill", "documents", "samples", "cost", "stragglers")


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    root = tmp_path_factory.mktemp("page")
    write_byte_tokenizer(root)
    draw = random.Random(0)
    for name, count in (("chats.jsonl", 120), (EVIL, 40)):
        lines = [json.dumps({"prompt": "q", "completion": "x" * draw.randint(1, 200)}) for _ in range(count)]
        (root / name).write_text("\n".join(lines))
    arguments = ["--tokenizer", root, "--seq-len", 256, "--cp", 2, "--workers", 1, "--eval-fraction", 0.1, "--quiet"]
    result = run("pack", root / "chats.jsonl", root / EVIL, "--out", root / "out", *arguments)
    assert result.exit_code == 0, result.output
    return root / "out" / "train"


@pytest.fixture(scope="module")
def page(packed):
    return (packed / "report.html").read_text()


class Collect(HTMLParser):
    """Tags, attributes, and what stands in the SVGs."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.attributes += attributes


def test_self_contained_and_escaped(page):
    found = Collect(page)
    names = {tag for tag, _ in found.tags}
    assert not names & {"script", "img", "iframe", "object", "embed", "form"}
    for name, value in found.attributes:
        assert not name.startswith("on"), name
        if name in ("src", "href", "xlink:href"):
            assert value.startswith(("#", "data:,")), value
    assert not re.search(r"@import|url\((?!#)", page)
    assert "&lt;img src=x onerror=alert(1)&gt;.jsonl" in page
    ids = [value for name, value in found.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    for name, value in found.attributes:
        for used in re.findall(r"url\(#([^)]+)\)", value or "") + ([value[1:]] if name == "xlink:href" else []):
            assert used in ids


def test_all_figures_and_numbers(packed, page):
    report = json.loads((packed / "report.json").read_text())
    drawn = {a["id"] for tag, a in Collect(page).tags if tag == "svg"}
    assert drawn == set(FIGURES)
    text = re.sub(r"\s+", " ", page)
    for value in (report["packs"], report["documents"], report["tokens"], report["target_tokens"]):
        assert f"{value:,}" in text
    assert f'<div class="hero">{report["fill"]:.2%}' in text
    for account in report["ledger"]["total"]["dropped"].values():
        assert f"<td>{account['tokens']:,}</td>" in text
    for finding in report["lint"]["findings"]:
        assert finding["check"] in text
    assert text.count('class="here"') == 1
    for row in report["whatif"]["rows"]:
        here = (row["algo"], row["seq_len"], row["cp"]) == (report["algorithm"], report["capacity"], report["cp"])
        assert f"{row['fill']:.2%}</td>" in text
        assert not here or f'<td class="here">{row["fill"]:.2%}</td>' in text
    for low, count in enumerate(report["histograms"]["fill"]["packs"]):
        assert not count or f"<td>{2 * low} – {2 * low + 2} %</td><td>{count:,}</td>" in re.sub(r">\s+<", "><", text)
    for low, high, count in zip(
        report["histograms"]["length"]["edges"][:-1],
        report["histograms"]["length"]["edges"][1:],
        report["histograms"]["length"]["documents"],
        strict=True,
    ):
        if count:
            assert f"<title>{count:,} documents of {low:,} to {high - 1:,} tokens</title>" in text


def test_the_same_bytes_again(packed, page):
    assert render(make_report(PackedDataset(packed))) == page
    before = (packed / "manifest.json").read_bytes()
    assert run("report", packed, "--quiet").exit_code == 0
    assert (packed / "manifest.json").read_bytes() == before
    (packed / "report.html").unlink()
    assert any("report.html" in problem for problem in verify(packed).problems)
    assert run("report", packed, "--quiet").exit_code == 0
    assert (packed / "report.html").read_text() == page
    assert verify(packed, deep=True).problems == []


@pytest.fixture(scope="module")
def chromium():
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("NOT TESTED IN A BROWSER: no chromium here; on Debian: apt-get install chromium")
    return path


def browse(chromium: str, url: str, profile: Path, *arguments: str) -> subprocess.CompletedProcess:
    fixed = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr", "--v=0"]
    command = [chromium, *fixed, f"--user-data-dir={profile}", *arguments, url]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


@pytest.mark.parametrize(("width", "height"), [(1280, 3600), (390, 6000)])
def test_in_a_browser(packed, chromium, tmp_path, width, height):
    """The page loads without a console message, draws every figure, and fits the width of desktop and phone."""
    # A browser window has a smallest width, a frame has none. The script stands in the frame's page, not in the report.
    probe = """<body style="margin:0"><iframe id=f width={w} height={h} style="border:0" src="{url}"></iframe><script>
    document.getElementById('f').onload = e => {{ const d = e.target.contentDocument; document.title = JSON.stringify({{
      wide: d.documentElement.scrollWidth, figures: [...d.querySelectorAll('svg')].filter(s =>
        s.getBoundingClientRect().height > 60 && s.querySelector('path')).map(s => s.id) }}) }}</script>"""
    (tmp_path / "probe.html").write_text(probe.format(w=width, h=height, url=(packed / "report.html").as_uri()))
    url = (tmp_path / "probe.html").as_uri()
    allow = ["--allow-file-access-from-files", "--virtual-time-budget=3000"]
    loaded = browse(chromium, url, tmp_path / "profile", *allow, "--dump-dom")
    assert "CONSOLE" not in loaded.stderr
    facts = json.loads(re.search(r"<title>(.*?)</title>", loaded.stdout)[1])
    assert facts["wide"] <= width
    assert sorted(facts["figures"]) == sorted(FIGURES)
    shot = tmp_path / "shot.png"
    browse(
        chromium, url, tmp_path / "profile", *allow, f"--window-size={max(width, 500)},{height}", f"--screenshot={shot}"
    )
    from PIL import Image

    image = Image.open(shot).convert("RGB").crop((0, 0, width, height))
    assert len(image.getcolors(1 << 24)) > 100
