"""One row of packs in owned buffers: copied from the maps and completed in a single pass.

Every token is read once and written with its label and position, 17 bytes of traffic for 5 that are stored, so the pass
runs at the speed of memory. numpy needs nine passes for the same (labels through a mask, positions through repeat and
subtract) and is six times slower; numba also leaves the interpreter free for the thread that trains.
"""

from dataclasses import dataclass, replace
from typing import Any

import numba
import numpy as np
import torch

from formats.cost import causal_pairs
from formats.dataset import PackedDataset
from formats.layout import align_up
from formats.order import EMPTY
from formats.schema import IGNORE_INDEX
from formats.shard import pack_digest
from train.attention.interface import Part, Segments
from train.cut import Cut
from train.lay import choose_lay, least_tokens
from train.packs import Packs

TAIL_SEGMENT = 128
"""Longest segment of tail padding: attention costs the square of a segment."""


@dataclass(frozen=True)
class MicroBatch:
    """One row of `micro_packs` packs, T = micro_packs · capacity: `input_ids`, `position_ids` int32[T], `labels`
    int64[T] (already shifted, −100 where not a target), and the segments that attention must keep apart.

    Pack k of the row stands at k · capacity: its slots (re-laid where the cut needs it, see `train.lay`, which then
    makes the capacity larger), then its tail padding in segments of its own. T is rounded up to what can be cut, and a
    context-parallel rank gets its part of the row (`train.cut`). The tensors lie in buffers of the loader and are valid
    until the next row is taken.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    segments: Segments

    def clone(self) -> "MicroBatch":
        """The same row in tensors of its own."""
        return _cloned(self)


def _cloned(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, MicroBatch | Segments | Part | Packs):  # what else a row says is made anew for each
        return replace(value, **{name: _cloned(part) for name, part in vars(value).items()})
    return value


@numba.njit(nogil=True, cache=True)
def _fill_pack(
    ids, mask, slots, first, capacity, pad_id, longest_tail, out_ids, out_labels, out_positions, cu_seqlens, segments
):
    """Write one pack at `first` of a row that has `segments` segments so far; returns their new number.

    The formulas are those of `formats.layout` (shift_labels, position_ids, tail_segments), fused. A label looks one
    token ahead and may do so across slots: the first token of a document is never a target.
    """
    # Slices taken first: their indices cannot be negative, which lets the loops become vector instructions.
    used = len(ids)
    row_ids, row_labels = out_ids[first : first + capacity], out_labels[first : first + capacity]
    row_positions = out_positions[first : first + capacity]
    row_ids[:used] = ids
    row_ids[used:] = pad_id
    if used > 0:
        next_ids, next_mask, labels = ids[1:], mask[1:], row_labels[: used - 1]
        for t in range(used - 1):
            labels[t] = next_ids[t] if next_mask[t] else IGNORE_INDEX
    row_labels[max(used - 1, 0) :] = IGNORE_INDEX
    start = 0
    for slot in slots:
        positions = row_positions[start : start + slot]
        for t in range(slot):
            positions[t] = t
        start += slot
        segments += 1
        cu_seqlens[segments] = first + start
    return _fill_tail(start, first, capacity, longest_tail, row_positions, cu_seqlens, segments)


@numba.njit(nogil=True, cache=True)
def _fill_pack_relaid(
    ids,
    mask,
    lens,
    slots,
    align,
    first,
    capacity,
    pad_id,
    longest_tail,
    out_ids,
    out_labels,
    out_positions,
    cu_seqlens,
    segments,
):
    """`_fill_pack`, with every document of `lens` real tokens moved from its slot into one of a multiple of `align`."""
    row_ids, row_labels = out_ids[first : first + capacity], out_labels[first : first + capacity]
    row_positions = out_positions[first : first + capacity]
    source = start = 0
    for length, slot in zip(lens, slots):  # noqa: B905 (numba knows no strict)
        room = (length + align - 1) // align * align
        row_ids[start : start + length] = ids[source : source + length]
        row_ids[start + length : start + room] = pad_id
        labels, next_ids = row_labels[start : start + room], ids[source + 1 : source + length]
        next_mask, positions = mask[source + 1 : source + length], row_positions[start : start + room]
        for t in range(length - 1):
            labels[t] = next_ids[t] if next_mask[t] else IGNORE_INDEX
        labels[length - 1 :] = IGNORE_INDEX
        for t in range(room):
            positions[t] = t
        source += slot
        start += room
        segments += 1
        cu_seqlens[segments] = first + start
    row_ids[start:] = pad_id
    row_labels[start:] = IGNORE_INDEX
    return _fill_tail(start, first, capacity, longest_tail, row_positions, cu_seqlens, segments)


@numba.njit(nogil=True, cache=True)
def _fill_tail(start, first, capacity, longest_tail, row_positions, cu_seqlens, segments):
    """Positions and segments of the padding from `start` of a pack on; returns the number of segments."""
    while start < capacity:
        tail = min(longest_tail, capacity - start)
        positions = row_positions[start : start + tail]
        for t in range(tail):
            positions[t] = t
        start += tail
        segments += 1
        cu_seqlens[segments] = first + start
    return segments


_NO_IDS, _NO_MASK = np.empty(0, np.int32), np.empty(0, np.uint8)
for _array in (_NO_IDS, _NO_MASK):
    _array.flags.writeable = False  # as the views of a pack are: the kernel is compiled for them


class Row:
    """Owned buffers of one row, filled again and again; pinned when they feed a GPU.

    `pairs` are the query-key pairs of the row's documents within each of `windows`.
    """

    def __init__(
        self, dataset: PackedDataset, micro_packs: int, cut: Cut, *, pinned: bool, windows: tuple[int, ...] = ()
    ):
        self.pairs = dict.fromkeys(windows, 0)
        manifest, index = dataset.manifest, dataset.index
        self._lay = choose_lay(dataset, cut)
        capacity, align = self._lay.capacity, self._lay.align
        self._dataset, self._capacity, self._pad_id = dataset, capacity, manifest.pad_id
        self._digests, self._longest = index.xxh3, index.max_seqlen
        self._cut, self._host_facts = cut, {}
        tokens = align_up(micro_packs * capacity, cut.row_multiple)
        self._longest_tail = max(1, TAIL_SEGMENT // cut.multiple) * cut.multiple  # padding is cut as documents are
        # A static number of segments, so that shapes never change: the most of any pack, for every pack of the row.
        tail = capacity - least_tokens(index, align)
        most = int((index.documents + -(-tail // self._longest_tail)).max())
        most = max(most, -(-capacity // self._longest_tail))
        self._most_segments = micro_packs * most + 1  # the last for the tokens that rounding adds
        row = {
            "input_ids": torch.empty(tokens, dtype=torch.int32, pin_memory=pinned),
            "labels": torch.empty(tokens, dtype=torch.int64, pin_memory=pinned),
            "position_ids": torch.empty(tokens, dtype=torch.int32, pin_memory=pinned),
            "cu_seqlens": torch.empty(self._most_segments + 1, dtype=torch.int32, pin_memory=pinned),
        }
        rest = tokens - micro_packs * capacity
        self._shortest_max = max(TAIL_SEGMENT, rest)
        row["input_ids"][tokens - rest :] = manifest.pad_id
        row["labels"][tokens - rest :] = IGNORE_INDEX
        row["position_ids"][tokens - rest :] = torch.arange(rest)
        self._arrays = {name: tensor.numpy() for name, tensor in row.items()}
        self._host = row if cut.size == 1 else cut.buffers(row, pinned=pinned)
        self._host = self._host | {"seq_lens": torch.empty(self._most_segments, dtype=torch.int32, pin_memory=pinned)}
        self._micro_packs = micro_packs
        self._part = {name: tensor.numpy() for name, tensor in self._host.items()}
        self._max_seqlen = 0
        self._copied: torch.cuda.Event | None = None

    def fill(self, packs: np.ndarray, verify: bool) -> None:
        """Copy `packs` (ids, `EMPTY` for none) into the row and derive labels, positions and segments.

        Raises: ValueError when a pack's hash is not the one in the index.
        """
        if self._copied is not None:
            self._copied.synchronize()
        arrays, capacity = self._arrays, self._capacity
        cu_seqlens = arrays["cu_seqlens"]
        targets = (arrays["input_ids"], arrays["labels"], arrays["position_ids"], cu_seqlens)
        constants = self._pad_id, self._longest_tail
        cu_seqlens[0] = 0
        segments, longest = 0, self._shortest_max
        seq_lens = self._part["seq_lens"]
        seq_lens[:] = 0  # in padding
        self.pairs = dict.fromkeys(self.pairs, 0)
        for k, number in enumerate(packs.tolist()):
            ids, mask, lens, slots = _NO_IDS, _NO_MASK, _NO_IDS, _NO_IDS
            if number != EMPTY:
                pack = self._dataset[number]
                if verify and pack_digest(pack) != self._digests[number]:
                    self._dataset.check(number)  # raises, naming shard and row
                ids, mask, lens, slots = pack.input_ids, pack.loss_mask, pack.seq_lens, pack.seq_lens_padded
                longest = max(longest, int(self._longest[number]))
                seq_lens[segments : segments + len(pack.seq_lens)] = pack.seq_lens
                for window in self.pairs:
                    self.pairs[window] += int(causal_pairs(pack.seq_lens, window).sum())
            where = k * capacity, capacity
            if self._lay.relaid:
                docs = lens, slots, self._lay.align
                segments = _fill_pack_relaid(ids, mask, *docs, *where, *constants, *targets, segments)
            else:
                segments = _fill_pack(ids, mask, slots, *where, *constants, *targets, segments)
        tokens = len(arrays["input_ids"])
        cu_seqlens[segments + 1 :] = tokens
        aligned = int(align_up(np.int64(longest), self._lay.align))
        self._max_seqlen = min(tokens, 1 << (aligned - 1).bit_length())
        if self._cut.size > 1:
            self._host_facts = self._cut.fill(arrays, self._part)

    def to(self, device: torch.device, step_tokens: int) -> MicroBatch:
        """The row on `device`: the buffers themselves on CPU, copies in flight on CUDA. `step_tokens` are the real
        tokens of the step that it is a row of."""
        tensors = self._host
        if device.type == "cuda":
            tensors = {name: tensor.to(device, non_blocking=True) for name, tensor in self._host.items()}
            self._copied = torch.cuda.Event()
            self._copied.record()
        packs = Packs(tensors["seq_lens"], self._micro_packs, self._capacity, step_tokens)
        segments = Segments(tensors["cu_seqlens"], self._max_seqlen, packs=packs)
        if self._cut.size > 1:
            keys = {name: tensors.get(name) for name in ("cu_seqlens_k", "key_rows")}
            part = Part(tensors["row_cu_seqlens"], self._max_seqlen, **keys, **self._host_facts)
            segments = replace(segments, max_seqlen=min(self._max_seqlen, len(tensors["input_ids"])), part=part)
        return MicroBatch(tensors["input_ids"], tensors["labels"], tensors["position_ids"], segments)
