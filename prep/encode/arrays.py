"""The elements of a JSON array, one after the other, as the file streams by.

Only their ends are looked for, by brackets and quotes; what stands between is parsed by whoever takes the element, as
a line of JSONL is. So an element that is no JSON is a bad record and no end to the file.
"""

import re
from collections.abc import Iterator
from typing import BinaryIO

_BLOCK = 1 << 20
_BOM = b"\xef\xbb\xbf"
_MAX_ELEMENT = 1 << 30

# Possessive repeats: these are linear in what they read, and give up at a string that goes on in the next block.
_SPACE = re.compile(rb"[ \t\r\n]*+")
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_TO_BRACKET = re.compile(rb'(?:[^"\[\]{}]++|"(?:[^"\\]++|\\.)*+")*+[\[\]{}]', re.DOTALL)
_PLAIN = re.compile(rb"[^ \t\r\n,\[\]{}\"]*+")


def array_elements(file: BinaryIO, path: str) -> Iterator[bytes]:
    """The elements of the one array in a file of UTF-8, as they are written.

    Raises:
        ValueError: no array, one that is cut off, or anything else behind it; the message names `path`.
    """
    text = _Text(file)
    if text.next() != b"[":
        raise ValueError(f"{path}: a JSON array begins with [")
    text.at += 1
    count, follows = 0, text.next()
    while follows != b"]" or count:
        element = text.element()
        if element is None:
            where = f"in element {count + 1}" if follows else f"after element {count}"
            raise ValueError(f"{path}: the JSON array is cut off {where}")
        if not element:
            raise ValueError(f"{path}: element {count + 1} of the JSON array is missing before {follows.decode()}")
        yield element
        count += 1
        if (follows := text.next()) == b"]":
            break
        if follows != b",":
            found = repr(follows.decode(errors="backslashreplace")) if follows else "the end: it is cut off"
            raise ValueError(f"{path}: a comma or ] must follow element {count} of the JSON array, not {found}")
        text.at += 1
        follows = text.next()
    text.at += 1
    if follows := text.next():
        raise ValueError(
            f"{path}: something follows the JSON array of {count} elements, from "
            f"{follows.decode(errors='backslashreplace')!r} on; one file holds one array, or one object a line (.jsonl)"
        )


class _Text:
    """The part of the file that is looked at: `at` is where the next step begins."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._data = file.read(_BLOCK).removeprefix(_BOM)
        self._ended = False
        self.at = 0

    def _more(self) -> bool:
        # As much again as is held: to look once more from `at` on then costs no more than the reading.
        block = b"" if self._ended else self._file.read(max(_BLOCK, len(self._data) - self.at))
        self._ended = not block
        self._data, self.at = self._data[self.at :] + block, 0
        return bool(block)

    def next(self) -> bytes:
        """The next byte that is no white space; nothing at the end of the file."""
        while True:
            self.at = _SPACE.match(self._data, self.at).end()
            if self.at < len(self._data) or not self._more():
                return self._data[self.at : self.at + 1]

    def element(self) -> bytes | None:
        """The element that begins here, which `at` then is behind; None if the file ends within."""
        while (stop := _element_end(self._data, self.at, self._ended)) is None:
            if len(self._data) - self.at > _MAX_ELEMENT or not self._more():
                return None
        element = self._data[self.at : stop]
        self.at = stop
        return element


def _element_end(data: bytes, at: int, ended: bool) -> int | None:
    """Where the element that begins at `at` ends; None if it may go on behind the data."""
    first = data[at : at + 1]
    if first == b'"':
        found = _STRING.match(data, at)
        return found.end() if found else None
    if first not in (b"{", b"["):
        stop = _PLAIN.match(data, at).end()
        return stop if stop < len(data) or (ended and first) else None
    depth = 0
    while found := _TO_BRACKET.match(data, at):
        at = found.end()
        depth += 1 if data[at - 1] in b"[{" else -1
        if depth == 0:
            return at
    return None
