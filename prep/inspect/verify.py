"""Is a packed folder what was written? Everything that is wrong is found and named; nothing is changed."""

import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from formats.dataset import INDEX_NAME, read_index
from formats.manifest import MANIFEST_NAME, Manifest, fingerprint, read_manifest
from formats.schema import FORMAT_VERSION
from formats.shard import TEMPORARY_SUFFIX, Shard, file_digest, json_bytes, read_json
from prep.inspect.deep import check_packs
from prep.inspect.facts import SPLITS
from prep.ledger import LEDGER_NAME, Ledger


class Verdict(NamedTuple):
    """`problems`: one sentence each, naming the file; empty when the folder is sound. `checked`: what was looked at."""

    problems: list[str]
    checked: list[str]


def verify(folder: Path, *, deep: bool = False, workers: int = 1) -> Verdict:
    """Check a packed folder: manifest (format version, its own hash, names inside the folder), every file (present,
    size, xxh3-128), no file too many, `packs.arrow` against the shards, fingerprint, totals and ledger sums. `deep`
    reads every pack, by `workers` processes: hashes, the invariants of a row, ids, and every column of the index."""
    folder = Path(folder)
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        return Verdict([str(error)], [])
    problems = _manifest(folder, manifest) + _files(folder, manifest) + _strangers(folder, manifest)
    checked = [f"format version {FORMAT_VERSION}", f"checksums of {len(manifest.files)} files"]
    if problems:  # what is damaged cannot be read further
        return Verdict(problems, checked)
    for check in (_index, _ledger, *([partial(check_packs, workers=workers)] if deep else [])):
        try:
            problems += check(folder, manifest)
        except ValueError as error:  # the readers name the file
            problems.append(str(error))
    checked += ["index, shards and totals agree", "fingerprint", "ledger sums"]
    if deep:
        checked.append(f"every row of {manifest.totals['packs']} packs")
    return Verdict(problems, checked)


def _manifest(folder: Path, manifest: Manifest) -> list[str]:
    """What the manifest's own hash does not see: its white space, and the name of the folder that it lies in."""
    path, problems = folder / MANIFEST_NAME, []
    data = path.read_bytes()
    if data != json_bytes(json.loads(data)):
        problems.append(f"{path}: was edited or damaged (its layout changed); restore it from a copy or pack again")
    name = folder.resolve().name
    if {name, manifest.split} == set(SPLITS):
        problems.append(f"{folder}: holds the packs of {manifest.split}; give the folder that name back")
    return problems


def _files(folder: Path, manifest: Manifest) -> list[str]:
    """Missing, truncated and altered files."""

    def check(entry) -> str | None:
        path = folder / entry.name
        if not path.is_file():
            return f"{path}: missing, though the manifest lists it; restore it from a copy or pack again"
        if path.is_symlink() or not path.resolve().is_relative_to(folder.resolve()):
            return f"{path}: leads out of the folder; put the file itself there"
        if (size := path.stat().st_size) != entry.bytes:
            return f"{path}: has {size} bytes instead of {entry.bytes}; restore it from a copy or pack again"
        digest = file_digest(path)
        if digest != entry.xxh3_128:
            twin = next((e.name for e in manifest.files if e.xxh3_128 == digest), None)
            what = f"holds what belongs to {twin}" if twin else "its bytes changed"
            return f"{path}: damaged ({what}); restore it from a copy or pack again"
        return None

    with ThreadPoolExecutor(4) as pool:  # hashing and reading leave Python's lock alone
        found = [problem for problem in pool.map(check, manifest.files) if problem]
    listed = {entry.name for entry in manifest.files}
    needed = {INDEX_NAME, LEDGER_NAME}
    return found + [f"{folder / MANIFEST_NAME}: lists no {name}; pack again" for name in sorted(needed - listed)]


def _strangers(folder: Path, manifest: Manifest) -> list[str]:
    """Files that the manifest does not know."""
    listed = {entry.name for entry in manifest.files} | {MANIFEST_NAME}
    problems = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() or name in listed:
            continue
        what = "left by an interrupted run" if name.endswith(TEMPORARY_SUFFIX) else "not part of these shards"
        problems.append(f"{path}: {what}, the manifest does not list it; remove it")
    return problems


def _index(folder: Path, manifest: Manifest) -> list[str]:
    """`packs.arrow` against manifest and shards: every row of every shard exactly once, totals, fingerprint."""
    path, index = folder / INDEX_NAME, read_index(folder / INDEX_NAME)
    problems = []
    names = [entry.name for entry in manifest.files if entry.name.startswith("shards/")]
    rows = []
    for number, name in enumerate(names):
        shard = Shard(folder / name, manifest.kind)
        rows.append(len(shard))
        stated = {"capacity": manifest.capacity, "align": manifest.align, "shard": number}
        head = shard.essentials
        for key, value in stated.items():
            if key in head and head[key] != value:
                problems.append(f"{folder / name}: says {key} {head[key]}, the manifest {value}; restore it")
    expected = np.concatenate([np.arange(n) + (s << 32) for s, n in enumerate(rows)]) if rows else np.empty(0, np.int64)
    if not np.array_equal(np.sort((index.shard.astype(np.int64) << 32) + index.row), expected):
        problems.append(f"{path}: does not name every row of the shards exactly once; restore it from a copy")
    totals = {
        "packs": len(index),
        "slots": int(index.documents.sum(dtype=np.int64)),
        "tokens": int(index.tokens.sum(dtype=np.int64)),
        "target_tokens": int(index.target_tokens.sum(dtype=np.int64)),
    }
    for key, value in totals.items():
        if manifest.totals.get(key, value) != value:
            problems.append(f"{path}: sums to {value} {key}, the manifest says {manifest.totals[key]}; pack again")
    found = fingerprint(index.xxh3, kind=manifest.kind, capacity=manifest.capacity, align=manifest.align)
    if found != manifest.fingerprint:
        problems.append(f"{folder / MANIFEST_NAME}: the fingerprint is not that of packs.arrow; pack again")
    return problems


def _ledger(folder: Path, manifest: Manifest) -> list[str]:
    path = folder / LEDGER_NAME
    value = read_json(path)
    try:
        ledger = Ledger.from_json(value)
        ledger.check()
        total = value["total"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = error if isinstance(error, ValueError) else "is not a ledger; restore it from a copy or pack again"
        return [f"{path}: {what}"]
    problems = []
    kept = ledger.total()["kept"]
    if total != ledger.to_json()["total"]:
        problems.append(f"{path}: its total is not the sum of its sources; restore it from a copy")
    for unit in ("documents", "tokens"):
        if kept[unit] != manifest.totals.get(unit, kept[unit]):
            problems.append(f"{path}: keeps {kept[unit]} {unit}, the shards hold {manifest.totals[unit]}; pack again")
    return problems
