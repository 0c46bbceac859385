"""The files of this machine that a folder or a glob leads to: through links, each once, and none left out silently."""

import fnmatch
import os
from collections.abc import Iterator

GLOB = frozenset("*?[")


def walk(root: str, pattern: str, marks: tuple[str, ...] = ()) -> list[str]:
    """Paths of the files below a folder that match a glob, part by part (`**`: any folders between, also none).

    Links are followed; a file to which several ways lead is taken once. Names that begin with . or _ are passed by,
    unless `marks` holds that character.

    Raises:
        ValueError: a link that leads nowhere, or what is neither file nor folder.
        OSError: a folder that cannot be read.
    """
    found: dict[str, str] = {}
    for real, path in _Walk(marks).below(root, tuple(pattern.split("/"))):
        found.setdefault(real, path)
    return list(found.values())


class _Walk:
    def __init__(self, marks: tuple[str, ...]):
        self._marks = marks
        self._seen: set[tuple[str, tuple[str, ...]]] = set()  # a link may lead back to a folder above it

    def below(self, folder: str, parts: tuple[str, ...]) -> Iterator[tuple[str, str]]:
        """(real path, path) of the files that the parts of a glob lead to from here."""
        real = os.path.realpath(folder)
        if (real, parts) in self._seen:
            return
        self._seen.add((real, parts))
        if parts[0] == "**":
            yield from self.below(folder, parts[1:] or ("*",))
        elif GLOB.isdisjoint(parts[0]):
            path = os.path.join(folder, parts[0])
            if os.path.lexists(path):
                yield from self._at(path, os.path.realpath(path), parts[1:])
            return
        with os.scandir(folder or ".") as scan:
            entries = sorted(scan, key=lambda entry: (entry.is_symlink(), entry.name))
        for entry in entries:
            hidden = entry.name.startswith((".", "_")) and not entry.name.startswith(self._marks)
            if hidden or not fnmatch.fnmatchcase(entry.name, parts[0]):
                continue
            path = os.path.join(folder, entry.name)
            place = os.path.realpath(path) if entry.is_symlink() else os.path.join(real, entry.name)
            if parts[0] != "**":
                yield from self._at(path, place, parts[1:])
            elif _leads_somewhere(path) and entry.is_dir():
                yield from self.below(path, parts)

    def _at(self, path: str, real: str, rest: tuple[str, ...]) -> Iterator[tuple[str, str]]:
        if _leads_somewhere(path) and rest and os.path.isdir(path):
            yield from self.below(path, rest)
        elif not rest and not os.path.isdir(path):
            check_regular(path)
            yield real, path


def check_regular(path: str) -> None:
    """ValueError where a pipe, a socket or a device is: what is read once to be hashed must be there once more."""
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise ValueError(f"{path}: is a pipe or a device, and input is read more than once; write it to a file first")


def _leads_somewhere(path: str) -> bool:
    if not os.path.exists(path):
        raise ValueError(f"{path}: a link that leads nowhere ({os.readlink(path)}); mend it or remove it")
    return True
