"""Plan + store → shards. Every shard is a pure function of both, so they are written in parallel, in any order."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from formats.layout import align_up, check_thd, thd_to_seqid
from formats.schema import ALIGNMENTS, BATCH_PACKS, SCHEMAS
from formats.shard import FileEntry, ListColumn, Shard, ShardWriter, file_digest, pack_digest
from prep.encode.store import DocumentStore
from prep.engine.local import run_units
from prep.plan import Plan


@dataclass(frozen=True)
class ShardJob:
    """All that decides the bytes of one shard: slots (see `prep.plan.Plan`) of the packs from `first_pack` on."""

    path: Path
    store: Path
    doc: np.ndarray
    start: np.ndarray
    length: np.ndarray
    offsets: np.ndarray
    kind: str
    capacity: int
    align: int
    pad_id: int
    essentials: dict


class ShardResult(NamedTuple):
    """A written shard: its entry in the manifest, and its packs' columns of `packs.arrow` (all but `shard`)."""

    entry: FileEntry
    columns: dict[str, np.ndarray]


def materialize(
    plan: Plan,
    store: Path,
    out: Path,
    *,
    kind: str,
    capacity: int,
    align: int,
    pad_id: int,
    essentials: dict,
    shard_packs: int,
    workers: int,
    on_done: Callable[[ShardJob, ShardResult], None] | None = None,
) -> tuple[list[FileEntry], dict[str, np.ndarray]]:
    """Write the shards of `plan` under `out/shards`; returns their entries and the columns of `packs.arrow`.

    A shard that is already there is kept if it says that it was made from the same plan and store (its `essentials`,
    which hold a hash of both), and is a ValueError otherwise. `on_done(job, result)` is called after every shard.
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
                store=store,
                doc=plan.doc[slots],
                start=plan.start[slots],
                length=plan.length[slots],
                offsets=offsets - offsets[0],
                kind=kind,
                capacity=capacity,
                align=align,
                pad_id=pad_id,
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
        job = wanted.get(path.name)
        found = Shard(path, job.kind).essentials if job else {}
        differing = [k for k in (job.essentials if job else {}) if found.get(k) != job.essentials[k]]
        if job is None or differing:
            what = f"other {', '.join(differing)}" if differing else "other options"
            raise ValueError(
                f"{path}: an unfinished run with {what} left this shard; "
                f"remove {folder.parent}, or name another --out, or give the options of that run"
            )


def write_shard(job: ShardJob) -> ShardResult:
    """Write one shard, or read back what an interrupted run already wrote."""
    if job.path.exists():
        return _read_back(job)
    rows = _rows(job)
    with ShardWriter(job.path, job.kind, job.essentials) as writer:
        digests = [
            writer.write({name: rows.batch(name, first) for name in SCHEMAS[job.kind].names})
            for first in range(0, len(job.offsets) - 1, BATCH_PACKS)
        ]
    return ShardResult(writer.entry, index_columns(job, rows.target_tokens, np.concatenate(digests)))


def _read_back(job: ShardJob) -> ShardResult:
    """The result of a shard that an interrupted run completed: hashes are of what is on disk."""
    shard = Shard(job.path, job.kind)
    rows = [shard.row(i) for i in range(len(shard))]
    digests = np.array([pack_digest(row) for row in rows], np.uint64)
    if job.kind == "thd":
        targets = np.array([row[1].sum(dtype=np.int32) for row in rows], np.int32)
    else:
        targets = np.array([np.count_nonzero(row[3] >= 0) for row in rows], np.int32)
    entry = FileEntry(f"{job.path.parent.name}/{job.path.name}", job.path.stat().st_size, file_digest(job.path))
    return ShardResult(entry, index_columns(job, targets, digests))


class _Rows(NamedTuple):
    columns: dict[str, ListColumn]
    target_tokens: np.ndarray

    def batch(self, name: str, first: int) -> ListColumn:
        """Rows `first` … `first + BATCH_PACKS` of a column, without copying the values."""
        values, offsets = self.columns[name]
        offsets = offsets[first : first + BATCH_PACKS + 1]
        return ListColumn(values[offsets[0] : offsets[-1]], (offsets - offsets[0]).astype(np.int32))


def _rows(job: ShardJob) -> _Rows:
    """Gather the shard's packs from the store."""
    store = DocumentStore.open(job.store)
    slots = align_up(job.length, job.align)
    slot_starts = np.zeros(len(slots) + 1, np.int64)
    np.cumsum(slots, out=slot_starts[1:])
    ids = np.full(slot_starts[-1], job.pad_id, np.int32)
    mask = np.zeros(slot_starts[-1], np.uint8)
    pieces = zip(job.doc.tolist(), job.start.tolist(), job.length.tolist(), slot_starts.tolist(), strict=False)
    for doc, start, length, at in pieces:
        document_ids, document_mask = store.document(doc)
        ids[at : at + length] = document_ids[start : start + length]
        mask[at : at + length] = document_mask[start : start + length]
    # A later piece of a cut document begins without its context: like any first token it is never a target.
    mask[slot_starts[:-1]] = 0
    bounds = slot_starts[job.offsets]
    targets = np.add.reduceat(mask, bounds[:-1], dtype=np.int32)
    per_slot = {"doc_ids": job.doc, "doc_offsets": job.start.astype(np.int32)}
    for n, (low, high) in enumerate(zip(job.offsets[:-1], job.offsets[1:], strict=True)):
        tokens, of_pack = slice(bounds[n], bounds[n + 1]), slice(low, high)
        check_thd(
            ids[tokens], mask[tokens], job.length[of_pack], slots[of_pack], capacity=job.capacity, align=job.align
        )
    if job.kind == "thd":
        per_slot |= {"seq_lens": job.length, "seq_lens_padded": slots}
        per_token, token_offsets = {"input_ids": ids, "loss_mask": mask}, bounds
    else:
        names = SCHEMAS["seqid"].names[:4]
        packs = len(bounds) - 1
        per_token = {name: np.empty(packs * job.capacity, np.int32) for name in names}
        token_offsets = np.arange(packs + 1, dtype=np.int64) * job.capacity
        for n in range(packs):
            tokens, of_pack = slice(bounds[n], bounds[n + 1]), slice(job.offsets[n], job.offsets[n + 1])
            row = thd_to_seqid(
                ids[tokens],
                mask[tokens],
                job.length[of_pack],
                slots[of_pack],
                capacity=job.capacity,
                pad_id=job.pad_id,
            )
            for name, values in zip(names, row, strict=True):
                per_token[name][token_offsets[n] : token_offsets[n + 1]] = values
    columns = {name: ListColumn(values, token_offsets) for name, values in per_token.items()}
    columns |= {name: ListColumn(values, job.offsets) for name, values in per_slot.items()}
    return _Rows(columns, targets)


def index_columns(job: ShardJob, target_tokens: np.ndarray, digests: np.ndarray) -> dict[str, np.ndarray]:
    """The columns of `packs.arrow` for one shard (all but `shard`), from the plan alone but for targets and hashes."""
    first, length = job.offsets[:-1], job.length
    return {
        "row": np.arange(len(first), dtype=np.int32),
        "documents": np.diff(job.offsets).astype(np.int32),
        "tokens": np.add.reduceat(length, first, dtype=np.int32),
        "target_tokens": target_tokens,
        "max_seqlen": np.maximum.reduceat(length, first),
        "sum_sq": np.add.reduceat(length.astype(np.int64) ** 2, first),
        **{f"padded_{a}": np.add.reduceat(align_up(length, a), first, dtype=np.int32) for a in ALIGNMENTS},
        "xxh3": digests,
    }
