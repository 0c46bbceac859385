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

    @contextmanager
    def stage(self, label: str, total: int, unit: str):
        """A stage of `total` units; yields `advance(units, note="")`. `note` replaces the text behind the bar."""
        if self._quiet:
            yield lambda units, note="": None
        elif sys.stderr.isatty():
            yield from _bar(label, total, unit)
        else:
            yield from _lines(label, total, unit)


def _bar(label: str, total: int, unit: str):
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
        task = progress.add_task(label, total=total, note="")

        def advance(units: int, note: str = "") -> None:
            progress.update(task, advance=units, note=note)

        yield advance


def _lines(label: str, total: int, unit: str):
    begin = last = time.monotonic()
    done = 0

    def advance(units: int, note: str = "") -> None:
        nonlocal last, done
        done += units
        now = time.monotonic()
        if now - last >= PLAIN_SECONDS or done == total:
            last = now
            print(f"{label}: {done}/{total} {unit}, {now - begin:.0f} s {note}".rstrip(), file=sys.stderr, flush=True)

    yield advance
