"""Which characters of a document are trained, and which tokens that makes targets.

A token is a target when at least one of its bytes is trained. Where a merge crosses the start of a turn (a content
that begins with a newline after `assistant\\n`), the crossing token is thus a target, as in transformers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(slots=True)
class Rendering:
    """A document as text, before its tokens.

    spans: character ranges that are trained, ascending and disjoint.
    controls: how many control tokens the text may have, all written by the template; more means that words of the
        record look like one, and these must stay text. None: whatever looks like a control token is one.
    literals: character ranges written by the template; None where they are not known yet (`relocate` finds them).
    around: a plain text: bos before it where the tokenizer writes one, eos behind it.
    facts: what the ledger notes of it: name → count.
    """

    text: str
    spans: Sequence[tuple[int, int]]
    controls: int | None = 0
    literals: Sequence[tuple[int, int]] | None = ()
    around: bool = False
    eos_is_target: bool = True
    facts: Mapping[str, int] = field(default_factory=dict)


def byte_spans(text: str, spans: Sequence[tuple[int, int]], size: int) -> Sequence[tuple[int, int]]:
    """Character ranges → byte ranges of the UTF-8 text, which has `size` bytes, in one pass."""
    if size == len(text):
        return spans
    if len(spans) == 1 and spans[0] == (0, len(text)):
        return [(0, size)]
    out, position, at = [], 0, 0
    for start, end in spans:
        at += len(text[position:start].encode())
        stop = at + len(text[start:end].encode())
        out.append((at, stop))
        position, at = end, stop
    return out


def target_mask(starts: np.ndarray, ends: np.ndarray, spans: Sequence[tuple[int, int]] | np.ndarray) -> np.ndarray:
    """Tokens that hold at least one byte of a span: uint8[T].

    Args:
        starts, ends: byte range of each token, int32 or int64[T], both ascending; an empty range is never a target.
        spans: byte ranges, ascending and disjoint.
    """
    bounds = np.asarray(spans, np.int64).reshape(-1, 2)
    bounds = bounds[bounds[:, 0] < bounds[:, 1]].astype(ends.dtype)  # or the search would convert all tokens
    # A span's tokens are those that end behind its start and begin before its end: a range of tokens, as both ascend.
    edges = np.empty((len(bounds), 2), np.int64)
    edges[:, 0] = np.searchsorted(ends, bounds[:, 0], side="right")
    edges[:, 1] = np.searchsorted(starts, bounds[:, 1], side="left")
    # A token may reach from one span into the next: it is counted once.
    edges[1:, 0] = np.maximum(edges[1:, 0], edges[:-1, 1])
    edges[:, 1] = np.maximum(edges[:, 1], edges[:, 0])
    runs = np.diff(edges.ravel(), prepend=0, append=len(starts))
    mask = np.repeat(np.arange(len(runs), dtype=np.uint8) & 1, runs)
    mask &= starts < ends
    return mask


def merge_spans(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Any ranges → the same characters in ascending, disjoint, non-empty ranges."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if start >= end:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def subtract_spans(spans: Sequence[tuple[int, int]], holes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The characters of `spans` that are in no hole, in ascending, disjoint ranges."""
    out = []
    holes = merge_spans(holes)
    for start, end in merge_spans(spans):
        for first, last in holes:
            if last <= start or first >= end:
                continue
            if first > start:
                out.append((start, first))
            start = max(start, last)
        if start < end:
            out.append((start, end))
    return out


def complement(ranges: Sequence[tuple[int, int]], length: int) -> list[tuple[int, int]]:
    """What ascending ranges leave of `0:length`."""
    return subtract_spans([(0, length)], ranges)
