"""Limits on what a template may take and give: seconds of CPU, memory, characters of text.

Jinja's sandbox keeps a template from reaching out, not from running away: a loop within a loop, or a text doubled
sixty times, would take the machine with it. All limits hold for the rendering alone and cost some microseconds.
"""

import os
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SECONDS = 20.0
"""CPU time of one rendering; the longest real chats take some tenths of a second."""

BYTES = 2 << 30
"""Memory that one rendering may add."""

CHARACTERS = 1 << 20
"""Text that a template may write for any chat."""

FACTOR = 16
"""Characters that it may write for each that it is given, from there on; JSON makes at most 12 of one."""

_VALUE = 16  # characters that a value counts for besides its own: a template frames each

_PAGE = resource.getpagesize()


class TemplateLimitError(RuntimeError):
    """A rendering took too long or too much."""


def _out_of_time(signal_number, frame):
    raise TemplateLimitError(f"it ran for more than {SECONDS:.0f} s")


@contextmanager
def limited() -> Iterator[None]:
    """Run something under both limits. Only a main thread can be stopped; elsewhere nothing is limited.

    Raises:
        TemplateLimitError: too long, or too much memory.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    previous = signal.signal(signal.SIGVTALRM, _out_of_time)
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (_data_limit(hard), hard))
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        yield
    except MemoryError:
        raise TemplateLimitError(f"it took more than {BYTES >> 30} GiB of memory") from None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
        signal.signal(signal.SIGVTALRM, previous)


def check_output(text: str, *given: object) -> None:
    """Refuse a rendering that is out of proportion to what the template was given.

    Raises:
        TemplateLimitError: it is.
    """
    if len(text) > CHARACTERS and len(text) > CHARACTERS + FACTOR * sum(map(_size, given)):
        raise TemplateLimitError(f"it wrote {len(text):,} characters for {sum(map(_size, given)):,}")


def _size(value: object) -> int:
    size, level = 0, [value]
    while level:
        size += sum(_VALUE + len(item) if isinstance(item, str) else _VALUE for item in level)
        level = [*_inner(level)]
    return size


def _inner(level: list) -> Iterator[object]:
    for item in level:
        if isinstance(item, dict):
            yield from item
            yield from item.values()
        elif isinstance(item, (list, tuple)):
            yield from item


def _data_limit(hard: int) -> int:
    # A limit from an earlier look would stop a process that has grown meanwhile, and not every library survives that.
    try:
        file = os.open("/proc/self/statm", os.O_RDONLY)  # `open` would take as long as all the rest
    except OSError:  # no Linux: the limit of time has to do
        return hard
    try:
        pages = int(os.read(file, 256).split()[5])
    finally:
        os.close(file)
    limit = pages * _PAGE + BYTES
    return limit if hard == resource.RLIM_INFINITY else min(limit, hard)
