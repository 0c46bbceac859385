"""Packs as every converter sees them: THD rows, whatever the kind of the folder."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from formats.dataset import PackedDataset, SeqIdPack
from formats.layout import position_ids, seqid_to_thd
from formats.manifest import Manifest


class Row(NamedTuple):
    """A THD row with its documents: `input_ids` int32[T], `loss_mask` uint8[T], `seq_lens`, `slots` int32[S]."""

    input_ids: np.ndarray
    loss_mask: np.ndarray
    seq_lens: np.ndarray
    slots: np.ndarray
    doc_ids: np.ndarray
    doc_offsets: np.ndarray

    def without_padding(self) -> tuple[np.ndarray, np.ndarray]:
        """(input_ids, loss_mask) of the real tokens alone, one document after the other."""
        if np.array_equal(self.seq_lens, self.slots):
            return self.input_ids, self.loss_mask
        real = position_ids(self.slots) < np.repeat(self.seq_lens, self.slots)
        return self.input_ids[real], self.loss_mask[real]


def rows(dataset: PackedDataset) -> Iterator[Row]:
    """All packs in training order, each compared with its hash. ValueError names a damaged one."""
    for n in range(len(dataset)):
        dataset.check(n)
        yield as_row(dataset[n], dataset.manifest)


def as_row(columns: tuple[np.ndarray, ...], manifest: Manifest) -> Row:
    """The columns of a pack of either kind as a THD row."""
    if manifest.kind == "thd":
        return Row(*columns)
    pack = SeqIdPack(*columns)
    thd = seqid_to_thd(pack.input_ids, pack.attention_mask, pack.labels, align=manifest.align)
    return Row(*thd, pack.doc_ids, pack.doc_offsets)
