"""THD ↔ sequence-ID: a whole packed folder again, with the same packs in the same order and shards."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from formats.dataset import INDEX_NAME, PackedDataset, damaged_pack, write_index
from formats.layout import thd_to_seqid
from formats.manifest import Manifest, fingerprint, write_manifest
from formats.schema import ALIGNMENTS, BATCH_PACKS, PACKS_SCHEMA, SCHEMAS
from formats.shard import FileEntry, ListColumn, Shard, ShardWriter, file_digest, pack_digest
from prep.convert.packs import as_row
from prep.engine.local import run_units
from prep.inspect.documents import shard_units
from prep.inspect.report import write_reports
from prep.ledger import LEDGER_NAME


class Unit(NamedTuple):
    """A shard to convert, from `source` to `path`, with the numbers of its packs, int64[rows], and their `digests` as
    the index has them, uint64[rows]."""

    source: Path
    path: Path
    number: int
    manifest: Manifest
    kind: str
    packs: np.ndarray
    digests: np.ndarray


def write_native(dataset: PackedDataset, out: Path, kind: str, workers: int) -> None:
    """Write `dataset` as a packed folder of `kind` (`thd` or `seqid`), uncompressed, a shard a unit of work. Exact: the
    way back gives the same packs. The bytes are the same for any number of workers."""
    m, index = dataset.manifest, dataset.index
    (out / "shards").mkdir(parents=True)
    shards = shard_units(dataset)
    units = [
        Unit(shard.path, out / "shards" / f"{n:05d}.arrow", n, m, kind, shard.packs, index.xxh3[shard.packs])
        for n, shard in enumerate(shards)
    ]
    files, digests = [], np.empty(len(dataset), np.uint64)
    for shard, (entry, written) in zip(shards, run_units(_convert, units, workers), strict=True):
        digests[shard.packs] = written
        files.append(entry)
    columns = {f.name: getattr(index, f.name, None) for f in PACKS_SCHEMA}
    columns |= {f"padded_{a}": index.padded(a) for a in ALIGNMENTS} | {"xxh3": digests}
    files.append(write_index(out / INDEX_NAME, columns))
    shutil.copyfile(dataset.folder / LEDGER_NAME, out / LEDGER_NAME)
    ledger = out / LEDGER_NAME
    files.append(FileEntry(LEDGER_NAME, ledger.stat().st_size, file_digest(ledger)))
    mark = fingerprint(digests, kind=kind, capacity=m.capacity, align=m.align)
    options = {**m.options, "format": kind, "compress": None}
    manifest = replace(m, kind=kind, fingerprint=mark, files=tuple(files), options=options)
    manifest = replace(manifest, files=(*files, *write_reports(out, manifest)))
    write_manifest(out, manifest)


def _convert(unit: Unit) -> tuple[FileEntry, np.ndarray]:
    """Write one shard; returns its entry and the digests of its packs, uint64[rows]. ValueError for a damaged pack."""
    shard, m = Shard(unit.source, unit.manifest.kind), unit.manifest
    written = []
    with ShardWriter(unit.path, unit.kind, {**shard.essentials, "shard": unit.number}) as writer:
        for first in range(0, len(shard), BATCH_PACKS):
            numbers = range(first, min(first + BATCH_PACKS, len(shard)))
            batch = []
            for n in numbers:
                pack = shard.row(n)
                if pack_digest(pack) != int(unit.digests[n]):
                    raise damaged_pack(unit.source, n, int(unit.packs[n]))
                batch.append(as_row(pack, m))
            written.append(writer.write(_columns(batch, unit.kind, m.capacity, m.pad_id)))
    return writer.entry, np.concatenate(written)


def _columns(packs: list, kind: str, capacity: int, pad_id: int) -> dict[str, ListColumn]:
    converted = [tuple(p) if kind == "thd" else _seqid(p, capacity, pad_id) for p in packs]
    columns = {}
    for name, values in zip(SCHEMAS[kind].names, zip(*converted, strict=True), strict=True):
        columns[name] = ListColumn(np.concatenate(values), np.append(0, np.cumsum([len(v) for v in values])))
    return columns


def _seqid(pack, capacity: int, pad_id: int) -> tuple[np.ndarray, ...]:
    return (*thd_to_seqid(*pack[:4], capacity=capacity, pad_id=pad_id), pack.doc_ids, pack.doc_offsets)
