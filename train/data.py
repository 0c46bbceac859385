"""From mapped shards to the rows that a rank trains: one prefetch thread, one copy, reused buffers.

Reading is memory bound, so worker processes only cost: rows of 8192 ids from a page-cached map reach 281 million
tokens/s through one thread and 6 to 38 million through DataLoader workers.
"""

import itertools
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from formats.dataset import PackedDataset
from formats.layout import align_up
from formats.manifest import Manifest, is_compressed
from formats.order import (
    EMPTY,
    Stream,
    accumulation,
    epoch_order,
    mixed_order,
    rank_positions,
    step_span,
    steps_per_epoch,
)
from train.cut import WHOLE, Cut
from train.lay import choose_lay
from train.row import MicroBatch, Run

RUN_TOKENS, RUN_ROWS = 1 << 19, 64
"""Rows change hands between the threads in runs, of at most so many tokens and rows (and no more than an epoch has):
waking the other thread costs as much as filling 100,000 tokens."""

SPAN = 64
"""Steps whose packs and facts are worked out at once: for one, numpy would take as long as for all of them."""

RUNS = 2
# One in so many ids of a tokenizer may be without an embedding, where none of them occurs.
NEVER_EMBEDDED = 1000
"""Runs of buffers: one in use, one being filled or ready, which it is long before it is needed: training a row takes
thousands of times longer than filling it."""


@dataclass(frozen=True)
class StepFacts:
    """What a step trains over *all* ranks, known from `packs.arrow` without communication. `tokens` are real tokens;
    `positions` are all that are computed, padding and empty packs included; `sum_sq` is Σ sᵢ² of real lengths."""

    epoch: int
    consumed: int
    packs: int
    tokens: int
    target_tokens: int
    positions: int
    sum_sq: int

    @property
    def padding_fraction(self) -> float:
        return 1 - self.tokens / self.positions


@dataclass(frozen=True)
class Schedule:
    """Which packs make which step: pure arithmetic over `num_packs` packs, for any number of ranks."""

    num_packs: int
    order: str
    block: int
    seed: int
    batch_packs: int
    micro_packs: int
    streams: tuple[Stream, ...] = ()
    """The folders of a mixture, whose shares add up to `num_packs`; `order` and `block` are then their own."""

    def steps(self, epochs: int) -> int:
        """Optimizer steps that `epochs` passes make; the last of an epoch may be short."""
        return epochs * steps_per_epoch(self.num_packs, self.batch_packs)

    def epoch_order(self, epoch: int) -> np.ndarray:
        if self.streams:
            return mixed_order(self.streams, self.seed, epoch)
        return epoch_order(self.num_packs, self.order, self.block, self.seed, epoch)

    def rank_packs(
        self, start: int | np.ndarray, stop: int | np.ndarray, order: np.ndarray, dp_rank: int, dp_size: int
    ) -> np.ndarray:
        """Pack ids that a rank trains in the step [start, stop) of an epoch, int64[accumulation, micro_packs], `EMPTY`
        where the rank is short of a pack; of several steps at once as `rank_positions`."""
        positions = rank_positions(start, stop, self.batch_packs, self.micro_packs, dp_rank, dp_size)
        return np.where(positions == EMPTY, EMPTY, order[positions])


def open_shards(folder: str, vocab_size: int | None = None) -> PackedDataset:
    """Open a packed folder for training.

    Raises: ValueError when it is missing, unfinished, of another version, in sequence-ID layout, compressed, or holds
    ids that a model of `vocab_size` tokens does not have.
    """
    dataset = PackedDataset(folder)
    manifest = dataset.manifest
    if manifest.kind != "thd":
        raise ValueError(
            f"{folder}: holds sequence-ID shards, the trainer reads THD; turn them with prep convert --to thd"
        )
    if is_compressed(manifest):
        raise ValueError(
            f"{folder}: holds shards compressed for shipping, which cannot be mapped; decompress them with "
            "prep convert --to thd"
        )
    if len(dataset) == 0:
        raise ValueError(f"{folder}: holds no pack")
    if vocab_size is not None:
        _check_vocabulary(folder, manifest, vocab_size)
    return dataset


def _check_vocabulary(folder: str, manifest: Manifest, vocab_size: int) -> None:
    """Refuse a model whose vocabulary is smaller than the tokenizer's, but for a few ids that never occur: the
    tokenizer of Gemma 3 1B, as published, has one for images that the model does not embed."""
    missing, largest = manifest.vocab_size - vocab_size, max(manifest.largest_id, manifest.pad_id)
    if missing * NEVER_EMBEDDED <= manifest.vocab_size and largest < vocab_size:
        return
    what = f"the id {largest}, of a tokenizer of" if largest >= vocab_size else "tokens of a tokenizer of"
    raise ValueError(
        f"the model has {vocab_size} token embeddings, but {folder} holds {what} {manifest.vocab_size}; "
        "pack with the tokenizer of this model, or take the model of that tokenizer"
    )


