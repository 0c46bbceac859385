"""One run at a time in OUT."""

import errno
import fcntl
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import TextIO

LOCK_NAME = ".lock"
"""File under OUT that carries the lock, and who took it last. It stays: to remove it would let a third run in."""

PATIENCE_SECONDS = 30.0
"""How long a lock is waited for. torchrun gives a worker as long to end, and one that was killed holds its files until
its memory is gone."""

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What a network file system without locks answers."""


def hold(out: Path) -> TextIO:
    """Hold the folder `out` for this process: until the file that is returned is closed, or the process ends, however
    that happens (what ends with its machine lasts as long as its file server allows, mostly 90 seconds).

    The lock is flock(2) on a file open for writing, which Linux carries to the other machines of an NFS mount. On a
    file system without locks the run goes on, after a word about it on stderr.

    Raises: ValueError when another process still holds it after `PATIENCE_SECONDS`; OSError when the file cannot be
    written.
    """
    file = open(out / LOCK_NAME, "a+", encoding="utf-8")  # noqa: SIM115 (the caller keeps it open)
    began, told = time.monotonic(), False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() - began >= PATIENCE_SECONDS:
                raise ValueError(
                    f"--out {out} is being written by a run that is alive ({_holder(file)}); stop it, or name another "
                    "folder"
                ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            print(f"train: nothing keeps a second run out of {out}: {error.strerror}", file=sys.stderr)
            break
        if not told:
            print(f"train: waiting for {_holder(file)} to leave {out}", file=sys.stderr, flush=True)
            told = True
        time.sleep(0.1)
    file.truncate(0)
    file.write(json.dumps({"host": platform.node(), "pid": os.getpid()}))
    file.flush()
    return file


def _holder(file: TextIO) -> str:
    file.seek(0)
    try:
        taken = json.loads(file.read())
        return f"process {taken['pid']} on {taken['host']}"
    except ValueError:  # it has the lock, and has not yet said so
        return "a process that has just begun"
