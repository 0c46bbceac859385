"""One process at a time in an output folder."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_TRIES = 1000
"""A folder that is gone so often is taken away by nobody: the file system (such as /proc) never had it."""


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Hold `out`, which is made if missing, for this process; it is free again when the process ends, however that
    happens. A folder that was made here and is still empty at the end is taken away again.

    The lock is flock(2) on the folder itself, so it leaves no file behind and is the same through any link or mount of
    this machine. On a network file system it may not reach beyond this machine.

    Raises:
        ValueError: `out` is a file, a link that leads nowhere, cannot be made, or is held by another process.
    """
    if os.path.lexists(out) and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder" if out.exists() else f"--out {out} leads nowhere")
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    descriptor = _locked(out)
    try:
        yield
    finally:
        for folder in made:
            try:
                folder.rmdir()
            except OSError:  # it holds something
                break
        os.close(descriptor)


def _locked(out: Path) -> int:
    """A descriptor of the folder that carries its lock."""
    for _ in range(_TRIES):
        try:
            out.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:  # another process just took its empty folder away
            continue
        except OSError as error:
            raise ValueError(f"--out {out} cannot be made: {error.strerror}; name another folder") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(out)):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise ValueError(
                f"--out {out}: another prep is writing there; wait for it, or name another folder"
            ) from None
        except FileNotFoundError:
            pass
        os.close(descriptor)  # what was locked is no longer what the name leads to
    raise ValueError(f"--out {out} cannot be made; name another folder")
