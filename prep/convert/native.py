"""THD ↔ sequence-ID: a whole packed folder again, with the same packs in the same order and shards."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np

from formats.dataset import INDEX_NAME, PackedDataset, write_index
from formats.layout import thd_to_seqid
from formats.manifest import fingerprint, write_manifest
from formats.schema import ALIGNMENTS, BATCH_PACKS, PACKS_SCHEMA, SCHEMAS
from formats.shard import FileEntry, ListColumn, ShardWriter, file_digest
from prep.convert.packs import rows
from prep.inspect.report import write_reports
from prep.ledger import LEDGER_NAME


def write_native(dataset: PackedDataset, out: Path, kind: str) -> None:
    """Write `dataset` as a packed folder of `kind` (`thd` or `seqid`). Exact: the way back gives the same packs."""
    m, index = dataset.manifest, dataset.index
    (out / "shards").mkdir(parents=True)
    files, digests, packs = [], np.empty(len(dataset), np.uint64), enumerate(rows(dataset))
    for number, shard in enumerate(dataset.shards()):
        path = out / "shards" / f"{number:05d}.arrow"
        with ShardWriter(path, kind, {**shard.essentials, "shard": number}) as writer:
            for first in range(0, len(shard), BATCH_PACKS):
                batch = [next(packs) for _ in range(min(BATCH_PACKS, len(shard) - first))]
                written = writer.write(_columns([row for _, row in batch], kind, m.capacity, m.pad_id))
                digests[[n for n, _ in batch]] = written
        files.append(writer.entry)
    columns = {f.name: getattr(index, f.name, None) for f in PACKS_SCHEMA}
    columns |= {f"padded_{a}": index.padded(a) for a in ALIGNMENTS} | {"xxh3": digests}
    files.append(write_index(out / INDEX_NAME, columns))
    shutil.copyfile(dataset.folder / LEDGER_NAME, out / LEDGER_NAME)
    ledger = out / LEDGER_NAME
    files.append(FileEntry(LEDGER_NAME, ledger.stat().st_size, file_digest(ledger)))
    mark = fingerprint(digests, kind=kind, capacity=m.capacity, align=m.align)
    manifest = replace(m, kind=kind, fingerprint=mark, files=tuple(files), options={**m.options, "format": kind})
    manifest = replace(manifest, files=(*files, *write_reports(out, manifest)))
    write_manifest(out, manifest)


def _columns(packs: list, kind: str, capacity: int, pad_id: int) -> dict[str, ListColumn]:
    converted = [tuple(p) if kind == "thd" else _seqid(p, capacity, pad_id) for p in packs]
    columns = {}
    for name, values in zip(SCHEMAS[kind].names, zip(*converted, strict=True), strict=True):
        columns[name] = ListColumn(np.concatenate(values), np.append(0, np.cumsum([len(v) for v in values])))
    return columns


def _seqid(pack, capacity: int, pad_id: int) -> tuple[np.ndarray, ...]:
    return (*thd_to_seqid(*pack[:4], capacity=capacity, pad_id=pad_id), pack.doc_ids, pack.doc_offsets)
