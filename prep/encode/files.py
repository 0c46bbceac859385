"""Files to read, on this machine or behind any address that fsspec opens (`s3://`, `gs://`, `https://` …)."""

import glob
import gzip
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import xxhash

_BLOCK = 1 << 20
_GLOB = frozenset("*?[")
COMPRESSIONS = (".gz", ".zst")


def is_remote(path: str) -> bool:
    return "://" in path


def filesystem(path: str, **options):
    """(fsspec file system, path in it) of a remote address."""
    try:
        import fsspec  # only remote inputs need it

        return fsspec.core.url_to_fs(path, **options)
    except ImportError as error:
        raise ValueError(f"{path}: needs a package that is not installed ({error}); pip install it") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def is_folder(path: str) -> bool:
    if not is_remote(path):
        return os.path.isdir(path)
    fs, inner = filesystem(path)
    return fs.isdir(inner)


def expand(path: str) -> list[str]:
    """A file, a glob, or a folder (all files below it, but for hidden ones) → files, sorted.

    Raises:
        ValueError: nothing is there.
    """
    if is_remote(path):
        fs, inner = filesystem(path)
        if _GLOB & set(inner):
            found = fs.glob(inner)
        elif fs.isdir(inner):
            found = fs.find(inner)
        else:
            found = [inner] if fs.exists(inner) else []
        found = [fs.unstrip_protocol(name) for name in found]
    elif os.path.isfile(path):
        found = [path]
    elif os.path.isdir(path):
        found = [str(p) for p in Path(path).rglob("*") if p.is_file() and not _hidden(p.relative_to(path))]
    else:
        found = [p for p in glob.glob(path, recursive=True) if os.path.isfile(p)] if _GLOB & set(path) else []
    if not found:
        what = (
            "no file matches" if _GLOB & set(path) else "no file in this folder" if is_folder(path) else "no such file"
        )
        raise ValueError(f"{path}: {what}; check the name")
    return sorted(found)


def _hidden(path: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.parts)


def file_size(path: str) -> int:
    if not is_remote(path):
        return os.path.getsize(path)
    fs, inner = filesystem(path)
    return int(fs.size(inner))


def file_stamp(path: str) -> tuple[int, int] | None:
    """(bytes, time of the last change) of a file of this machine; None for an address, whose objects are replaced as a
    whole."""
    if is_remote(path) or path.startswith("hf:"):
        return None
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns


def file_hash(path: str) -> str:
    """xxh3-128 of a file's bytes."""
    digest = xxhash.xxh3_128()
    with open_binary(path) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def open_binary(path: str) -> Iterator[BinaryIO]:
    """A seekable binary file; errors of the store come as OSError."""
    if is_remote(path):
        fs, inner = filesystem(path)
        with fs.open(inner, "rb") as file, io.BufferedReader(file, _BLOCK) as buffered:
            yield buffered
    else:
        with open(path, "rb") as file:
            yield file


@contextmanager
def open_decompressed(path: str) -> Iterator[BinaryIO]:
    """A file that is read from the beginning, decompressed by the ending of its name.

    Raises:
        ValueError: the compressed stream is damaged or ends early.
    """
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in COMPRESSIONS:
        with open_binary(path) as file:
            yield file
        return
    try:
        with open_binary(path) as file:
            if suffix == ".gz":
                with gzip.open(file) as stream:
                    yield stream
            else:
                yield _ZstdLines(pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd"))
    except (EOFError, gzip.BadGzipFile, pa.ArrowException) as error:
        raise ValueError(f"{path}: the compressed file is damaged or cut off ({error})") from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise ValueError(f"{path}: the compressed file is damaged or cut off ({error})") from None


class _ZstdLines:
    """`read` and `readline` over pyarrow's decompressing stream, which gives neither at any size."""

    def __init__(self, stream):
        self._stream = stream
        self._buffer = b""
        self._at = 0
        self._ended = False

    def _more(self) -> bool:
        block = b"" if self._ended else self._stream.read(_BLOCK)
        self._ended = not block
        self._buffer = self._buffer[self._at :] + block
        self._at = 0
        return bool(block)

    def read(self, size: int = -1) -> bytes:
        while (size < 0 or len(self._buffer) - self._at < size) and self._more():
            pass
        stop = len(self._buffer) if size < 0 else self._at + size
        out = self._buffer[self._at : stop]
        self._at += len(out)
        return out

    def readline(self, size: int = -1) -> bytes:
        searched = self._at
        while True:
            found = self._buffer.find(b"\n", searched)
            if found >= 0:
                break
            known = len(self._buffer) - self._at
            if not self._more():
                found = len(self._buffer) - 1
                break
            searched = known
        stop = found + 1 if size < 0 else min(found + 1, self._at + size)
        out = self._buffer[self._at : stop]
        self._at = stop
        return out
