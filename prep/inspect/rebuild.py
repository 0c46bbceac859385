"""Write a lost `packs.arrow` or `manifest.json` anew from the shards, and say what cannot be recovered."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from formats.dataset import INDEX_NAME, REPORT_NAMES, SeqIdPack, ThdPack, read_index, write_index
from formats.layout import align_up, check_thd, seqid_to_thd
from formats.manifest import MANIFEST_NAME, Manifest, Source, fingerprint, read_manifest, write_manifest
from formats.schema import FORMAT_VERSION, KINDS
from formats.shard import FileEntry, Shard, file_digest, pack_digest
from prep.ledger import LEDGER_NAME
from prep.materialize import pack_columns

NOT_IN_SHARDS = (
    "inputs: names and checksums of the raw inputs",
    "packages: the versions that made the shards",
    "options: those that the shards do not repeat",
    "lower_bound_packs: the proven lower bound (the number of packs stands in its place)",
)


class _Content(NamedTuple):
    """What all shards together say: columns of `packs.arrow`, lengths int32[S] and document rows int64[S]."""

    columns: dict[str, np.ndarray]
    lengths: np.ndarray
    docs: np.ndarray


def rebuild(folder: Path) -> list[str]:
    """Rebuild `packs.arrow` and `manifest.json` where they are missing; returns one sentence for each thing that could
    not be recovered. ValueError when the shards cannot tell.

    Only what is gone is rebuilt: a damaged manifest must be removed first, so that nothing is replaced by mistake.
    """
    folder = Path(folder)
    whole = (folder / MANIFEST_NAME).is_file()
    if whole:
        read_manifest(folder)
        if (folder / INDEX_NAME).is_file():
            return []
    paths = sorted((folder / "shards").glob("*.arrow"))
    if not paths:
        raise ValueError(f"{folder}: has no shards/*.arrow to rebuild anything from")
    head = _head(paths)
    content = _read(paths, head)
    if not (folder / INDEX_NAME).is_file():
        write_index(folder / INDEX_NAME, content.columns)
    elif not np.array_equal(read_index(folder / INDEX_NAME).xxh3, content.columns["xxh3"]):
        raise ValueError(f"{folder / INDEX_NAME}: does not fit the shards; remove it, too, and rebuild both")
    if whole:
        return []
    names = [f"shards/{p.name}" for p in paths] + [INDEX_NAME, LEDGER_NAME, *REPORT_NAMES]
    present = [name for name in names if (folder / name).is_file()]
    options = {"plan": head["plan"], "rebuilt": True, "compress": "zstd" if _compressed(paths, head) else None}
    write_manifest(folder, _manifest(folder, head, content, present, options))
    lost = list(NOT_IN_SHARDS)
    if LEDGER_NAME not in present:
        lost.append(f"{LEDGER_NAME}: what was read, dropped and truncated; so verify stays unsatisfied")
    return lost


def _head(paths: list[Path]) -> dict:
    """What the shards repeat of their manifest, the same in all of them."""
    heads = []
    for number, path in enumerate(paths):
        head = next(h for h in (_essentials(path, kind) for kind in KINDS) if h is not None)
        missing = {"capacity", "align", "cp", "order", "block", "seed", "algorithm", "sources", "shards"} - head.keys()
        if missing or head["format_version"] != FORMAT_VERSION:
            what = f"does not say its {', '.join(sorted(missing))}" if missing else "is of another format version"
            raise ValueError(f"{path}: {what}; it was not written by this prep pack, so nothing can be rebuilt")
        if head.pop("shard") != number:
            raise ValueError(f"{path}: is not shard {number}: one is missing or was renamed; restore it from a copy")
        heads.append(head)
        if head != heads[0]:
            raise ValueError(f"{path}: belongs to another run than {paths[0].name}; restore it from a copy")
    if len(paths) != heads[0]["shards"]:
        raise ValueError(f"{paths[0].parent}: holds {len(paths)} of {heads[0]['shards']} shards; restore the others")
    return heads[0]


def _essentials(path: Path, kind: str) -> dict | None:
    try:
        return Shard(path, kind).essentials
    except ValueError:
        if kind == KINDS[-1]:
            raise
        return None


def _read(paths: list[Path], head: dict) -> _Content:
    lengths, docs, digests, targets, counts, shard_of, row_of = [], [], [], [], [], [], []
    for number, path in enumerate(paths):
        shard = Shard(path, head["kind"])
        for i in range(len(shard)):
            row = shard.row(i)
            if head["kind"] == "thd":
                pack = ThdPack(*row)
                thd = pack[:4]
            else:
                pack = SeqIdPack(*row)
                thd = seqid_to_thd(pack.input_ids, pack.attention_mask, pack.labels, align=head["align"])
            try:
                check_thd(*thd, capacity=head["capacity"], align=head["align"])
            except ValueError as error:
                raise ValueError(f"{path}: row {i}: {error}; restore the shard from a copy") from None
            lengths.append(thd[2])
            docs.append(pack.doc_ids)
            digests.append(pack_digest(row))
            targets.append(int(thd[1].sum(dtype=np.int64)))
            counts.append(len(thd[2]))
        shard_of.append(np.full(len(shard), number))
        row_of.append(np.arange(len(shard)))
    length = np.concatenate(lengths)
    columns = {
        "shard": np.concatenate(shard_of).astype(np.int32),
        "row": np.concatenate(row_of).astype(np.int32),
        **pack_columns(length, np.append(0, np.cumsum(counts))),
        "target_tokens": np.array(targets, np.int32),
        "xxh3": np.array(digests, np.uint64),
    }
    return _Content(columns, length, np.concatenate(docs))


def _compressed(paths: list[Path], head: dict) -> bool:
    return any(Shard(path, head["kind"]).compressed for path in paths)


def _manifest(folder: Path, head: dict, content: _Content, present: list[str], options: dict) -> Manifest:
    packs = len(content.columns["xxh3"])
    same = ("kind", "capacity", "align", "cp", "order", "block", "seed", "algorithm", "split", "tokenizer_hash")
    same += ("template_hash", "vocab_size", "pad_id", "bos_id", "eos_id", "largest_id")
    return Manifest(
        **{name: head[name] for name in same},
        options=options,
        packages={},
        inputs=(),
        sources=tuple(Source(*source) for source in head["sources"]),
        totals={
            "packs": packs,
            "documents": len(np.unique(content.docs)),
            "slots": len(content.lengths),
            "tokens": int(content.lengths.sum(dtype=np.int64)),
            "target_tokens": int(content.columns["target_tokens"].sum(dtype=np.int64)),
            "slot_tokens": int(align_up(content.lengths, head["align"]).sum(dtype=np.int64)),
            "lower_bound_packs": packs,
        },
        files=tuple(FileEntry(n, (folder / n).stat().st_size, file_digest(folder / n)) for n in present),
        fingerprint=fingerprint(
            content.columns["xxh3"], kind=head["kind"], capacity=head["capacity"], align=head["align"]
        ),
    )
