"""One packed shard: an Arrow IPC file written atomically with its checksum, and read through a memory map."""

import ctypes
import json
import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import xxhash

from formats.schema import FORMAT_VERSION, METADATA_KEY, SCHEMAS

TEMPORARY_SUFFIX = ".tmp"


class FileEntry(NamedTuple):
    """A file of a packed folder as its manifest lists it: name relative to the folder, size, xxh3-128 in hex."""

    name: str
    bytes: int
    xxh3_128: str


class ListColumn(NamedTuple):
    """A list column of a record batch: row i is `values[offsets[i]:offsets[i+1]]`; `offsets` int32[rows + 1]."""

    values: np.ndarray
    offsets: np.ndarray


_HELD = 64 << 10
_WRITE_BEHIND = 16 << 20
_SYNC_FILE_RANGE_WRITE = 2
# Linux only, and only ever a hint: where the C library lacks it, the sync at the end does all the work.
_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)
if _sync_file_range is not None:
    _sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]


class _HashingFile:
    """A binary file that hashes what passes through it, so a checksum costs no second reading.

    Small pieces (Arrow writes headers and paddings of a few bytes, 25 a record batch) are held back and joined. The
    disk is asked to begin with every 16 MiB that are written, so it works while the next are made and the sync at the
    end waits for the last of them only.
    """

    def __init__(self, file: BinaryIO):
        self._file = file
        self._hash = xxhash.xxh3_128()
        self._held = bytearray()
        self._begun = 0
        self._written = 0

    @property
    def bytes(self) -> int:
        """All that was written so far."""
        return self._written + len(self._held)

    def write(self, data) -> int:
        piece = memoryview(data).cast("B")
        if piece.nbytes < _HELD:
            self._held += piece
            if len(self._held) >= _HELD:
                self.flush()
        else:
            self.flush()
            self._pass_on(piece)
        return piece.nbytes

    def flush(self) -> None:
        """Pass on what is held back."""
        if self._held:
            self._pass_on(memoryview(self._held))
            self._held = bytearray()

    def _pass_on(self, rest: memoryview) -> None:
        self._written += rest.nbytes
        self._hash.update(rest)
        # An unbuffered file may take less than it is given: over 2 GiB, or when the disk fills up.
        while rest.nbytes:
            rest = rest[self._file.write(rest) :]
        if self._written - self._begun >= _WRITE_BEHIND:
            self.begin_sync()

    def begin_sync(self) -> None:
        """Ask the disk to begin with all that was passed on; waits for nothing."""
        if _sync_file_range is not None:
            _sync_file_range(self._file.fileno(), self._begun, self._written - self._begun, _SYNC_FILE_RANGE_WRITE)
        self._begun = self._written

    def hexdigest(self) -> str:
        """xxh3-128 of all that was written so far, in hex."""
        self.flush()
        return self._hash.hexdigest()

    # pyarrow asks these of any Python file it writes to.
    def tell(self) -> int:
        return self.bytes

    @property
    def closed(self) -> bool:
        return self._file.closed

    def readable(self) -> bool:
        return False

    def seekable(self) -> bool:
        return False

    def writable(self) -> bool:
        return True


@contextmanager
def atomic_write(path: Path, sync: bool = True) -> Iterator[_HashingFile]:
    """Write a file that exists under its name only when it is whole.

    The bytes go to `path` + ".tmp", are synced, and take the name by a rename that is synced too. An exception
    removes the temporary file, and an OSError (a full disk) names `path`; a kill leaves it, and the next writer of the
    same path overwrites it.

    Args:
        sync: False leaves the syncs to the caller (`sync_file`, `sync_folder`), who need not wait for each. Until then
            a kill does no harm; a machine that goes down may leave a name without its bytes.
    """
    path = Path(path)
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    try:
        with open(temporary, "wb", buffering=0) as raw:
            file = _HashingFile(raw)
            yield file
            file.flush()
            if sync:
                os.fsync(raw.fileno())
            else:
                file.begin_sync()
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename is None:  # write() and fsync() name nothing
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
    if sync:
        sync_folder(path.parent)


@contextmanager
def hash_only() -> Iterator[_HashingFile]:
    """A file as `atomic_write` gives it, whose bytes are hashed and counted and go nowhere."""
    with open(os.devnull, "wb", buffering=0) as raw:
        file = _HashingFile(raw)
        yield file
        file.flush()


