"""Index arithmetic of packed rows: slots, positions, labels, and the slices of a context-parallel rank.

A row is a run of slots. Slot i holds one document of `seq_lens[i]` real tokens, padded at its end to
`seq_lens_padded[i]` (called `slots` here). Everything is plain numpy and pure.
"""

import numpy as np

from formats.schema import IGNORE_INDEX


def slot_alignment(cp: int) -> int:
    """Alignment of slots for `cp` context-parallel ranks: a causal document is cut into 2·cp equal chunks of
    which rank r takes chunks r and 2·cp−1−r, so every rank does the same work. One rank needs no alignment."""
    return 1 if cp == 1 else 2 * cp


def align_up(lengths: np.ndarray, align: int) -> np.ndarray:
    """Round each length up to a multiple of `align`, keeping the dtype."""
    if align == 1:
        return lengths
    return (lengths + (align - 1)) // align * align


def cu_seqlens(lengths: np.ndarray) -> np.ndarray:
    """Cumulative sequence lengths, int32[S + 1], starting at 0: segment i is [cu[i], cu[i+1])."""
    out = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=out[1:])
    return out


def position_ids(slots: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Positions that restart at 0 in every slot, int32[Σ slots] (or written into `out`)."""
    cu = cu_seqlens(slots)
    if out is None:
        out = np.empty(cu[-1], np.int32)
    np.subtract(np.arange(cu[-1], dtype=np.int32), np.repeat(cu[:-1], slots), out=out)
    return out


def shift_labels(input_ids: np.ndarray, loss_mask: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Labels for next-token prediction, already shifted: `labels[t]` is `input_ids[t+1]` where token t+1 is a
    target, else `IGNORE_INDEX`.

    Works on a whole row at once, before any slicing over context-parallel ranks, because in a valid row neither
    padding nor the first token of a document is ever a target: no label can cross a document boundary.

    Args:
        input_ids: int32[T]. loss_mask: uint8[T], 1 where the token is a target.
        out: optional integer array [T], e.g. the int64 a loss wants; int32[T] is made otherwise.
    """
    if out is None:
        out = np.empty(len(input_ids), np.int32)
    out[-1:] = IGNORE_INDEX
    out[:-1] = IGNORE_INDEX
    np.copyto(out[:-1], input_ids[1:], where=loss_mask[1:].view(bool))
    return out


def sequence_ids(seq_lens: np.ndarray, slots: np.ndarray, length: int) -> np.ndarray:
    """int32[length]: 1, 2, 3 … per document over its real tokens, 0 on padding inside slots and at the tail."""
    out = np.zeros(length, np.int32)
    starts = cu_seqlens(slots)[:-1]
    for i, (start, n) in enumerate(zip(starts.tolist(), seq_lens.tolist(), strict=True)):
        out[start : start + n] = i + 1
    return out


def tail_segments(length: int, max_segment: int) -> np.ndarray:
    """Cut `length` tokens of tail padding into segments of at most `max_segment`, int32.

    Tail padding is attended like any segment; one long segment would cost its square.
    """
    full, rest = divmod(length, max_segment)
    return np.array([max_segment] * full + [rest] * (rest > 0), np.int32)


def contiguous_slice(length: int, cp: int, cp_rank: int) -> slice:
    """The run of a row that context-parallel rank `cp_rank` of `cp` holds when the *pack* is cut."""
    if length % cp:
        raise ValueError(f"a row of {length} tokens cannot be cut into {cp} equal parts; round it up to a multiple")
    part = length // cp
    return slice(cp_rank * part, (cp_rank + 1) * part)


def zigzag_indices(slots: np.ndarray, cp: int, cp_rank: int) -> np.ndarray:
    """Positions of a row that rank `cp_rank` of `cp` holds when every *document* is cut zigzag, int64[Σ slots / cp].

    Each slot is cut into 2·cp chunks; the rank takes chunk `cp_rank` and chunk 2·cp−1−`cp_rank`, in this order,
    which balances causal attention (the layout of ring attention in Megatron-LM and Transformer Engine).
    """
    slots = np.asarray(slots, np.int64)
    if cp == 1:
        return np.arange(slots.sum())
    if (bad := np.flatnonzero(slots % (2 * cp))).size:
        raise ValueError(
            f"slot {bad[0]} of {slots[bad[0]]} tokens is not a multiple of {2 * cp}; "
            f"pack with --cp {cp} (or a multiple)"
        )
    chunk = slots // (2 * cp)
    starts = np.cumsum(slots) - slots
    first = np.stack([starts + cp_rank * chunk, starts + (2 * cp - 1 - cp_rank) * chunk], axis=1).ravel()
    sizes = np.repeat(chunk, 2)
    offsets = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.repeat(first, sizes) + offsets


def thd_to_seqid(
    input_ids: np.ndarray,
    loss_mask: np.ndarray,
    seq_lens: np.ndarray,
    slots: np.ndarray,
    *,
    capacity: int,
    pad_id: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A THD row as a sequence-ID row: `(input_ids, attention_mask, position_ids, labels)`, all int32[capacity].

    `labels` follow Hugging Face (unshifted, `IGNORE_INDEX` where not trained). Slots stay where they are; positions
    restart per document and at every run of padding. `seqid_to_thd` is the exact inverse.
    """
    used = len(input_ids)
    ids = np.full(capacity, pad_id, np.int32)
    ids[:used] = input_ids
    labels = np.full(capacity, IGNORE_INDEX, np.int32)
    np.copyto(labels[:used], input_ids, where=loss_mask.view(bool))
    runs = np.stack([seq_lens, slots - seq_lens], axis=1).ravel()
    runs = np.append(runs, capacity - used)
    # The last slot's padding and the tail are one run of padding: nothing marks a boundary between them.
    runs[-2:] = 0, runs[-2:].sum()
    return ids, sequence_ids(seq_lens, slots, capacity), position_ids(runs), labels


def seqid_to_thd(
    input_ids: np.ndarray, attention_mask: np.ndarray, labels: np.ndarray, *, align: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A sequence-ID row as a THD row `(input_ids, loss_mask, seq_lens, seq_lens_padded)` with slots of `align`."""
    count = int(attention_mask.max(initial=0))
    seq_lens = np.bincount(attention_mask, minlength=count + 1)[1:].astype(np.int32)
    slots = align_up(seq_lens, align)
    used = int(slots.sum())
    expected = sequence_ids(seq_lens, slots, len(attention_mask)) if used <= len(attention_mask) else None
    if expected is None or not np.array_equal(expected, attention_mask):
        raise ValueError(f"attention_mask does not number documents 1, 2, 3 … in slots aligned to {align}")
    return input_ids[:used], (labels[:used] != IGNORE_INDEX).astype(np.uint8), seq_lens, slots


def check_thd(
    input_ids: np.ndarray, loss_mask: np.ndarray, seq_lens: np.ndarray, slots: np.ndarray, *, capacity: int, align: int
) -> None:
    """Raise a ValueError that names the first broken invariant of a THD row, or return.

    0 < seq_lens ≤ seq_lens_padded; slots % align = 0; Σ slots = len(input_ids) = len(loss_mask) ≤ capacity; padding
    and first tokens are never targets.
    """
    if len(seq_lens) == 0 or len(seq_lens) != len(slots):
        raise ValueError(f"{len(seq_lens)} seq_lens and {len(slots)} seq_lens_padded (need equally many, at least one)")
    if (bad := np.flatnonzero((seq_lens <= 0) | (seq_lens > slots))).size:
        i = int(bad[0])
        raise ValueError(f"slot {i}: {seq_lens[i]} tokens in a slot of {slots[i]}")
    if (bad := np.flatnonzero(slots % align)).size:
        raise ValueError(f"slot {bad[0]}: {slots[bad[0]]} tokens are not a multiple of align {align}")
    used = int(slots.sum(dtype=np.int64))
    if used != len(input_ids) or used != len(loss_mask):
        raise ValueError(f"slots sum to {used}, but there are {len(input_ids)} ids and {len(loss_mask)} mask values")
    if used > capacity:
        raise ValueError(f"{used} tokens are more than the capacity {capacity}")
    if loss_mask.max() > 1:
        raise ValueError("loss_mask holds a value other than 0 and 1")
    starts = cu_seqlens(slots)[:-1]
    if (bad := np.flatnonzero(loss_mask[starts])).size:
        raise ValueError(f"slot {bad[0]}: the first token of a document is a target")
    real = np.cumsum(loss_mask, dtype=np.int64)
    at_end = real[starts + slots - 1] - real[starts + seq_lens - 1]
    if (bad := np.flatnonzero(at_end)).size:
        raise ValueError(f"slot {bad[0]}: padding is a target")
