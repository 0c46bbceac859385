"""Input files, cut into work units by bytes.

A unit is a range of bytes of one file; a line belongs to the unit its first byte lies in. The cut depends on the size
of the file alone, so it is the same for any number of workers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

_BLOCK = 1 << 20


@dataclass(frozen=True)
class InputFile:
    """A file to read: where it lies, and what it is called in everything that is written."""

    path: str
    name: str
    bytes: int
    xxh3_128: str

    def to_json(self) -> dict:
        """Without the path: the same content somewhere else is the same input."""
        return {"name": self.name, "bytes": self.bytes, "xxh3_128": self.xxh3_128}


@dataclass(frozen=True)
class Unit:
    """The lines of `path` whose first byte lies in `start:stop`."""

    index: int
    path: str
    name: str
    start: int
    stop: int


def find_inputs(paths: Sequence[str]) -> list[InputFile]:
    """The files to read, in the order given, each with size and hash.

    Raises:
        ValueError: no such file; or nothing given.
    """
    if not paths:
        raise ValueError("no input given; name at least one file")
    files, seen = [], {}
    for path in map(Path, paths):
        if not path.exists():
            raise ValueError(f"{path}: no such file")
        if not path.is_file():
            raise ValueError(f"{path}: not a file")
        count = seen[path.name] = seen.get(path.name, 0) + 1
        name = path.name if count == 1 else f"{path.name}#{count}"
        size, digest = _measure(path)
        files.append(InputFile(str(path), name, size, digest))
    return files


def _measure(path: Path) -> tuple[int, str]:
    digest, size = xxhash.xxh3_128(), 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return size, digest.hexdigest()


def cut_units(files: Sequence[InputFile], unit_bytes: int) -> list[Unit]:
    """Work units of all files, in order."""
    units: list[Unit] = []
    for file in files:
        for start in range(0, file.bytes, unit_bytes):
            stop = min(start + unit_bytes, file.bytes)
            units.append(Unit(len(units), file.path, file.name, start, stop))
    return units


def read_lines(path: str, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
    """(offset, line without its newline) of every line that begins in `start:stop`, in constant memory."""
    with open(path, "rb") as file:
        position = start
        if start > 0:
            file.seek(start - 1)
            # The line that reaches into this range began in an earlier one.
            position = start - 1 + _skip_line(file)
            file.seek(position)
        while position < stop:
            line = file.readline()
            if not line:
                return
            yield position, line[:-1] if line.endswith(b"\n") else line
            position += len(line)


def _skip_line(file) -> int:
    skipped = 0
    while block := file.readline(_BLOCK):
        skipped += len(block)
        if block.endswith(b"\n"):
            break
    return skipped


def line_number(path: str, offset: int) -> int:
    """Line (from 1) that begins at a byte offset; reads the file up to there, so only for messages."""
    lines, left = 1, offset
    with open(path, "rb") as file:
        while left and (block := file.read(min(_BLOCK, left))):
            lines += block.count(b"\n")
            left -= len(block)
    return lines
