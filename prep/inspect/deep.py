"""`prep verify --deep`: every pack of a folder, a shard a unit of work."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from formats.dataset import INDEX_NAME, PackedDataset, SeqIdPack, ThdPack
from formats.layout import check_thd, seqid_to_thd, thd_to_seqid
from formats.manifest import Manifest
from formats.shard import Shard, pack_digest
from prep.engine.local import run_units
from prep.inspect.documents import shard_units
from prep.materialize import pack_columns

MOST_PROBLEMS = 20
"""Problems of one folder that are named; a folder with more is wrong as a whole."""


class Unit(NamedTuple):
    """A shard and what the index says of it: `packs` int64[N] ascending, their `rows` int32[N] and `digests`
    uint64[N]."""

    path: Path
    shard: int
    manifest: Manifest
    packs: np.ndarray
    rows: np.ndarray
    digests: np.ndarray


class Found(NamedTuple):
    """What lies in a shard: problems as (pack, sentence); of the N sound packs their numbers, documents and targets
    (int64[N]); of all their S slots `lengths` int32[S], `docs` int64[S], `offsets` int32[S]."""

    problems: list[tuple[int, str]]
    packs: np.ndarray
    documents: np.ndarray
    targets: np.ndarray
    lengths: np.ndarray
    docs: np.ndarray
    offsets: np.ndarray


def check_packs(folder: Path, manifest: Manifest, workers: int) -> list[str]:
    """Every pack: its hash, the invariants of its row, its ids, its line in the index, and no document twice. The
    sentences are the same for any number of workers."""
    dataset = PackedDataset(folder)
    index, units = dataset.index, []
    for number, unit in enumerate(shard_units(dataset)):
        packs = np.sort(unit.packs)
        units.append(Unit(unit.path, number, manifest, packs, index.row[packs], index.xxh3[packs]))
    found = run_units(_look, units, workers)
    pieces = zip(*(f[1:] for f in found), strict=True)
    packs, documents, targets, lengths, docs, offsets = (np.concatenate(column) for column in pieces)
    of_slot = np.repeat(packs, documents)
    into_order = np.argsort(of_slot, kind="stable")
    of_slot, lengths, docs, offsets = (a[into_order] for a in (of_slot, lengths, docs, offsets))

    problems = [problem for f in found for problem in f.problems]
    alike = np.lexsort((offsets, docs))  # stable: of equal pieces the one of the earlier pack comes first
    again = (np.diff(docs[alike]) == 0) & (np.diff(offsets[alike]) == 0)
    for n in np.unique(of_slot[alike[1:][again]]).tolist():
        problems.append((n, f"{_place(index, n)}: holds a document that is already packed elsewhere; pack again"))
    if problems:
        sentences = [f"{folder}: {sentence}" for _, sentence in sorted(problems)]
        more = [f"{folder}: more packs are damaged"] if len(sentences) > MOST_PROBLEMS else []
        return sentences[:MOST_PROBLEMS] + more

    in_order = np.argsort(packs)
    columns = pack_columns(lengths, np.append(0, np.cumsum(documents[in_order])))
    for name, values in {**columns, "target_tokens": targets[in_order]}.items():
        kept = index.padded(int(name[7:])) if name.startswith("padded_") else getattr(index, name)
        if (wrong := np.flatnonzero(values != kept)).size:
            problems.append(f"{folder / INDEX_NAME}: {name} of pack {wrong[0]} is not what its row says; pack again")
    return problems


def _place(index, n: int) -> str:
    return f"pack {n} (shard {int(index.shard[n])}, row {int(index.row[n])})"


def _look(unit: Unit) -> Found:
    """All packs of one shard; it is wrong as a whole from `MOST_PROBLEMS` on."""
    manifest, shard = unit.manifest, Shard(unit.path, unit.manifest.kind)
    pack_type = ThdPack if manifest.kind == "thd" else SeqIdPack
    problems, packs, documents, targets = [], [], [], []
    lengths, docs, offsets = [np.empty(0, np.int32)], [np.empty(0, np.int64)], [np.empty(0, np.int32)]
    for n, line, digest in zip(unit.packs.tolist(), unit.rows.tolist(), unit.digests.tolist(), strict=True):
        row = pack_type(*shard.row(line))
        try:
            if pack_digest(row) != digest:
                raise ValueError("its hash is not the one in packs.arrow")
            thd = _as_thd(row, manifest)
            check_thd(*thd, capacity=manifest.capacity, align=manifest.align)
            if int(row.input_ids.min()) < 0 or int(row.input_ids.max()) > max(manifest.largest_id, manifest.pad_id):
                raise ValueError(f"ids outside 0 … {manifest.largest_id}")
            if len(row.doc_ids) != len(thd[2]) or len(row.doc_offsets) != len(thd[2]):
                raise ValueError(f"{len(row.doc_ids)} doc_ids for {len(thd[2])} documents")
        except ValueError as error:
            where = f"pack {n} (shard {unit.shard}, row {line})"
            problems.append((n, f"{where}: {error}; restore the shard from a copy or pack again"))
            if len(problems) > MOST_PROBLEMS:
                break
            continue
        packs.append(n)
        documents.append(len(thd[2]))
        targets.append(int(thd[1].sum(dtype=np.int64)))
        for column, values in ((lengths, thd[2]), (docs, row.doc_ids), (offsets, row.doc_offsets)):
            column.append(values)
    counts = (np.array(values, np.int64) for values in (packs, documents, targets))
    return Found(problems, *counts, *(np.concatenate(column) for column in (lengths, docs, offsets)))


def _as_thd(row, manifest: Manifest):
    """(input_ids, loss_mask, seq_lens, slots) of a row of either kind; ValueError when it is not what its THD form
    would be written as."""
    if isinstance(row, ThdPack):
        return row.input_ids, row.loss_mask, row.seq_lens, row.seq_lens_padded
    thd = seqid_to_thd(row.input_ids, row.attention_mask, row.labels, align=manifest.align)
    again = thd_to_seqid(*thd, capacity=manifest.capacity, pad_id=manifest.pad_id)
    for name, want, have in zip(row._fields, again, row, strict=False):
        if not np.array_equal(want, have):
            raise ValueError(f"{name} does not fit the documents of the row")
    return thd
