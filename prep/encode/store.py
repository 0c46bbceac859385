"""The document store: token ids and target masks of all documents, unpadded, in input order.

    STORE/plan.json           what the units are made of: inputs, options, tokenizer, versions
    STORE/units/00000.arrow   one work unit: input_ids list<int32>, loss_mask list<uint8>, doc_hash uint64
    STORE/units/00000.json    written after it: rows, checksum, ledger. A unit without one is not done
    STORE/rows.arrow          only where documents are left out or repeated: the stored row of each document, int64
    STORE/rejects.jsonl       only where bad records were skipped
    STORE/ledger.json         what happened to every document and token
    STORE/store.json          written last: a store without one is not finished

How each file is written, in a folder or behind an address, stands in `storage`.
"""

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import xxhash

from formats.shard import as_numpy, atomic_write, file_digest, read_json, write_json
from prep.ledger import Ledger

STORE_VERSION = 1
STORE_NAME = "store.json"

SCHEMA = pa.schema(
    [("input_ids", pa.list_(pa.int32())), ("loss_mask", pa.list_(pa.uint8())), pa.field("doc_hash", pa.uint64())]
)


class UnitResult(NamedTuple):
    """What became of one work unit (JSON-compatible through `_asdict`)."""

    index: int
    source: str
    rows: int
    tokens: int
    target_tokens: int
    largest_id: int
    bytes: int
    xxh3_128: str
    ledger: dict
    rejected: int

    def is_of(self, size: int, digest: Callable[[], str]) -> bool:
        """Whether data of this size and xxh3-128 is the unit's."""
        return size == self.bytes and digest() == self.xxh3_128


def unit_path(store: Path, index: int, suffix: str = ".arrow") -> Path:
    return store / "units" / f"{index:05d}{suffix}"


class UnitWriter:
    """Writes one unit, batch by batch; a context manager. After it, `finish` makes the unit done.

    `sync`: make it durable; False where the caller does so for many units at once (see `FolderStorage.syncing`).
    """

    def __init__(self, store: Path, index: int, source: str, sync: bool = True):
        self._store = store
        self._index = index
        self._source = source
        self._sync = sync
        self._rows = self._tokens = self._targets = 0
        self._largest = -1

    def __enter__(self):
        self._atomic = atomic_write(unit_path(self._store, self._index), self._sync)
        self._file = self._atomic.__enter__()
        self._sink = pa.PythonFile(self._file, mode="w")
        self._writer = pa.ipc.new_file(self._sink, SCHEMA)
        return self

    def write(self, ids: np.ndarray, mask: np.ndarray, offsets: np.ndarray) -> None:
        """One record batch: ids int32[T], mask uint8[T], offsets int64[N+1] with T < 2³¹."""
        rows = len(offsets) - 1
        if rows == 0:
            return
        hashes = np.array(_document_hashes(ids, mask, offsets.tolist()), np.uint64)
        offsets32 = pa.py_buffer(offsets.astype(np.int32))
        columns = [
            pa.Array.from_buffers(field.type, rows, [None, offsets32], children=[_array(field.type.value_type, values)])
            for field, values in zip(SCHEMA, (ids, mask), strict=False)
        ]
        columns.append(_array(pa.uint64(), hashes))
        self._writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=SCHEMA))
        self._rows += rows
        self._tokens += len(ids)
        self._targets += int(np.count_nonzero(mask))
        self._largest = max(self._largest, int(ids.max(initial=-1)))

    def __exit__(self, kind, error, trace):
        if error is None:
            self._writer.close()
            self._sink.flush()
        self._atomic.__exit__(kind, error, trace)
        return False

    def finish(self, ledger: Ledger, rejected: Sequence[str] = ()) -> UnitResult:
        """Write the unit's rejected records and its lines of the ledger; from now on it is done."""
        if rejected:
            with atomic_write(unit_path(self._store, self._index, ".rejects.jsonl")) as file:
                file.write("".join(f"{line}\n" for line in rejected).encode())
        result = UnitResult(
            self._index,
            self._source,
            self._rows,
            self._tokens,
            self._targets,
            self._largest,
            self._file.bytes,
            self._file.hexdigest(),
            ledger.to_json(),
            len(rejected),
        )
        write_json(unit_path(self._store, self._index, ".json"), result._asdict(), self._sync)
        return result


