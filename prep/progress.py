"""Progress of a long wait: a live bar in a terminal, plain lines elsewhere, on standard error."""

import sys
import time
from contextlib import contextmanager

PLAIN_SECONDS = 5.0
"""Without a terminal a line is printed at most this often."""


class Progress:
    """Reports stages of work. Nothing is shown when `quiet`."""

    def __init__(self, quiet: bool = False):
        self._quiet = quiet

    def say(self, text: str) -> None:
        """One line between stages."""
        if not self._quiet:
            print(text, file=sys.stderr, flush=True)

    @contextmanager
    def stage(self, label: str, unit: str):
        """A stage of work; yields `update(done, total, note="")`, counts in `unit`. `note` stands behind the bar."""
        if self._quiet:
            yield lambda done, total, note="": None
        elif sys.stderr.isatty():
            yield from _bar(label, unit)
        else:
            yield from _lines(label, unit)


def _bar(label: str, unit: str):
    # rich takes a tenth of a second to import: only a terminal pays for it.
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", style="dim"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(label, total=None, note="")
        yield lambda done, total, note="": progress.update(task, completed=done, total=total, note=note)


def _lines(label: str, unit: str):
    begin = last = time.monotonic()

    def update(done: int, total: int, note: str = "") -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= PLAIN_SECONDS or done >= total:
            last = now
            text = f"{label}: {done:,}/{total:,} {unit}, {now - begin:.0f} s"
            if 0 < done < total:
                text += f", ETA {(now - begin) * (total - done) / done:.0f} s"
            print(f"{text}, {note}" if note else text, file=sys.stderr, flush=True)

    yield update
