"""What a long wait shows: a bar in a terminal, plain lines elsewhere."""

import io
import sys

from prep import progress
from prep.encode.command import progress_note
from prep.encode.run import Progress as Encoded


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("TERM", "xterm")
    now = iter(range(100, 1000, 10))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    with progress.Progress().stage("encoding", "units") as update:
        for done in (1, 4):
            far = Encoded(done, 4, done * 1_000_000, 4_000_000, done * 7, done * 2000, done - 1, done - 1)
            update(done, 4, progress_note(far, seconds=10 * done))
    return stream.getvalue()


def test_plain_lines_say_how_far_how_fast_how_long_and_what_was_skipped(monkeypatch):
    first, last = shown(monkeypatch, io.StringIO()).splitlines()
    assert first.startswith("encoding: 1/4 units, 10 s, ETA 30 s, 1 of 4 MB, 0.1 MB/s, 7 documents, 2,000 tokens")
    assert "200 tokens/s" in first
    assert "ETA" not in last
    assert last.endswith("200 tokens/s, 3 bad records skipped")


def test_a_terminal_shows_the_same_beside_a_bar(monkeypatch):
    text = shown(monkeypatch, Terminal())
    for part in ("encoding", "4/4", "units", "ETA", "MB/s", "200 tokens/s", "3 bad records skipped"):
        assert part in text, part
