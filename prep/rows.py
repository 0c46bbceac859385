"""Kernels that lay packs out from the store: the only loops over every token of a run.

Documents of a pack lie anywhere in the store, so the kernels read through the addresses of the mapped buffers: one call
gathers a whole record batch, and what a token costs is the copy. The batch is small enough for the cache, so hashing
and writing it afterwards read no memory.
"""

from typing import NamedTuple

import numpy as np
from numba import carray, njit
from numba.core import types
from numba.extending import intrinsic

from formats.schema import IGNORE_INDEX
from prep.encode.store import DocumentStore


class Buffers(NamedTuple):
    """Where the record batches of a store lie in memory: addresses uint64[B] of ids (int32), masks (uint8) and offsets
    (int32), and `starts` int64[B + 1], the first stored row of each. Valid while the store is open."""

    ids: np.ndarray
    masks: np.ndarray
    offsets: np.ndarray
    starts: np.ndarray


def buffers(store: DocumentStore) -> Buffers:
    """The addresses of an open store's buffers."""
    columns = [np.array([b[c].ctypes.data for b in store.batches], np.uint64) for c in range(3)]
    return Buffers(*columns, store.starts)


@intrinsic
def _pointer(typing, address):  # numba passes its typing context
    def cast(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(address), cast


@njit(cache=True, nogil=True)
def locate(id_at, mask_at, offsets_at, starts, doc, start, length):
    """Where the tokens of every slot lie: (addresses of its ids, of its mask, uint64[S]; slots that reach beyond their
    document). See `gather`; all look-ups first, since a core then has several reads of memory under way at a time."""
    ids_from, mask_from, beyond = np.empty(doc.size, np.uint64), np.empty(doc.size, np.uint64), 0
    for i in range(doc.size):
        b = np.searchsorted(starts, doc[i], side="right") - 1
        row = doc[i] - starts[b]
        bounds = carray(_pointer(offsets_at[b]), (row + 2,), np.int32)
        first = np.int64(bounds[row]) + start[i]
        beyond += first + length[i] > bounds[row + 1]
        ids_from[i] = id_at[b] + np.uint64(4 * first)
        mask_from[i] = mask_at[b] + np.uint64(first)
    return ids_from, mask_from, beyond


@njit(cache=True, nogil=True)
def gather(ids_from, mask_from, length, slot_starts, offsets, pad_id, ids, mask, targets):
    """Copy packs from the store into `ids` int32[T], `mask` uint8[T], T = slot_starts[-1].

    Slot i holds the length[i] tokens that `locate` found, from slot_starts[i] on, padded with `pad_id` up to
    slot_starts[i + 1] (int64[S + 1]); its first token is never a target. Pack n is slots offsets[n] … offsets[n + 1];
    its targets are counted into `targets` int32[N]. Returns (lowest id, highest id, all mask values or-ed), which tell
    a damaged store.
    """
    low, high, bits = np.int32(2147483647), np.int32(-2147483648), np.uint8(0)
    for n in range(offsets.size - 1):
        for i in range(offsets[n], offsets[n + 1]):
            real = np.int64(length[i])
            document = carray(_pointer(ids_from[i]), (real,), np.int32)
            document_mask = carray(_pointer(mask_from[i]), (real,), np.uint8)
            slot = ids[slot_starts[i] : slot_starts[i + 1]]
            slot_mask = mask[slot_starts[i] : slot_starts[i + 1]]
            for t in range(real):
                slot[t] = document[t]
            for t in range(real):
                slot_mask[t] = document_mask[t]
            # A later piece of a cut document begins without its context: like any first token it is never a target.
            slot_mask[0] = 0
            for t in range(real, slot.size):
                slot[t] = pad_id
                slot_mask[t] = 0
        pack_ids = ids[slot_starts[offsets[n]] : slot_starts[offsets[n + 1]]]
        pack_mask = mask[slot_starts[offsets[n]] : slot_starts[offsets[n + 1]]]
        for t in range(pack_ids.size):
            low = min(low, pack_ids[t])
            high = max(high, pack_ids[t])
        count = np.int32(0)
        for t in range(pack_mask.size):
            bits |= pack_mask[t]
            count += pack_mask[t]
        targets[n] = count
    return low, high, bits


@njit(cache=True, nogil=True)
def sequence_rows(ids, mask, length, slot_starts, offsets, pad_id, capacity, out_ids, numbers, positions, labels):
    """THD slots (as `gather` left them) as sequence-ID rows: pack n at [n · capacity, (n + 1) · capacity) of the four
    int32 columns. Gives what `formats.layout.thd_to_seqid` gives for every pack."""
    for n in range(offsets.size - 1):
        row = n * capacity
        begin = slot_starts[offsets[n]]
        end = begin
        for i in range(offsets[n], offsets[n + 1]):
            at, end = slot_starts[i], slot_starts[i + 1]
            to, real = row + at - begin, np.int64(length[i])
            for t in range(end - at):
                out_ids[to + t] = ids[at + t]
                labels[to + t] = ids[at + t] if mask[at + t] else IGNORE_INDEX
            for t in range(real):
                numbers[to + t] = i - offsets[n] + 1
                positions[to + t] = t
            for t in range(real, end - at):
                numbers[to + t] = 0
                positions[to + t] = t - real
        # The last slot's padding and the tail are one run of padding.
        last = offsets[n + 1] - 1
        padding = slot_starts[last + 1] - slot_starts[last] - length[last]
        for t in range(end - begin, capacity):
            out_ids[row + t] = pad_id
            labels[row + t] = IGNORE_INDEX
            numbers[row + t] = 0
            positions[row + t] = t - (end - begin) + padding
