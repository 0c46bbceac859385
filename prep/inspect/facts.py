"""What is in a packed folder, as one JSON-compatible dictionary. Every report shows these facts and no others."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from formats.dataset import PackedDataset, PackIndex
from formats.manifest import MANIFEST_NAME, Manifest, is_compressed, read_manifest
from formats.order import permutation
from formats.schema import ALIGNMENTS, MAX_CAPACITY
from prep.inspect.documents import Slots, read_slots
from prep.inspect.whatif import LLAMA_8B, stragglers, table

WHATIF_ALGORITHMS = ("greedy", "ffd", "bfd")
WHATIF_CP = (1, 2, 4, 8)
WHATIF_DOCUMENTS = 1_000_000
"""Documents that the what-if table of a report plans at most (every k-th one of larger sets)."""
FILL_BINS = 50
SPLITS = ("train", "eval")
SAMPLE_PACKS = 12


def packed_folders(folder: Path) -> list[Path]:
    """The packed folders that `folder` stands for: itself, or its `train` and `eval`. A part that lost its manifest,
    or is gone beside the other, is named all the same: whoever opens it says what is wrong."""
    folder = Path(folder)
    parts = [folder / name for name in SPLITS]
    there = [part for part in parts if part.is_dir()]
    if (folder / MANIFEST_NAME).is_file() or not there:
        return [folder]
    return parts if any(_split(part) in SPLITS for part in there) else there


def _split(folder: Path) -> str | None:
    try:
        return read_manifest(folder).split
    except ValueError:
        return None


def facts(dataset: PackedDataset) -> dict:
    """Everything a report shows of the packs. Shares and fill are fractions; sizes are tokens unless the name says
    otherwise.

    Every token of a pack is exactly one of: a real token (target or not), slot padding (inside a slot, for
    alignment), tail padding (behind the last slot): `tokens + slot_padding + tail_padding = packs · capacity`.
    """
    slots = read_slots(dataset)
    return {
        **efficiency(dataset.manifest, dataset.index),
        "balance": _balance(dataset.manifest, dataset.index),
        "sources": _sources(dataset.manifest, slots),
        "histograms": _histograms(dataset.manifest, dataset.index, slots),
        "samples": _samples(slots, len(dataset.index)),
        "whatif": _whatif(dataset.manifest, slots),
    }


def efficiency(manifest: Manifest, index: PackIndex) -> dict:
    """The headline figures, from the manifest and `packs.arrow` alone."""
    packs = len(index)
    room = packs * manifest.capacity
    tokens = int(index.tokens.sum(dtype=np.int64))
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
        "realigned": {str(a): int(index.padded(a).sum(dtype=np.int64)) - tokens for a in ALIGNMENTS},
        "bytes_on_disk": sum(entry.bytes for entry in manifest.files if entry.name.startswith("shards/")),
        "compressed": is_compressed(manifest),
    }


def _balance(manifest: Manifest, index: PackIndex) -> dict:
    """Cost of the packs relative to their mean and the straggler by data-parallel width, for packs in random order and
    as they lie, with the attention of an 8B model."""
    cost = LLAMA_8B.pack_cost()
    sum_sq = np.asarray(index.sum_sq)
    random = sum_sq[permutation(len(sum_sq), manifest.seed, 2)]
    before = stragglers(random, manifest.capacity, cost)
    after = stragglers(sum_sq, manifest.capacity, cost)
    costs = cost.of(manifest.capacity, sum_sq)
    points = np.linspace(0, len(sum_sq) - 1, min(len(sum_sq), 200)).astype(int)
    return {
        "model": "8B (the shape of Llama 3)",
        "widths": list(after),
        "straggler_random": list(before.values()),
        "straggler": list(after.values()),
        "block": manifest.block,
        "cost_in_order": [float(costs[i] / costs.mean()) for i in points],
        "cost_random": [float(c) for c in cost.of(manifest.capacity, random)[points] / costs.mean()],
        "cost_max_over_mean": float(costs.max() / costs.mean()),
    }


def _sources(manifest: Manifest, slots: Slots) -> list[dict]:
    """Documents, tokens and share of the tokens of every source."""
    rows, tokens = slots.documents()
    total, table_ = int(tokens.sum()), []
    for source in manifest.sources:
        low, high = np.searchsorted(rows, [source.first_row, source.last_row])
        own = int(tokens[low:high].sum())
        table_.append({"name": source.name, "documents": int(high - low), "tokens": own, "share": own / total})
    return table_


def _histograms(manifest: Manifest, index: PackIndex, slots: Slots) -> dict:
    """Counts for the pictures: documents by length (powers of √2), packs by fill, packs by number of documents."""
    _, lengths = slots.documents()
    edges = np.unique(np.ceil(2 ** (np.arange(0, 2 * 25) / 2)).astype(np.int64))
    edges = edges[: np.searchsorted(edges, max(int(lengths.max()), manifest.capacity), side="right") + 1]
    fill = np.minimum(np.asarray(index.tokens, np.int64) * FILL_BINS // manifest.capacity, FILL_BINS - 1)
    per_pack = np.asarray(index.documents)
    width = max(1, -(-int(per_pack.max() - per_pack.min() + 1) // 40))
    low = int(per_pack.min())
    count = (int(per_pack.max()) - low) // width + 1
    return {
        "length": {"edges": edges.tolist(), "documents": np.histogram(lengths, edges)[0].tolist()},
        "fill": {
            "edges": [i / FILL_BINS for i in range(FILL_BINS + 1)],
            "packs": np.bincount(fill, minlength=FILL_BINS).tolist(),
        },
        "documents_per_pack": {
            "first": low,
            "width": width,
            "packs": np.bincount((per_pack - low) // width, minlength=count).tolist(),
        },
    }


def _samples(slots: Slots, packs: int) -> list[dict]:
    """The documents' lengths in some packs, spread evenly over the order."""
    chosen = np.unique(np.linspace(0, packs - 1, min(packs, SAMPLE_PACKS)).astype(int))
    bounds = np.searchsorted(slots.packs, np.stack([chosen, chosen + 1]))
    return [
        {"pack": int(n), "lengths": slots.lengths[low:high].tolist(), "documents": slots.docs[low:high].tolist()}
        for n, low, high in zip(chosen, *bounds, strict=True)
    ]


def _whatif(manifest: Manifest, slots: Slots) -> Mapping:
    """The table of other options for the documents that are packed, pieces put together again."""
    _, lengths = slots.documents()
    every = -(-len(lengths) // WHATIF_DOCUMENTS)
    capacities = [
        c for c in (manifest.capacity // 2, manifest.capacity, manifest.capacity * 2) if 2 <= c <= MAX_CAPACITY
    ]
    rows = table(lengths[::every].astype(np.int32), WHATIF_ALGORITHMS, capacities, WHATIF_CP)
    return {"documents": len(lengths[::every]), "of": len(lengths), "rows": [row._asdict() for row in rows]}