class PackedLoader:
    """Steps of one data-parallel rank, from `consumed` packs on; of every row the part that `cut` gives this rank.

    Use: `facts = loader.next_step()`, then `for row in loader.rows(): …` to the end, again and again; `stall_seconds`
    is how long the rows of the current step had to be waited for, `pairs` the query-key pairs within each of `windows`
    of the rows handed out in it. `close()` ends the thread. Ids that are not below `vocab_size` are refused.
    """

    def __init__(
        self,
        dataset: PackedDataset,
        schedule: Schedule,
        *,
        dp_rank: int,
        dp_size: int,
        device: torch.device,
        cut: Cut = WHOLE,
        consumed: int = 0,
        verify: bool = True,
        windows: tuple[int, ...] = (),
        vocab_size: int | None = None,
    ):
        self._dataset, self._schedule, self._verify = dataset, schedule, verify
        self._dp_rank, self._dp_size, self._device = dp_rank, dp_size, device
        self.row_count = accumulation(schedule.batch_packs, schedule.micro_packs, dp_size)
        self.row_tokens = align_up(schedule.micro_packs * choose_lay(dataset, cut).capacity, cut.row_multiple)
        self._facts = self._facts_to_come(consumed)
        self._order = (-1, np.empty(0, np.int64))
        self.stall_seconds = 0.0
        self.pairs = dict.fromkeys(windows, 0)

        run_length = max(1, min(RUN_ROWS, RUN_TOKENS // self.row_tokens, schedule.steps(1) * self.row_count))
        pinned = device.type == "cuda"
        self._free: queue.SimpleQueue[Run | None] = queue.SimpleQueue()  # the buffers bound both queues
        for _ in range(RUNS):
            of_run = {"pinned": pinned, "windows": windows, "vocab_size": vocab_size}
            self._free.put(Run(dataset, run_length, schedule.micro_packs, cut, **of_run))
        self._ready: queue.SimpleQueue[Run | BaseException] = queue.SimpleQueue()
        self._in_use: Run | None = None
        self._next_in_use = 0
        self._closed = False
        self._thread = threading.Thread(target=self._prefetch, args=(consumed,), name="prefetch", daemon=True)
        self._thread.start()

    def next_step(self) -> StepFacts:
        """Facts of the next step; its rows follow from `rows()`."""
        self.stall_seconds = 0.0
        self.pairs = dict.fromkeys(self.pairs, 0)
        return next(self._facts)

    def rows(self) -> Iterator[MicroBatch]:
        """The rows of the step that `next_step` announced, equally many on every rank.

        Raises: ValueError when a pack is damaged, or has an id outside the vocabulary.
        """
        for _ in range(self.row_count):
            if self._in_use is None or self._next_in_use == self._in_use.filled:
                self._take_run()
            row = self._in_use.rows[self._next_in_use]
            self._next_in_use += 1
            for window, pairs in row.pairs.items():
                self.pairs[window] += pairs
            yield row.to(self._device)

    def _take_run(self) -> None:
        """Give the used run back and wait for the next."""
        began = time.perf_counter()
        run = self._ready.get()
        self.stall_seconds += time.perf_counter() - began
        if isinstance(run, BaseException):
            raise run
        if self._in_use is not None:
            self._free.put(self._in_use)
        self._in_use, self._next_in_use = run, 0

    def close(self) -> None:
        """End the prefetch thread and wait for it."""
        self._closed = True
        self._free.put(None)  # wakes it when it waits for a row
        self._thread.join()

    def _epoch_order(self, epoch: int) -> np.ndarray:
        # Two threads read it, possibly for two epochs: a replaced tuple is safe where a cache changed in place is not.
        known, order = self._order
        if known != epoch:
            order = self._schedule.epoch_order(epoch)
            self._order = (epoch, order)
        return order

    def _spans(self, consumed: int) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
        """Steps from `consumed` packs on, without end and up to SPAN of one epoch at a time: the epoch, where they
        start and stop in its order (int64[n] each), the order."""
        schedule = self._schedule
        while True:
            epoch, start, _ = step_span(consumed, schedule.num_packs, schedule.batch_packs)
            ends = np.minimum(start + schedule.batch_packs * np.arange(SPAN + 1), schedule.num_packs)
            ends = ends[: np.searchsorted(ends, schedule.num_packs) + 1]
            yield epoch, ends[:-1], ends[1:], self._epoch_order(epoch)
            consumed += int(ends[-1]) - start

    def _facts_to_come(self, consumed: int) -> Iterator[StepFacts]:
        index, positions = self._dataset.index, self.row_count * self._dp_size * self.row_tokens
        for epoch, starts, stops, order in self._spans(consumed):
            packs = order[starts[0] : stops[-1]]
            columns = index.tokens, index.target_tokens, index.sum_sq
            sums = [np.add.reduceat(column[packs], starts - starts[0], dtype=np.int64).tolist() for column in columns]
            for start, stop, tokens, targets, sum_sq in zip(starts.tolist(), stops.tolist(), *sums, strict=True):
                consumed += stop - start
                yield StepFacts(epoch, consumed, stop - start, tokens, targets, positions, sum_sq)

    def _rows_to_come(self, consumed: int) -> Iterator[tuple[list[int], int]]:
        """This rank's rows from `consumed` packs on, without end: the ids of their packs, and their step's tokens."""
        for _, starts, stops, order in self._spans(consumed):
            tokens = self._dataset.index.tokens[order[starts[0] : stops[-1]]]
            of_steps = np.add.reduceat(tokens, starts - starts[0], dtype=np.int64).tolist()
            packs = self._schedule.rank_packs(starts, stops, order, self._dp_rank, self._dp_size).tolist()
            for rows, step_tokens in zip(packs, of_steps, strict=True):
                for row in rows:
                    yield row, step_tokens

    def _prefetch(self, consumed: int) -> None:
        run = None
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)  # a new thread stands on the first GPU, and would open it for all
            rows = self._rows_to_come(consumed)
            while (run := self._free.get()) is not None and not self._closed:
                run.filled = 0
                run.fill(*zip(*itertools.islice(rows, len(run.rows)), strict=True), self._verify)
                self._ready.put(run)
        except BaseException as error:  # handed to the thread that trains, after the rows before it
            if run is not None and run.filled:
                self._ready.put(run)
            self._ready.put(error)