def _array(kind: pa.DataType, values: np.ndarray) -> pa.Array:
    """`pa.array` without its look at pandas, whose import takes every process a third of a second."""
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(np.ascontiguousarray(values))])


def _document_hashes(ids: np.ndarray, mask: np.ndarray, bounds: list[int]) -> list[int]:
    """xxh3-64 of each document's ids and mask. Slices of memory cost a fraction of slices of arrays."""
    ids_bytes, mask_bytes = memoryview(ids).cast("B"), memoryview(mask)
    hashes = []
    for start, stop in pairwise(bounds):
        digest = xxhash.xxh3_64(ids_bytes[4 * start : 4 * stop])
        digest.update(mask_bytes[start:stop])
        hashes.append(digest.intdigest())
    return hashes


@dataclass(frozen=True)
class StoreInfo:
    """What the store was made from, and of what kind its ids are."""

    tokenizer_hash: str
    template_hash: str
    vocab_size: int
    largest_id: int
    pad_id: int | None
    bos_id: int | None
    eos_id: int | None
    sources: tuple[tuple[str, int, int], ...]
    """(name, first row, one past the last row)."""
    inputs: tuple[dict, ...]
    packages: dict[str, str]
    options: dict
    engine: str
    """`hf` or `fast`: what made the ids."""


def source_ranges(names: Sequence[str], counts: Sequence[int]) -> list[tuple[str, int, int]]:
    """(name, first row, one past the last) of sources that lie one after the other."""
    ends = np.cumsum(counts).tolist()
    return [(name, end - count, end) for name, count, end in zip(names, counts, ends, strict=True)]


def store_content(
    plan: dict, results: Sequence[UnitResult], ledger: Ledger, sources: Sequence[tuple[str, int, int]]
) -> dict:
    """What store.json says when every row of every unit counts."""
    kept = ledger.total()["kept"]
    return {
        **plan,
        "rows": kept["documents"],
        "tokens": kept["tokens"],
        "target_tokens": sum(result.target_tokens for result in results),
        "largest_id": max((result.largest_id for result in results), default=-1),
        "sources": [list(source) for source in sources],
        "selection": None,
        "ledger": ledger.to_json(),
        "units": [{"rows": r.rows, "bytes": r.bytes, "xxh3_128": r.xxh3_128} for r in results],
    }


def write_selection(file, rows: np.ndarray) -> None:
    """Write the stored rows of the documents, int64[N], into a file that is open."""
    table = pa.table({"row": pa.array(rows, pa.int64())})
    with pa.ipc.new_file(pa.PythonFile(file, mode="w"), table.schema) as writer:
        writer.write_table(table)