def sync_file(path: Path) -> None:
    """Make the bytes of a file durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Make the names inside a folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def json_bytes(value: object) -> bytes:
    """Deterministic JSON: keys sorted, two spaces, floats by repr, one newline at the end."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def read_json(path: Path) -> object:
    """What a JSON file holds. ValueError names the file when it is no JSON."""
    try:
        return json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not readable as JSON ({error}); restore it from a copy or make it again") from None


def write_json(path: Path, value: object, sync: bool = True) -> FileEntry:
    """Write deterministic JSON (see `json_bytes`) atomically; `sync` as in `atomic_write`."""
    with atomic_write(path, sync) as file:
        file.write(json_bytes(value))
    return FileEntry(Path(path).name, file.bytes, file.hexdigest())


def file_digest(path: Path) -> str:
    """xxh3-128 of a file, in hex."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def pack_digest(row: tuple[np.ndarray, ...]) -> int:
    """xxh3-64 of one pack: the buffers of its columns in the order of the schema (little-endian)."""
    digest = xxhash.xxh3_64()
    for buffer in row:
        digest.update(buffer)
    return digest.intdigest()


class ShardWriter:
    """Write record batches of one shard; use as a context manager, then read `entry`.

    Args:
        path: the shard's final path. Its name in `entry` is `folder/name`, relative to the packed folder.
        kind: `thd` or `seqid`.
        essentials: what the shard repeats of its manifest, JSON-compatible; `format_version` and `kind` are added.
        compression: None, or `zstd` for shipping: such a shard is decompressed when read instead of mapped.
        dry: write nothing; `entry` says what would lie at `path`.
    """

    def __init__(
        self,
        path: Path,
        kind: str,
        essentials: Mapping[str, object],
        compression: str | None = None,
        *,
        dry: bool = False,
    ):
        self.path = Path(path)
        self.kind = kind
        head = {**essentials, "format_version": FORMAT_VERSION, "kind": kind}
        self.schema = SCHEMAS[kind].with_metadata({METADATA_KEY: json.dumps(head, sort_keys=True).encode()})
        self.entry: FileEntry | None = None
        self._options = pa.ipc.IpcWriteOptions(compression=compression)
        self._dry = dry

    def __enter__(self):
        self._atomic = hash_only() if self._dry else atomic_write(self.path)
        self._file = self._atomic.__enter__()
        self._sink = pa.PythonFile(self._file, mode="w")
        self._writer = pa.ipc.new_file(self._sink, self.schema, options=self._options)
        return self

    def write(self, columns: Mapping[str, ListColumn]) -> np.ndarray:
        """Write one record batch without copying its arrays; returns the digests of its packs, uint64[rows]."""
        arrays = [_list_array(columns[field.name], field.type) for field in self.schema]
        self._writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=self.schema))
        # `pack_digest` of every row; slicing memoryviews once made costs a fraction of slicing arrays.
        lists = [columns[name] for name in self.schema.names]
        bounds = [(np.asarray(c.offsets, np.int64) * c.values.itemsize).tolist() for c in lists]
        bytes_of = [memoryview(np.ascontiguousarray(c.values)).cast("B") for c in lists]
        digests = np.empty(len(lists[0].offsets) - 1, np.uint64)
        for i in range(len(digests)):
            digest = xxhash.xxh3_64()
            for data, b in zip(bytes_of, bounds, strict=True):
                digest.update(data[b[i] : b[i + 1]])
            digests[i] = digest.intdigest()
        return digests

    def __exit__(self, kind, error, trace):
        if error is None:
            self._writer.close()
            self._sink.flush()
        self._atomic.__exit__(kind, error, trace)
        if error is None:
            name = f"{self.path.parent.name}/{self.path.name}"
            self.entry = FileEntry(name, self._file.bytes, self._file.hexdigest())
        return False


def _list_array(column: ListColumn, arrow_type: pa.ListType) -> pa.ListArray:
    values = pa.Array.from_buffers(
        arrow_type.value_type, len(column.values), [None, pa.py_buffer(np.ascontiguousarray(column.values))]
    )
    buffers = [None, pa.py_buffer(np.ascontiguousarray(column.offsets, np.int32))]
    return pa.Array.from_buffers(arrow_type, len(column.offsets) - 1, buffers, children=[values])


def read_essentials(path: Path) -> dict | None:
    """What a shard repeats of its manifest, of whatever kind it is; None when the file is damaged or no shard."""
    try:
        with pa.memory_map(str(path)) as file:
            return json.loads((pa.ipc.open_file(file).schema.metadata or {})[METADATA_KEY])
    except (pa.ArrowException, OSError, ValueError, KeyError):
        return None


class Shard:
    """A shard opened over a memory map. Rows are read-only views, valid while the shard is open."""

    def __init__(self, path: Path, kind: str):
        self.path = Path(path)
        try:
            self._file = pa.memory_map(str(path))
            self._reader = pa.ipc.open_file(self._file)
            self.schema = self._reader.schema
            if not self.schema.equals(SCHEMAS[kind], check_metadata=False):
                raise ValueError(f"{path}: columns {self.schema.names} are not those of a {kind} shard")
            starts = [0]
            self._batches: list[list[ListColumn]] = []
            for b in range(self._reader.num_record_batches):
                batch = self._reader.get_batch(b)
                batch.validate()  # a damaged header may promise more than the file holds
                self._batches.append([_list_column(column) for column in batch.columns])
                starts.append(starts[-1] + batch.num_rows)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path}: not a readable Arrow file ({error}); restore it or run prep pack again"
            ) from None
        self._starts = starts
        self._tables: dict[int, tuple[int, np.ndarray]] = {}

    @property
    def essentials(self) -> dict:
        """What the shard repeats of its manifest."""
        return json.loads((self.schema.metadata or {})[METADATA_KEY])

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def compressed(self) -> bool:
        """Whether its arrays are decompressed copies and no views of the file."""
        self._file.seek(0)
        whole = self._file.read_buffer()  # a view of the map
        return any(
            not whole.address <= column.values.ctypes.data < whole.address + whole.size
            for columns in self._batches
            for column in columns
            if column.values.nbytes
        )

    def batches(self) -> Iterator[dict[str, ListColumn]]:
        """The record batches in order, each as its columns by name, read-only views."""
        for columns in self._batches:
            yield dict(zip(self.schema.names, columns, strict=True))

    def row(self, index: int) -> tuple[np.ndarray, ...]:
        """The columns of one row in the order of the schema, as read-only views."""
        b, i = self._find(index)
        return tuple([values[offsets[i] : offsets[i + 1]] for values, offsets in self._batches[b]])

    def place(self, index: int) -> tuple[int, int]:
        """Where compiled code finds a row without a Python object for each column: (address, row of the record batch).

        At the address lies an int64[columns, 3], which says for each column of the batch where its values begin, how
        many there are, and where its offsets begin (int32[rows + 1]). It is valid while the shard is open, and no
        offset is checked.
        """
        b, i = self._find(index)
        table = self._tables.get(b)
        if table is None:
            columns = [(c.values.ctypes.data, len(c.values), c.offsets.ctypes.data) for c in self._batches[b]]
            made = np.array(columns, np.int64)
            # Threads may come at once: the first table stays, the address of another would soon mean nothing.
            table = self._tables.setdefault(b, (made.ctypes.data, made))
        return table[0], i

    def _find(self, index: int) -> tuple[int, int]:
        """(record batch, row in it)."""
        if not 0 <= index < self._starts[-1]:
            raise ValueError(
                f"{self.path}: row {index} of {len(self)} does not exist; the index does not fit the shard"
            )
        b = bisect_right(self._starts, index) - 1
        return b, index - self._starts[b]


def _list_column(array: pa.ListArray) -> ListColumn:
    return ListColumn(as_numpy(array.values), as_numpy(array.offsets))


def as_numpy(array: pa.Array) -> np.ndarray:
    """A view of numbers without nulls, as pyarrow's own `to_numpy` makes it, but without its look at pandas, whose
    import takes a process a third of a second."""
    dtype = np.dtype(array.type.to_pandas_dtype())
    data = array.buffers()[1] or b""  # an empty array may have none
    return np.frombuffer(data, dtype)[array.offset : array.offset + len(array)]
