"""How the slots of a pack lie on a row: as they were packed, or re-laid to the alignment that a cut needs.

Packs are built once and train on any mesh. Where a context-parallel method needs slots of a multiple that the shards
lack, every document moves into a larger slot while it is copied, and the row grows to a fixed length that holds the
largest pack. How large that is stands in `packs.arrow`: no shard is read for it.
"""

from dataclasses import dataclass

import numpy as np

from formats.dataset import PackedDataset, PackIndex
from formats.layout import align_up
from formats.schema import ALIGNMENTS
from train.cut import Cut


@dataclass(frozen=True)
class Lay:
    """A pack takes `capacity` tokens of a row; its slots are multiples of `align`, those of the shards or `relaid`."""

    capacity: int
    align: int
    relaid: bool = False

    def summary(self, packed_capacity: int, size: int) -> str:
        """What re-laying for `size` ranks costs and how to avoid it; empty where nothing is re-laid."""
        if not self.relaid:
            return ""
        growth = self.capacity / packed_capacity - 1
        if self.align in ALIGNMENTS:
            way_out = f"shards of prep pack --cp {size} (or a multiple of it) need none of it"
        else:
            way_out = "only a --cp that is a power of two finds shards that need none of it"
        return (
            f"slots re-laid to multiples of {self.align}: {packed_capacity:,} → {self.capacity:,} tokens a pack "
            f"({growth:+.1%}); {way_out}"
        )


def choose_lay(dataset: PackedDataset, cut: Cut) -> Lay:
    """The lay of all packs of `dataset` under `cut`: theirs where it serves, else slots of the cut's alignment."""
    manifest = dataset.manifest
    capacity = int(align_up(np.int64(manifest.capacity), cut.align))
    if manifest.align % cut.align == 0:
        return Lay(capacity, manifest.align)
    return Lay(max(capacity, int(_most_tokens(dataset.index, cut.align))), cut.align, relaid=True)


def least_tokens(index: PackIndex, align: int) -> np.ndarray:
    """Tokens [packs] that slots of `align` take at least: exact for the alignments that the index states."""
    return index.padded(align) if align in (1, *ALIGNMENTS) else index.tokens


def _most_tokens(index: PackIndex, align: int) -> np.int64:
    """Most tokens that slots of `align` take in any pack; where the index does not state it, an upper bound."""
    if align in ALIGNMENTS:
        return index.padded(align).max()
    return align_up((index.tokens + index.documents.astype(np.int64) * (align - 1)).max(), align)
