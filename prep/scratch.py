"""Temporary folders that go with the process that made them, however it ends.

A folder is locked by its process, and the system frees the lock when that is killed. Whoever makes the first folder of
a process takes away those of its user that nobody holds any more.
"""

import fcntl
import functools
import os
import shutil
import tempfile
from pathlib import Path

_PREFIX = "meshpack-run-"


class ScratchFolder(tempfile.TemporaryDirectory):
    """A `TemporaryDirectory` that is locked as long as it is in use."""

    def __init__(self):
        _clear_dead()
        while True:
            super().__init__(prefix=_PREFIX)
            # A process that clears may hold the lock of a folder that is this new: it is waited for.
            self._lock = os.open(self.name, os.O_RDONLY)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            if os.path.isdir(self.name):
                return
            os.close(self._lock)
            self._finalizer.detach()

    def cleanup(self) -> None:
        super().cleanup()
        os.close(self._lock)


@functools.cache
def _clear_dead() -> None:
    """Once a process: remove this user's folders that no process holds."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        try:
            folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:  # it is gone, or none of ours
            continue
        try:
            if os.fstat(folder).st_uid == os.geteuid():
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
        except BlockingIOError:  # in use
            continue
        finally:
            os.close(folder)
