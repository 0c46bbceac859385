"""Files to read, on this machine or behind any address that fsspec opens (`s3://`, `gs://`, `https://` …)."""

import gzip
import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, NamedTuple

import pyarrow as pa
import xxhash

from prep.encode.walk import GLOB, check_regular, walk

_BLOCK = 1 << 20
_BUFFER = 1 << 16  # a file of this machine: lines reach over the edge of Python's 8 KiB too often
COMPRESSIONS = (".gz", ".zst")
_STAMPS = (
    *("size", "ETag", "etag", "generation", "md5Hash", "content_md5", "Content-MD5"),
    *("LastModified", "Last-Modified", "last_modified", "updated", "mtime"),
)
"""Names under which the libraries of fsspec tell of an object's content and its last change."""


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


class AddressError(OSError):
    """What a store of objects or a web server answered instead of data."""


@contextmanager
def _answering(path: str) -> Iterator[None]:
    """Errors of the other side, of whatever kind (each library has its own), as OSError with the address."""
    try:
        yield
    except (FileNotFoundError, AddressError):
        raise
    except Exception as error:
        raise AddressError(f"{path}: cannot be read ({type(error).__name__}: {error})") from None


def absolute(path: str) -> str:
    """A path that leads to the same place from every working directory. Addresses and names of the hub stay."""
    if path.startswith("hf:"):
        name = re.split("[:#]", path[3:], maxsplit=1)[0]
        return f"hf:{os.path.abspath(name)}{path[3 + len(name) :]}" if os.path.exists(name) else path
    return path if is_remote(path) else os.path.abspath(path)


def is_web(path: str) -> bool:
    return path.startswith(("http://", "https://"))


def bare(path: str) -> str:
    """A path without the query that an address of the web may have behind its name."""
    return re.split("[?#]", path, maxsplit=1)[0] if is_web(path) else path


class Found(NamedTuple):
    """Files that a name leads to, sorted: (path, name), the name relative to the folder or the fixed part of the glob.

    is_file: the name is that of the one file itself.
    """

    files: list[tuple[str, str]]
    is_file: bool


def expand(path: str) -> Found:
    """A file, a glob, or a folder (all files below it) → files. What is hidden (. or _ before the name of the file or
    of a folder above it) is left out, unless the glob itself says so. Links are followed, see `walk`.

    Raises:
        ValueError: nothing is there, a link leads nowhere, or a pipe is named.
        OSError: the address does not answer, or a folder cannot be read.
    """
    is_glob = bool(GLOB & set(path))
    kind, reason = _kind(path)
    if not is_remote(path):
        check_regular(path)
    if kind == "file":
        return Found([(path, os.path.basename(bare(path)))], True)
    root, pattern = _split_glob(path) if is_glob and kind is None else (path.rstrip("/"), "")
    marks = tuple({part[:1] for part in pattern.split("/")} & set("._"))
    if is_remote(path):
        fs, inner = filesystem(path)
        with _answering(path):
            listed = fs.find(inner) if kind else fs.glob(inner) if is_glob else []
            # An empty object of the name of a folder is how some tools make one.
            names = [fs.unstrip_protocol(name) for name in listed if not name.endswith("/")]
    else:
        names = walk("" if root == "." else root, pattern or "**", marks) if kind or is_glob else []
    relative = [(name, os.path.relpath(name, root)) for name in names]
    relative = [(name, shown) for name, shown in relative if not _is_hidden(shown, marks)]
    if not relative:
        what = "no file in this folder" if kind else "no file matches" if is_glob else "no such file"
        raise ValueError(f"{path}: {what}{reason}; check the name")
    return Found(sorted(relative), False)


def _kind(path: str) -> tuple[str | None, str]:
    """(`file`, `directory` or None, why it is none as far as somebody says)."""
    if not is_remote(path):
        return "file" if os.path.isfile(path) else "directory" if os.path.isdir(path) else None, ""
    fs, inner = filesystem(path)
    if is_web(path) and path.endswith("/"):
        return "directory", ""
    try:
        with _answering(path):
            return fs.info(inner)["type"], ""
    except FileNotFoundError as error:
        return None, f" ({error.__cause__})" if error.__cause__ else ""


