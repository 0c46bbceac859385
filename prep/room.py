"""What is said when a disk is full."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def advising(advice: str) -> Iterator[None]:
    """An OSError that says that a file has no room becomes one sentence with the file and this advice."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL or not error.filename:
            raise
        raise OSError(f"{error.filename}: {error.strerror}; {advice}") from error
