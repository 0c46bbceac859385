"""Plan + store → shards. Every shard is a pure function of both, so they are written in parallel, in any order.

A shard is laid out one record batch at a time in buffers that are used again, so a worker holds one batch (at most one
shard), and hashing and writing read what the cache still has.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from formats.layout import align_up
from formats.schema import ALIGNMENTS, BATCH_PACKS
from formats.shard import FileEntry, ListColumn, ShardWriter, file_digest, read_essentials
from prep.encode.store import DocumentStore
from prep.engine.local import run_units
from prep.plan import Plan
from prep.rows import Buffers, buffers, gather, locate, sequence_rows


@dataclass(frozen=True)
class Layout:
    """What all shards of a packed folder share. `compression` is None or `zstd`."""

    kind: str
    capacity: int
    align: int
    pad_id: int
    largest_id: int
    compression: str | None = None


@dataclass(frozen=True)
class ShardJob:
    """All that decides the bytes of one shard: slots (see `prep.plan.Plan`) of its packs; pack n of the shard is slots
    offsets[n] … offsets[n + 1]. `rows` int64[S]: the stored row of every slot, None where that is `doc`."""

    path: Path
    store: Path
    layout: Layout
    doc: np.ndarray
    rows: np.ndarray | None
    start: np.ndarray
    length: np.ndarray
    offsets: np.ndarray
    essentials: dict


class ShardResult(NamedTuple):
    """A written shard: its entry in the manifest, and its packs' columns of `packs.arrow` (all but `shard`). `mended`:
    an interrupted run had left other bytes there."""

    entry: FileEntry
    columns: dict[str, np.ndarray]
    mended: bool = False


def materialize(
    plan: Plan,
    store: DocumentStore,
    out: Path,
    layout: Layout,
    *,
    essentials: dict,
    shard_packs: int,
    workers: int,
    on_done: Callable[[ShardJob, ShardResult], None] | None = None,
) -> tuple[list[FileEntry], dict[str, np.ndarray]]:
    """Write the shards of `plan` under `out/shards`; returns their entries and the columns of `packs.arrow`.

    A shard that is already there is a ValueError if it says that it was made from another plan or store (its
    `essentials` hold a hash of both); else it is kept where it is proven, see `write_shard`. `on_done(job, result)` is
    called after every shard.
    """
    folder = out / "shards"
    folder.mkdir(parents=True, exist_ok=True)
    jobs = []
    for first in range(0, plan.num_packs, shard_packs):
        offsets = plan.offsets[first : first + shard_packs + 1]
        slots = slice(offsets[0], offsets[-1])
        number = len(jobs)
        jobs.append(
            ShardJob(
                path=folder / f"{number:05d}.arrow",
                store=store.path,
                layout=layout,
                doc=plan.doc[slots],
                rows=None if store.rows is None else store.rows[plan.doc[slots]],
                start=plan.start[slots],
                length=plan.length[slots],
                offsets=offsets - offsets[0],
                essentials={**essentials, "shard": number},
            )
        )
    refuse_others(folder, jobs)
    results: list[ShardResult] = run_units(write_shard, jobs, workers, on_done=on_done)
    columns = {name: np.concatenate([r.columns[name] for r in results]) for name in results[0].columns}
    sizes = [len(job.offsets) - 1 for job in jobs]
    columns["shard"] = np.repeat(np.arange(len(jobs), dtype=np.int32), sizes)
    return [r.entry for r in results], columns


def refuse_others(folder: Path, jobs: list[ShardJob]) -> None:
    """ValueError when a shard lies in `folder` that is not one of `jobs`, or was made from something else."""
    wanted = {job.path.name: job for job in jobs}
    for path in sorted(folder.glob("*.arrow")):
        job, found = wanted.get(path.name), read_essentials(path)
        if job is not None and found is None:
            continue  # damaged: it is written anew
        stated = {**job.essentials, "kind": job.layout.kind} if job else {}
        differing = [k for k in stated if found.get(k) != stated[k]]
        if job is None or differing:
            what = f"other {', '.join(differing)}" if differing else "other options"
            raise ValueError(
                f"{path}: an unfinished run with {what} left this shard; "
                f"remove {folder.parent}, or name another --out, or give the options of that run"
            )


def write_shard(job: ShardJob) -> ShardResult:
    """Write one shard. What an interrupted run left in its place stays only if it is, byte for byte, what would be
    written: the shard is laid out again and the hashes are compared, so that no damage is ever taken for the truth."""
    if not job.path.exists():
        return _write(job)
    result = _write(job, dry=True)
    if (job.path.stat().st_size, file_digest(job.path)) == (result.entry.bytes, result.entry.xxh3_128):
        return result
    return _write(job)._replace(mended=True)


def _write(job: ShardJob, dry: bool = False) -> ShardResult:
    _, places = _open_store(job.store)
    layout, packs = job.layout, len(job.offsets) - 1
    room = _Room(layout, min(packs, BATCH_PACKS))
    digests, targets = [], []
    with ShardWriter(job.path, layout.kind, job.essentials, layout.compression, dry=dry) as writer:
        for first in range(0, packs, BATCH_PACKS):
            columns, counts = room.lay_out(job, first, min(first + BATCH_PACKS, packs), places)
            digests.append(writer.write(columns))
            targets.append(counts)
    return ShardResult(writer.entry, index_columns(job, np.concatenate(targets), np.concatenate(digests)))


@functools.lru_cache(1)
def _open_store(path: Path) -> tuple[DocumentStore, Buffers]:
    """The store, opened once a process; its maps live as long as the addresses."""
    store = DocumentStore.open(path)
    return store, buffers(store)


class _Room:
    """Buffers for one record batch of at most `packs` packs."""

    def __init__(self, layout: Layout, packs: int):
        self._layout = layout
        self._ids = np.empty(packs * layout.capacity, np.int32)
        self._mask = np.empty(packs * layout.capacity, np.uint8)
        if layout.kind == "seqid":
            self._rows = [np.empty(packs * layout.capacity, np.int32) for _ in range(4)]

    def lay_out(self, job: ShardJob, first: int, stop: int, places: Buffers):
        """Columns (views of the buffers, valid until the next call) and target tokens int32 of packs [first, stop)."""
        layout = self._layout
        offsets = job.offsets[first : stop + 1]
        slots = slice(offsets[0], offsets[-1])
        offsets = offsets - offsets[0]
        doc, start, length = job.doc[slots], job.start[slots], job.length[slots]
        sizes = align_up(length, layout.align)
        slot_starts = np.zeros(len(sizes) + 1, np.int64)
        np.cumsum(sizes, out=slot_starts[1:])
        bounds = slot_starts[offsets]
        if (over := np.diff(bounds).max()) > layout.capacity:
            raise AssertionError(f"the plan puts {over} tokens into a pack of {layout.capacity}")
        ids, mask = self._ids[: bounds[-1]], self._mask[: bounds[-1]]
        targets = np.empty(len(offsets) - 1, np.int32)
        stored = doc if job.rows is None else job.rows[slots]
        ids_from, mask_from, beyond = locate(*places, stored, start, length)
        if beyond:
            raise ValueError(
                f"{job.store}: the store is damaged ({beyond} documents shorter than planned); "
                "remove it and encode again"
            )
        low, high, bits = gather(ids_from, mask_from, length, slot_starts, offsets, layout.pad_id, ids, mask, targets)
        if low < 0 or high > max(layout.largest_id, layout.pad_id) or bits > 1:
            raise ValueError(
                f"{job.store}: the store is damaged (ids {low} to {high} where the largest is {layout.largest_id}, "
                f"mask values up to {bits}); remove it and encode again"
            )
        columns = {"doc_ids": ListColumn(doc, offsets), "doc_offsets": ListColumn(start.astype(np.int32), offsets)}
        if layout.kind == "thd":
            columns["input_ids"], columns["loss_mask"] = ListColumn(ids, bounds), ListColumn(mask, bounds)
            columns["seq_lens"], columns["seq_lens_padded"] = ListColumn(length, offsets), ListColumn(sizes, offsets)
        else:
            sequence_rows(ids, mask, length, slot_starts, offsets, layout.pad_id, layout.capacity, *self._rows)
            bounds = np.arange(stop - first + 1, dtype=np.int64) * layout.capacity
            names = ("input_ids", "attention_mask", "position_ids", "labels")
            columns |= {n: ListColumn(r[: bounds[-1]], bounds) for n, r in zip(names, self._rows, strict=True)}
        return columns, targets


def index_columns(job: ShardJob, target_tokens: np.ndarray, digests: np.ndarray) -> dict[str, np.ndarray]:
    """The columns of `packs.arrow` for one shard (all but `shard`), from the plan alone but for targets and hashes."""
    return {
        "row": np.arange(len(job.offsets) - 1, dtype=np.int32),
        **pack_columns(job.length, job.offsets),
        "target_tokens": target_tokens,
        "xxh3": digests,
    }


def pack_columns(length: np.ndarray, offsets: np.ndarray) -> dict[str, np.ndarray]:
    """What the real lengths alone say of packs: pack n is slots offsets[n] … offsets[n + 1] of `length` int32[S]."""
    first = offsets[:-1]
    return {
        "documents": np.diff(offsets).astype(np.int32),
        "tokens": np.add.reduceat(length, first, dtype=np.int32),
        "max_seqlen": np.maximum.reduceat(length, first),
        "sum_sq": np.add.reduceat(length.astype(np.int64) ** 2, first),
        **{f"padded_{a}": np.add.reduceat(align_up(length, a), first, dtype=np.int32) for a in ALIGNMENTS},
    }
