"""`manifest.json`: what a packed folder is, and the proof that it is whole. It is written last."""

import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePosixPath

import numpy as np
import xxhash

from formats.schema import ALIGNMENTS, FORMAT_VERSION, KINDS, MAX_CAPACITY, ORDERS
from formats.shard import FileEntry, write_json

MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True)
class Source:
    """Documents [first_row, last_row) of the document store come from this source."""

    name: str
    first_row: int
    last_row: int


@dataclass(frozen=True)
class Manifest:
    """All fields of `manifest.json` except its own hash. Sizes are in tokens unless they say otherwise.

    `split` is `all`, `train` or `eval`. `inputs` lists the raw files by name (no folders), bytes and xxh3-128.
    `fingerprint` is over the pack hashes in order and capacity, align and kind (`fingerprint()` below), so it
    survives re-sharding and compression; the data position of a training run is only valid under it.
    """

    kind: str
    capacity: int
    align: int
    cp: int
    order: str
    block: int
    seed: int
    algorithm: str
    options: dict
    split: str
    tokenizer_hash: str
    template_hash: str
    vocab_size: int
    largest_id: int
    pad_id: int
    bos_id: int | None
    eos_id: int | None
    packages: dict[str, str]
    inputs: tuple[FileEntry, ...]
    sources: tuple[Source, ...]
    totals: dict[str, int]
    files: tuple[FileEntry, ...]
    fingerprint: str
    format_version: int = FORMAT_VERSION


def fingerprint(digests: np.ndarray, *, kind: str, capacity: int, align: int) -> str:
    """xxh3-128, in hex, of the packs' digests (uint64[N], in order) under kind, capacity and align."""
    digest = xxhash.xxh3_128(f"{kind} {capacity} {align} {len(digests)} ".encode())
    digest.update(np.ascontiguousarray(digests, "<u8").data)
    return digest.hexdigest()


def _own_hash(value: dict) -> str:
    body = {k: v for k, v in value.items() if k != "hash"}
    return xxhash.xxh3_128(json.dumps(body, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` atomically, with its own hash. The folder counts as finished from here on."""
    value = asdict(manifest)
    value["inputs"] = [entry._asdict() for entry in manifest.inputs]
    value["files"] = [entry._asdict() for entry in manifest.files]
    value["sources"] = list(value["sources"])
    write_json(Path(folder) / MANIFEST_NAME, {**value, "hash": _own_hash(value)})


def is_compressed(manifest: Manifest) -> bool:
    """Whether the shards were compressed for shipping (`prep pack --compress`): readers decompress, they cannot map."""
    return bool(manifest.options.get("compress"))


def refuse_address(folder: str | Path) -> None:
    """ValueError for an address (`s3://…`), naming the copy command: shards are mapped, so they lie in a folder."""
    found = re.match(r"([a-z][a-z0-9+.-]+):/+(.*)", str(folder))  # a Path has lost one of the slashes
    if not found:
        return
    address = f"{found[1]}://{found[2]}"
    command = {"s3": "aws s3 sync", "gs": "gcloud storage rsync --recursive"}.get(found[1], "rclone copy")
    raise ValueError(
        f"{address}: shards are read from a local folder; copy them first with: {command} {address} FOLDER"
    )


def read_manifest(folder: Path) -> Manifest:
    """Read and validate `manifest.json`. ValueError names what is wrong and what to do."""
    refuse_address(folder)
    folder = Path(folder)
    path = folder / MANIFEST_NAME
    if not folder.is_dir():
        what = "is a file and no folder" if folder.is_file() else "no such folder"
        raise ValueError(f"{folder}: {what} of packed shards; restore it from a copy, or make it with prep pack")
    if not path.is_file():
        inner = [name for name in ("train", "eval") if (folder / name).is_dir()]
        if any((folder / name / MANIFEST_NAME).is_file() for name in inner):
            raise ValueError(
                f"{folder}: holds the packed folders {' and '.join(inner)}; name one, e.g. {folder / inner[0]}"
            )
        if (folder / "store.json").is_file():
            raise ValueError(
                f"{folder}: a document store and no packed shards; make some: prep pack {folder} --out DIR --seq-len N"
            )
        if stores := [str(folder / name) for name in inner if (folder / name / "store.json").is_file()]:
            raise ValueError(
                f"{folder}: holds document stores and no packed shards; make some of {' and of '.join(stores)}, e.g. "
                f"prep pack {stores[0]} --out DIR --seq-len N"
            )
        if not any((folder / part / name).exists() for part in ("", *inner) for name in ("shards", "packs.arrow")):
            raise ValueError(f"{folder}: holds no packed shards; name a folder that prep pack wrote")
        raise ValueError(
            f"{folder}: no {MANIFEST_NAME}, so these shards are unfinished; finish them with prep pack --resume, "
            "or, where it was lost, write it anew with prep verify --rebuild"
        )
    try:
        value = json.loads(path.read_bytes())
        version = value["format_version"]
        stated = value.pop("hash")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a manifest ({error!r}); restore it from a copy or pack again") from None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path}: format version {version}, but this meshpack reads version {FORMAT_VERSION}; "
            "pack again, or use the meshpack that wrote it"
        )
    if stated != _own_hash(value):
        raise ValueError(f"{path}: was edited or damaged (its hash does not fit); restore it from a copy or pack again")
    if missing := {f.name for f in fields(Manifest)} ^ value.keys():
        raise ValueError(f"{path}: fields {sorted(missing)} are missing or unknown; pack again")
    value["inputs"] = tuple(FileEntry(**entry) for entry in value["inputs"])
    value["files"] = tuple(FileEntry(**entry) for entry in value["files"])
    value["sources"] = tuple(Source(**source) for source in value["sources"])
    manifest = Manifest(**value)
    _check(path, manifest)
    return manifest


def _check(path: Path, m: Manifest) -> None:
    problem = None
    if m.kind not in KINDS:
        problem = f"kind {m.kind!r} is none of {', '.join(KINDS)}"
    elif m.order not in ORDERS:
        problem = f"order {m.order!r} is none of {', '.join(ORDERS)}"
    elif not 1 <= m.capacity <= MAX_CAPACITY:
        problem = f"capacity {m.capacity} is not between 1 and {MAX_CAPACITY}"
    elif m.align not in (1, *ALIGNMENTS) or m.capacity % m.align:
        problem = f"align {m.align} does not fit capacity {m.capacity}"
    for entry in m.files:
        name = PurePosixPath(entry.name)
        if name.is_absolute() or ".." in name.parts or name.as_posix() != entry.name or "\\" in entry.name:
            problem = f"file name {entry.name!r} leaves the folder"
    if problem:
        raise ValueError(f"{path}: {problem}")
