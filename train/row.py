"""Rows of packs in owned buffers, filled from the maps in runs: what changes hands between prefetching and training."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from formats.cost import causal_pairs
from formats.dataset import PackedDataset
from formats.layout import align_up, check_thd
from formats.order import EMPTY
from formats.schema import IGNORE_INDEX
from train.attention.interface import Part, Segments
from train.cut import PER_TOKEN, Cut
from train.fill import RowPlan, fill_rows
from train.lay import choose_lay, least_tokens
from train.packs import Packs

TAIL_SEGMENT = 128
"""Longest segment of tail padding: attention costs the square of a segment."""


@dataclass(frozen=True)
class MicroBatch:
    """One row of `micro_packs` packs, T = micro_packs · capacity: `input_ids`, `position_ids` and `labels` int32[T]
    (labels already shifted, −100 where not a target), and the segments that attention must keep apart.

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


_NOWHERE = 0, 0
ANY_ID = 1 << 32
"""A vocabulary in which every id is found."""


class Run:
    """Owned buffers of several rows, filled again and again by one call of compiled code; pinned when they feed a GPU.

    `rows` are all of them, `filled` is how many of them the last `fill` completed, the first ones.
    """

    def __init__(
        self,
        dataset: PackedDataset,
        row_count: int,
        micro_packs: int,
        cut: Cut,
        *,
        pinned: bool,
        windows: tuple[int, ...] = (),
        vocab_size: int | None = None,
    ):
        manifest, index, lay = dataset.manifest, dataset.index, choose_lay(dataset, cut)
        capacity = lay.capacity
        tokens = align_up(micro_packs * capacity, cut.row_multiple)
        longest_tail = max(1, TAIL_SEGMENT // cut.multiple) * cut.multiple  # padding is cut as documents are
        # A static number of segments, so that shapes never change: the most of any pack, for every pack of the row.
        tail = capacity - least_tokens(index, lay.align)
        most = int((index.documents + -(-tail // longest_tail)).max())
        most = max(most, -(-capacity // longest_tail))
        segments = micro_packs * most + 1  # the last for the tokens that rounding adds
        lengths = {name: tokens for name in PER_TOKEN} | {"cu_seqlens": segments + 1, "seq_lens": segments}
        rows = {
            name: torch.empty((row_count, length), dtype=torch.int32, pin_memory=pinned)
            for name, length in lengths.items()
        }
        rows["step_tokens"] = torch.empty((row_count, 1), dtype=torch.int64, pin_memory=pinned)
        rest = tokens - micro_packs * capacity
        rows["input_ids"][:, tokens - rest :] = manifest.pad_id
        rows["labels"][:, tokens - rest :] = IGNORE_INDEX
        rows["position_ids"][:, tokens - rest :] = torch.arange(rest)
        self._plan = RowPlan(
            *(capacity, lay.align, lay.relaid, *cut.held(tokens)),
            *(longest_tail, manifest.pad_id, max(TAIL_SEGMENT, rest), vocab_size or ANY_ID),
        )
        self._dataset, self._windows = dataset, windows
        self._copied = torch.cuda.Event() if pinned else None
        self._targets = [rows[name].numpy() for name in lengths]
        self._step_tokens, self._max_seqlens = rows["step_tokens"].numpy(), np.empty(row_count, np.int64)
        self.rows = [
            Row({name: tensor[r] for name, tensor in rows.items()}, micro_packs, capacity, cut, self._copied)
            for r in range(row_count)
        ]
        self.filled = 0

    def fill(self, packs: list[list[int]], step_tokens: list[int], verify: bool) -> None:
        """Copy `packs` (ids for every row, `EMPTY` for none) from the maps, and derive labels, positions and segments.
        `step_tokens` are the real tokens of the steps that the rows are of.

        Raises: ValueError when a pack's hash is not the one in the index, when it is no pack, or has an id outside the
        vocabulary. The rows before it are filled.
        """
        if self._copied is not None:
            self._copied.synchronize()
        self.filled = 0
        self._step_tokens[:, 0] = step_tokens
        dataset, places = self._dataset, []
        try:
            for row in packs:
                if verify:
                    for number in row:
                        if number != EMPTY:
                            dataset.check(number)
                places.append([_NOWHERE if number == EMPTY else dataset.place(number) for number in row])
        finally:
            if places:
                self._fill(packs, np.array(places))

    def _fill(self, packs: list[list[int]], places: np.ndarray) -> None:
        wrong = fill_rows(places, self._plan, *self._targets, self._max_seqlens)
        self.filled = len(places) if wrong < 0 else wrong // len(packs[0])
        for row, max_seqlen in zip(self.rows[: self.filled], self._max_seqlens.tolist(), strict=False):
            row.complete(max_seqlen, self._windows)
        if wrong >= 0:
            self._raise(packs[self.filled][wrong % len(packs[0])])

    def _raise(self, number: int) -> None:
        """Say what is wrong with a pack that could not be read."""
        self._dataset.check(number)
        manifest = self._dataset.manifest
        check_thd(*self._dataset[number][:4], capacity=manifest.capacity, align=manifest.align)
        ids = self._dataset[number].input_ids.view(np.uint32)
        if ids.max() >= self._plan.vocabulary:
            raise ValueError(
                f"pack {number} holds the id {ids[ids >= self._plan.vocabulary][0].view(np.int32)}, and the model has "
                f"{self._plan.vocabulary} token embeddings, though the manifest says that none is above "
                f"{manifest.largest_id}; pack again with the tokenizer of this model"
            )
        raise ValueError(f"pack {number}: its documents are not those that packs.arrow counts; pack again")


class Row:
    """One row of a run in views of its `buffers`. `pairs` are the query-key pairs of its documents within each of a
    model's windows."""

    def __init__(
        self,
        buffers: dict[str, torch.Tensor],
        micro_packs: int,
        capacity: int,
        cut: Cut,
        copied: torch.cuda.Event | None,
    ):
        self._micro_packs, self._capacity, self._cut, self._copied = micro_packs, capacity, cut, copied
        self.buffers = buffers
        self._host = buffers if cut.size == 1 else buffers | cut.buffers(buffers, pinned=copied is not None)
        self._seq_lens = buffers["seq_lens"].numpy()
        self._arrays = None
        if cut.size > 1:
            self._arrays = [{name: t.numpy() for name, t in of.items()} for of in (buffers, self._host)]
        self._host_facts: dict[str, Any] = {}
        self._max_seqlen = 0
        self._on_host: MicroBatch | None = None
        self.pairs: dict[int, int] = {}

    def complete(self, max_seqlen: int, windows: tuple[int, ...]) -> None:
        """What follows from the filled buffers: this rank's part, and the pairs within `windows`."""
        if windows:
            self.pairs = {window: int(causal_pairs(self._seq_lens, window).sum()) for window in windows}
        if self._arrays is not None:
            self._host_facts = self._cut.fill(*self._arrays)
        elif max_seqlen == self._max_seqlen:
            return  # the tensors over the buffers are what they were
        self._max_seqlen = max_seqlen
        self._on_host = self._micro_batch(self._host)

    def to(self, device: torch.device) -> MicroBatch:
        """The row on `device`: the buffers themselves on CPU, copies in flight on CUDA."""
        if self._copied is None:
            return self._on_host
        tensors = {name: tensor.to(device, non_blocking=True) for name, tensor in self._host.items()}
        self._copied.record()  # again for each row: the last record stands behind the copies of all
        return self._micro_batch(tensors)

    def _micro_batch(self, tensors: dict[str, torch.Tensor]) -> MicroBatch:
        packs = Packs(tensors["seq_lens"], self._micro_packs, self._capacity, tensors["step_tokens"])
        segments = Segments(tensors["cu_seqlens"], self._max_seqlen, packs=packs)
        if self._cut.size > 1:
            keys = {name: tensors.get(name) for name in ("cu_seqlens_k", "key_rows")}
            part = Part(tensors["row_cu_seqlens"], self._max_seqlen, **keys, **self._host_facts)
            segments = replace(segments, max_seqlen=min(self._max_seqlen, len(tensors["input_ids"])), part=part)
        return MicroBatch(tensors["input_ids"], tensors["labels"], tensors["position_ids"], segments)
