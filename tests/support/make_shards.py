"""Packed folders for tests, written through the formats' own writer, without `prep`."""

from pathlib import Path

import numpy as np

from formats.dataset import write_index
from formats.layout import align_up, check_thd, cu_seqlens, thd_to_seqid
from formats.manifest import Manifest, fingerprint, write_manifest
from formats.schema import ALIGNMENTS, SCHEMAS
from formats.shard import ListColumn, ShardWriter

PAD_ID = 0


def random_packs(rng, count, capacity, align, vocab_size, max_docs=8):
    """`count` THD rows (tuples in the order of the schema) of random uneven documents with random targets."""
    rows, next_doc = [], 0
    for _ in range(count):
        lens = []
        while len(lens) < max_docs:
            n = int(rng.integers(1, max(2, capacity // 3)))
            if sum(align_up(np.array([*lens, n]), align)) > capacity:
                break
            lens.append(n)
        seq_lens = np.array(lens, np.int32)
        slots = align_up(seq_lens, align)
        total = int(slots.sum())
        ids = rng.integers(1, vocab_size, total).astype(np.int32)
        mask = rng.integers(0, 2, total).astype(np.uint8)
        starts = cu_seqlens(slots)[:-1]
        for start, n, slot in zip(starts, seq_lens, slots, strict=True):
            mask[start] = 0
            ids[start + n : start + slot] = PAD_ID
            mask[start + n : start + slot] = 0
        docs = np.arange(next_doc, next_doc + len(lens), dtype=np.int64)
        next_doc += len(lens)
        check_thd(ids, mask, seq_lens, slots, capacity=capacity, align=align)
        rows.append((ids, mask, seq_lens, slots, docs, np.zeros(len(lens), np.int32)))
    return rows


def to_columns(rows, kind):
    """Rows of one record batch as the list columns a `ShardWriter` takes."""
    columns = {}
    for c, name in enumerate(SCHEMAS[kind].names):
        values = np.concatenate([row[c] for row in rows])
        columns[name] = ListColumn(values, cu_seqlens(np.array([len(row[c]) for row in rows])))
    return columns


def make_shards(folder, rows, *, capacity, align=1, cp=1, kind="thd", shard_packs=5, batch_packs=2, **manifest):
    """Write a packed folder from THD rows; extra keywords replace manifest fields. Returns the folder."""
    folder = Path(folder)
    (folder / "shards").mkdir(parents=True)
    files, digests, shard_of, row_of = [], [], [], []
    for number, first in enumerate(range(0, len(rows), shard_packs)):
        part = rows[first : first + shard_packs]
        written = part
        if kind == "seqid":
            written = [(*thd_to_seqid(*r[:4], capacity=capacity, pad_id=PAD_ID), *r[4:]) for r in part]
        with ShardWriter(folder / "shards" / f"{number:05d}.arrow", kind, {"capacity": capacity, "align": align}) as w:
            for b in range(0, len(part), batch_packs):
                digests.append(w.write(to_columns(written[b : b + batch_packs], kind)))
        files.append(w.entry)
        shard_of += [number] * len(part)
        row_of += range(len(part))
    digests = np.concatenate(digests)
    index = {
        "shard": np.array(shard_of, np.int32),
        "row": np.array(row_of, np.int32),
        "documents": np.array([len(r[2]) for r in rows], np.int32),
        "tokens": np.array([r[2].sum() for r in rows], np.int32),
        "target_tokens": np.array([r[1].sum() for r in rows], np.int32),
        "max_seqlen": np.array([r[2].max() for r in rows], np.int32),
        "sum_sq": np.array([(r[2].astype(np.int64) ** 2).sum() for r in rows], np.int64),
        "xxh3": digests,
        **{f"padded_{a}": np.array([align_up(r[2], a).sum() for r in rows], np.int32) for a in ALIGNMENTS},
    }
    files.append(write_index(folder / "packs.arrow", index))
    fields = dict(
        kind=kind,
        capacity=capacity,
        align=align,
        cp=cp,
        order="shuffle",
        block=0,
        seed=0,
        algorithm="ffd",
        options={},
        split="all",
        tokenizer_hash="t",
        template_hash="t",
        vocab_size=int(max(r[0].max() for r in rows)) + 1,
        largest_id=int(max(r[0].max() for r in rows)),
        pad_id=PAD_ID,
        bos_id=None,
        eos_id=None,
        packages={},
        inputs=(),
        sources=(),
        totals={"packs": len(rows), "tokens": int(index["tokens"].sum())},
        files=tuple(files),
        fingerprint=fingerprint(digests, kind=kind, capacity=capacity, align=align),
    )
    write_manifest(folder, Manifest(**{**fields, **manifest}))
    return folder
