"""Documents as they lie in a store or in packed shards, chunk by chunk: what lint and reports read."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from formats.dataset import PackedDataset
from formats.schema import IGNORE_INDEX
from formats.shard import ListColumn, Shard
from prep.encode.store import DocumentStore


class Chunk(NamedTuple):
    """Documents (or pieces of cut ones) of one record batch: `ids` int32[T], `mask` uint8[T]; document d holds tokens
    [starts[d], starts[d] + lengths[d]) of them (int64, int32), is row docs[d] (int64) of the store, and begins at its
    token offsets[d] (int32). `packs` int64[D]: the pack of each, −1 in a store."""

    ids: np.ndarray
    mask: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    docs: np.ndarray
    offsets: np.ndarray
    packs: np.ndarray


def store_chunks(store: DocumentStore) -> Iterator[Chunk]:
    """The documents of a store in the order in which they are stored."""
    stored = np.arange(len(store), dtype=np.int64) if store.rows is None else store.rows
    docs = np.argsort(stored, kind="stable")
    cuts = np.searchsorted(stored[docs], store.starts)
    for b, (ids, mask, bounds) in enumerate(store.batches):
        of_batch = docs[cuts[b] : cuts[b + 1]]
        rows = stored[of_batch] - store.starts[b]
        starts, lengths = bounds[rows].astype(np.int64), np.diff(bounds)[rows]
        whole, unpacked = np.zeros(len(rows), np.int32), np.full(len(rows), -1, np.int64)
        yield Chunk(ids, mask, starts, lengths, of_batch, whole, unpacked)


class ShardUnit(NamedTuple):
    """A shard as a unit of work: its file and kind, and the numbers of its packs, int64[rows] in the order of rows."""

    path: Path
    kind: str
    packs: np.ndarray


def shard_units(dataset: PackedDataset) -> list[ShardUnit]:
    """The shards of a packed folder in the order of their numbers."""
    index, kind = dataset.index, dataset.manifest.kind
    numbers = np.lexsort((index.row, index.shard))  # of the packs, in the order of the files
    bounds = np.searchsorted(index.shard[numbers], np.arange(len(dataset.shard_paths) + 1))
    pieces = zip(dataset.shard_paths, bounds[:-1], bounds[1:], strict=True)
    return [ShardUnit(path, kind, numbers[low:high]) for path, low, high in pieces]


def shard_chunks(unit: ShardUnit) -> Iterator[Chunk]:
    """The slots of one shard, record batch by record batch."""
    row = 0
    for batch in Shard(unit.path, unit.kind).batches():
        count = len(batch["doc_ids"].offsets) - 1
        packs = unit.packs[row : row + count]
        row += count
        yield _thd_chunk(batch, packs) if unit.kind == "thd" else _seqid_chunk(batch, packs)


def packed_chunks(dataset: PackedDataset) -> Iterator[Chunk]:
    """The slots of a packed folder, shard by shard."""
    for unit in shard_units(dataset):
        yield from shard_chunks(unit)


def _thd_chunk(batch: dict[str, ListColumn], packs: np.ndarray) -> Chunk:
    slots = _all(batch["seq_lens_padded"]).astype(np.int64)
    return Chunk(
        _all(batch["input_ids"]),
        _all(batch["loss_mask"]),
        np.cumsum(slots) - slots,
        _all(batch["seq_lens"]),
        _all(batch["doc_ids"]),
        _all(batch["doc_offsets"]),
        np.repeat(packs, np.diff(batch["doc_ids"].offsets)),
    )


def _seqid_chunk(batch: dict[str, ListColumn], packs: np.ndarray) -> Chunk:
    numbers = _all(batch["attention_mask"])
    starts = np.flatnonzero((numbers > 0) & (_all(batch["position_ids"]) == 0))
    return Chunk(
        _all(batch["input_ids"]),
        (_all(batch["labels"]) != IGNORE_INDEX).view(np.uint8),
        starts,
        np.add.reduceat((numbers > 0).view(np.uint8), starts, dtype=np.int32),
        _all(batch["doc_ids"]),
        _all(batch["doc_offsets"]),
        np.repeat(packs, np.diff(batch["doc_ids"].offsets)),
    )


def _all(column: ListColumn) -> np.ndarray:
    return column.values[column.offsets[0] : column.offsets[-1]]


class Slots(NamedTuple):
    """All slots of a packed folder in the order of the packs: `docs` int64[S], `lengths` int32[S] (real), `packs`
    int64[S]."""

    docs: np.ndarray
    lengths: np.ndarray
    packs: np.ndarray

    def documents(self) -> tuple[np.ndarray, np.ndarray]:
        """(rows int64[D], tokens int64[D]) of the documents, pieces of cut ones put together."""
        rows, which = np.unique(self.docs, return_inverse=True)
        return rows, np.bincount(which, weights=self.lengths, minlength=len(rows)).astype(np.int64)


def read_slots(dataset: PackedDataset) -> Slots:
    """Reads the columns of the slots only, not the tokens (of sequence-ID shards the document numbers too)."""
    parts = [(c.docs, c.lengths, c.packs) for c in packed_chunks(dataset)]
    docs, lengths, packs = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(packs, kind="stable")
    return Slots(docs[order], lengths[order], packs[order])