class DocumentStore:
    """A finished store, memory-mapped. Opening maps the units and reads nothing of them.

    `batches`: (ids int32, mask uint8, offsets int32[n+1]) of every record batch in order, views over the maps;
    `starts` int64[B+1]: stored row r is row r − starts[b] of batch b; `rows` int64[N], where documents are left out or
    repeated: the stored row of each document, else None.
    """

    def __init__(self, path: Path, content: dict):
        self.path = path
        keys = StoreInfo.__dataclass_fields__
        values = {key: content[key] for key in keys}
        values["sources"] = tuple(tuple(source) for source in content["sources"])
        values["inputs"] = tuple(content["inputs"])
        self.info = StoreInfo(**values)
        self.ledger = Ledger.from_json(content["ledger"])
        self.batches: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._hashes: list[np.ndarray] = []
        starts = [0]
        for index, unit in enumerate(content["units"]):
            for batch in _read_unit(unit_path(path, index), unit):
                ids, mask, doc_hash = batch.columns
                self.batches.append((as_numpy(ids.values), as_numpy(mask.values), as_numpy(ids.offsets)))
                self._hashes.append(as_numpy(doc_hash))
                starts.append(starts[-1] + batch.num_rows)
        self.starts = np.array(starts, np.int64)
        self.rows = None
        if content["selection"] is not None:
            tables = _read_unit(path / content["selection"]["name"], content["selection"])
            self.rows = np.concatenate([np.empty(0, np.int64), *[table.column(0).to_numpy() for table in tables]])

    def with_rows(self, rows: np.ndarray, sources: Sequence[tuple[str, int, int]], ledger: Ledger) -> "DocumentStore":
        """The same store with other documents: `rows` int64[N], the stored row of each; `sources` are ranges of them,
        and `ledger` is theirs."""
        other = copy.copy(self)
        for name in ("lengths", "doc_hashes", "target_tokens"):
            other.__dict__.pop(name, None)
        other.rows, other.ledger = rows, ledger
        other.info = replace(self.info, sources=tuple(tuple(source) for source in sources))
        return other

    @cached_property
    def lengths(self) -> np.ndarray:
        """int32[N]: tokens of every document."""
        return self._chosen([np.empty(0, np.int32), *(np.diff(offsets) for _, _, offsets in self.batches)])

    @cached_property
    def doc_hashes(self) -> np.ndarray:
        """uint64[N]: xxh3-64 of every document's ids and mask."""
        return self._chosen([np.empty(0, np.uint64), *self._hashes])

    @cached_property
    def target_tokens(self) -> np.ndarray:
        """int32[N]: target tokens of every document (reads all masks)."""
        counts = (np.add.reduceat(mask, offsets[:-1], dtype=np.int32) for _, mask, offsets in self.batches)
        return self._chosen([np.empty(0, np.int32), *counts])

    def _chosen(self, pieces: list[np.ndarray]) -> np.ndarray:
        stored = np.concatenate(pieces)
        return stored if self.rows is None else stored[self.rows]

    @classmethod
    def open(cls, path: str | Path) -> "DocumentStore":
        """Open a finished store.

        Raises:
            ValueError: no store, an unfinished one, one of another format version, or a damaged unit.
        """
        if "://" in str(path):
            raise ValueError(f"{path}: a store is read from a folder of this machine; copy it, e.g. with aws s3 sync")
        path = Path(path)
        content = read_store(path)
        if content is None:
            what = (
                "an unfinished document store; run again with --resume" if path.is_dir() else "no such document store"
            )
            raise ValueError(f"{path}: {what}")
        return cls(path, content)

    def __len__(self) -> int:
        return int(self.starts[-1]) if self.rows is None else len(self.rows)

    def document(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(input_ids int32[L], loss_mask uint8[L]) of a document: read-only views over the map."""
        if self.rows is not None:
            index = int(self.rows[index])
        batch = int(np.searchsorted(self.starts, index, side="right")) - 1
        ids, mask, offsets = self.batches[batch]
        row = index - self.starts[batch]
        start, stop = offsets[row], offsets[row + 1]
        return ids[start:stop], mask[start:stop]


def read_store(path: Path) -> dict | None:
    """store.json of a finished store, or None."""
    file = path / STORE_NAME
    return check_version(path, read_json(file)) if file.is_file() else None


def check_version(place: object, content: dict) -> dict:
    """`content` of a store.json; ValueError when it is none, or of another version of the format."""
    if not isinstance(content, dict):
        raise ValueError(f"{place}/{STORE_NAME}: holds no store's description; remove the store and encode again")
    if content.get("store_version") != STORE_VERSION:
        raise ValueError(
            f"{place}: store version {content.get('store_version')}, this program reads {STORE_VERSION}; encode again"
        )
    return content


def check_units(path: Path, done: Callable[[int, int], None]) -> None:
    """Read every file of a finished store once and compare its bytes with the hash that was taken when it was written.

    `done`: called after each file with how many are through, of how many.

    Raises:
        ValueError: bytes changed; the message names the first such file.
    """
    content = read_store(path)
    files = [(unit_path(path, index), unit["xxh3_128"]) for index, unit in enumerate(content["units"])]
    if content["selection"] is not None:
        files.append((path / content["selection"]["name"], content["selection"]["xxh3_128"]))
    with ThreadPoolExecutor(4) as pool:  # hashing and reading leave Python's lock alone
        digests = pool.map(file_digest, [file for file, _ in files])
        for number, ((file, expected), digest) in enumerate(zip(files, digests, strict=True), 1):
            if digest != expected:
                raise ValueError(
                    f"{file}: damaged (its bytes changed); restore it from a copy, or remove the store and encode again"
                )
            done(number, len(files))


def _read_unit(path: Path, unit: dict) -> list[pa.RecordBatch]:
    try:
        if path.stat().st_size != unit["bytes"]:
            raise ValueError(f"{path}: the unit is damaged (its size changed); remove the store and encode again")
        with pa.memory_map(str(path)) as source:
            reader = pa.ipc.open_file(source)
            return [reader.get_batch(i) for i in range(reader.num_record_batches)]
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(f"{path}: the unit cannot be read ({error}); remove the store and encode again") from None
