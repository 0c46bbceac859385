"""Several folders of packs trained as one: `--shards a:0.7 --shards b:0.3`."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from formats.dataset import PackedDataset, PackIndex, ThdPack
from formats.order import Stream, shares
from formats.schema import ALIGNMENTS, PACKS_SCHEMA
from train.data import Schedule, open_shards
from train.flags import parse_shards


class Mixture:
    """Packs of several folders under one numbering, the ids of a folder after those of the one before: what the loader
    needs of a `PackedDataset`. The manifest is the first folder's, with the alignment that all of them have."""

    def __init__(self, datasets: Sequence[PackedDataset]):
        self._datasets = tuple(datasets)
        self._firsts = np.cumsum([0, *map(len, datasets)])
        manifests = [dataset.manifest for dataset in datasets]
        self.manifest = dataclasses.replace(manifests[0], align=math.gcd(*(m.align for m in manifests)))
        columns = [_columns(dataset.index) for dataset in datasets]
        self.index = PackIndex({name: np.concatenate([c[name] for c in columns]) for name in columns[0]})

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def _find(self, index: int) -> tuple[PackedDataset, int]:
        folder = int(np.searchsorted(self._firsts, index, side="right")) - 1
        return self._datasets[folder], index - int(self._firsts[folder])

    def __getitem__(self, index: int) -> ThdPack:
        dataset, own = self._find(index)
        return dataset[own]

    def place(self, index: int) -> tuple[int, int]:
        """`Shard.place` of pack `index`."""
        dataset, own = self._find(index)
        return dataset.place(own)

    def check(self, index: int) -> None:
        """Raise a ValueError that names shard and row when pack `index` is not what its folder's index says."""
        dataset, own = self._find(index)
        dataset.check(own)

    def check_files(self, part: int = 0, parts: int = 1) -> None:
        """`PackedDataset.check_files` of every folder."""
        for dataset in self._datasets:
            dataset.check_files(part, parts)


@dataclass(frozen=True)
class Training:
    """What a run trains on: its packs, in which order, and what a position in them is valid under."""

    dataset: PackedDataset | Mixture
    schedule: Schedule
    fingerprints: tuple[str, ...]
    weights: tuple[float, ...]
    summary: str
    """A line for the start of the run; empty for one folder."""


def open_training(
    values: Sequence[str], vocab_size: int | None, *, seed: int, batch_packs: int, micro_packs: int
) -> Training:
    """Open the folders of `--shards` as one training set.

    With weights an epoch has as many packs as all folders together, each folder gives its weight's share of them and
    begins anew when it is through. Without, each pack of every folder is trained once an epoch.

    Raises: ValueError for a folder that cannot be trained on, for folders of different capacity or tokenizer, and for
    a weight too small for a single pack.
    """
    folders, weights = parse_shards(values)
    datasets = [open_shards(folder, vocab_size) for folder in folders]
    fingerprints = tuple(dataset.manifest.fingerprint for dataset in datasets)
    first = datasets[0].manifest
    if len(datasets) == 1:
        schedule = Schedule(len(datasets[0]), first.order, first.block, seed, batch_packs, micro_packs)
        return Training(datasets[0], schedule, fingerprints, (1.0,), "")

    for folder, dataset in zip(folders, datasets, strict=True):
        if dataset.manifest.capacity != first.capacity:
            raise ValueError(
                f"{folder} has packs of {dataset.manifest.capacity} tokens and {folders[0]} of {first.capacity}; "
                "pack them with the same --seq-len"
            )
        if dataset.manifest.tokenizer_hash != first.tokenizer_hash:
            raise ValueError(
                f"{folder} and {folders[0]} were made with different tokenizers; encode them with the same"
            )
    sizes = [len(dataset) for dataset in datasets]
    weights = weights or sizes
    given = shares(sizes, weights)
    if 0 in given:
        raise ValueError(
            f"--shards {folders[given.index(0)]}: its weight gives it no pack in an epoch of {sum(sizes):,}; raise it "
            "or leave the folder out"
        )
    streams = tuple(
        Stream(size, dataset.manifest.order, dataset.manifest.block, share)
        for size, dataset, share in zip(sizes, datasets, given, strict=True)
    )
    summary = "; ".join(
        f"{folder} {share / sum(sizes):.1%}, {share:,} packs an epoch = {share / size:.2f} passes"
        for folder, share, size in zip(folders, given, sizes, strict=True)
    )
    normal = tuple(weight / sum(weights) for weight in weights)
    schedule = Schedule(sum(sizes), "input", 0, seed, batch_packs, micro_packs, streams)
    return Training(Mixture(datasets), schedule, fingerprints, normal, summary)


def _columns(index: PackIndex) -> dict[str, np.ndarray]:
    padded = {f"padded_{align}": index.padded(align) for align in ALIGNMENTS}
    return {name: padded[name] if name in padded else getattr(index, name) for name in PACKS_SCHEMA.names}
