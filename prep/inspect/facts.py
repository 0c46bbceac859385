"""What is in a packed folder, as one JSON-compatible dictionary. Every report shows these facts and no others."""

import json
from pathlib import Path

import numpy as np

from formats.dataset import INDEX_NAME, PackIndex, read_index
from formats.manifest import MANIFEST_NAME, Manifest, read_manifest
from formats.shard import write_json
from prep.ledger import LEDGER_NAME

REPORT_NAME = "report.json"


def packed_folders(folder: Path) -> list[Path]:
    """The packed folders that `folder` stands for: itself, or its `train` and `eval`."""
    folder = Path(folder)
    splits = [folder / name for name in ("train", "eval") if (folder / name / MANIFEST_NAME).is_file()]
    return splits if splits and not (folder / MANIFEST_NAME).is_file() else [folder]


def read_facts(folder: Path) -> dict:
    """Facts of a finished packed folder. ValueError when it is none."""
    manifest = read_manifest(folder)
    return facts(manifest, read_index(Path(folder) / INDEX_NAME))


def facts(manifest: Manifest, index: PackIndex) -> dict:
    """Packing efficiency. Shares and fill are fractions; sizes are tokens unless the name says otherwise.

    Every token of a pack is exactly one of: a real token (target or not), slot padding (inside a slot, for
    alignment), tail padding (behind the last slot): `tokens + slot_padding + tail_padding = packs · capacity`.
    """
    packs = len(index)
    room = packs * manifest.capacity
    tokens = int(index.tokens.sum(dtype=np.int64))
    if manifest.align == 1:
        padded = tokens
    else:
        padded = manifest.totals["slot_tokens"]
    targets = int(index.target_tokens.sum(dtype=np.int64))
    per_pack = index.documents
    return {
        "split": manifest.split,
        "kind": manifest.kind,
        "algorithm": manifest.algorithm,
        "order": manifest.order,
        "capacity": manifest.capacity,
        "align": manifest.align,
        "cp": manifest.cp,
        "fingerprint": manifest.fingerprint,
        "documents": manifest.totals["documents"],
        "slots": int(per_pack.sum(dtype=np.int64)),
        "tokens": tokens,
        "target_tokens": targets,
        "target_share": targets / tokens,
        "packs": packs,
        "lower_bound_packs": manifest.totals["lower_bound_packs"],
        "fill": tokens / room,
        "slot_padding": padded - tokens,
        "slot_padding_share": (padded - tokens) / room,
        "tail_padding": room - padded,
        "tail_padding_share": (room - padded) / room,
        "documents_per_pack": {
            "mean": float(per_pack.mean()),
            "min": int(per_pack.min()),
            "median": float(np.median(per_pack)),
            "max": int(per_pack.max()),
        },
        "longest_document": int(index.max_seqlen.max()),
        "mean_document": tokens / int(per_pack.sum(dtype=np.int64)),
    }


def write_report(folder: Path) -> dict:
    """The facts and the ledger of a packed folder, also written to its `report.json`."""
    folder = Path(folder)
    value = {**read_facts(folder), "ledger": json.loads((folder / LEDGER_NAME).read_bytes())}
    write_json(folder / REPORT_NAME, value)
    return value