def _split_glob(path: str) -> tuple[str, str]:
    """(the folders before the first that holds a pattern, the rest)."""
    parts = path.split("/")
    first = next(k for k, part in enumerate(parts) if GLOB & set(part))
    return "/".join(parts[:first]) or ("/" if first else "."), "/".join(parts[first:])


def _is_hidden(name: str, marks: tuple[str, ...]) -> bool:
    return any(part.startswith((".", "_")) and not part.startswith(marks) for part in name.split("/"))


def is_folder(path: str) -> bool:
    return _kind(path)[0] == "directory"


def is_file(path: str) -> bool:
    """Whether a file of this name is there."""
    return _kind(path)[0] == "file"


def is_seekable(path: str) -> bool:
    """Whether reading can begin in the middle: not everywhere on the web, so it is tried there."""
    if not is_web(path):
        return True
    fs, inner = filesystem(path)
    with _answering(path):
        try:
            with fs.open(inner, "rb", block_size=1 << 10) as file:
                file.seek(1)
                file.read(1)
        except ValueError:  # what fsspec has for such a server
            return False
        return True


def file_size(path: str) -> int:
    """Bytes; 0 where a web server does not say."""
    if not is_remote(path):
        return os.path.getsize(path)
    fs, inner = filesystem(path)
    with _answering(path):
        return int(fs.size(inner) or 0)


def file_stamp(path: str) -> tuple:
    """What is another once a file is: its bytes and the time of its last change, or what the other side of an address
    tells of that kind."""
    if not is_remote(path):
        stat = os.stat(path)
        return stat.st_size, stat.st_mtime_ns
    fs, inner = filesystem(path)
    with _answering(path):
        fs.invalidate_cache(inner)  # a listing that is kept says what was
        info = fs.info(inner)
    return tuple(str(info[name]) for name in _STAMPS if info.get(name) is not None)


def file_facts(path: str) -> tuple[int, str]:
    """(bytes, xxh3-128) of a file."""
    digest, size = xxhash.xxh3_128(), 0
    with open_binary(path, streaming=True) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return size, digest.hexdigest()


@contextmanager
def open_binary(path: str, streaming: bool = False) -> Iterator[BinaryIO]:
    """A binary file; errors of the store come as OSError. `streaming`: it is read from the begin to the end, which
    every web server can; else it is seekable."""
    if is_remote(path):
        fs, inner = filesystem(path)
        with _answering(path):
            file = fs.open(inner, "rb", **({"block_size": 0} if streaming and is_web(path) else {}))
        with file, io.BufferedReader(_Addressed(file, path), _BLOCK) as buffered:
            yield buffered
    else:
        with open(path, "rb", buffering=_BUFFER) as file:
            yield file


class _Addressed(io.RawIOBase):
    """A file behind an address, whose errors name it."""

    def __init__(self, file: BinaryIO, path: str):
        self._file = file
        self._path = path

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.seekable()

    def readinto(self, buffer) -> int:
        with _answering(self._path):
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        with _answering(self._path):
            return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


@contextmanager
def open_decompressed(path: str) -> Iterator[BinaryIO]:
    """A file that is read from the beginning, decompressed by the ending of its name.

    Raises:
        ValueError: the compressed stream is damaged or ends early.
    """
    suffix = os.path.splitext(bare(path))[1].lower()
    if suffix not in COMPRESSIONS:
        with open_binary(path, streaming=True) as file:
            yield file
        return
    try:
        with open_binary(path, streaming=True) as file:
            if suffix == ".gz":
                with gzip.open(file) as stream:
                    yield stream
            else:
                yield _ZstdLines(pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd"))
    except (EOFError, gzip.BadGzipFile, pa.ArrowException) as error:
        raise ValueError(f"{path}: the compressed file is damaged or cut off ({error})") from None
    except OSError as error:
        if error.errno is not None or isinstance(error, AddressError):
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
