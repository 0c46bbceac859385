"""Cutting documents, apart from packing: a cut document lies in several bins.

`cut` cuts only what is over the capacity ("Fewer Truncations Improve Language Modeling", Ding et al., arXiv
2404.10830); any algorithm then packs the pieces. `cut_stream` is classic pretraining: everything in one stream, cut
at every capacity, so every bin but the last is full and most contexts are truncated somewhere.
"""

import numpy as np

from prep.packing.lengths import as_integers, positive


def cut(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pieces of at most `capacity` tokens: (doc int64[P], start int64[P], length int32[P]).

    In order of document and start. Every piece but a document's last is exactly `capacity` long, so a document of
    ⌈length / capacity⌉ pieces has the fewest possible. A length of 0 gives no piece; a negative one is a ValueError.
    """
    x, capacity = _checked(lengths, capacity)
    pieces = -(-x // capacity)
    doc = np.repeat(np.arange(x.size, dtype=np.int64), pieces)
    first_piece = np.cumsum(pieces) - pieces
    start = (np.arange(doc.size, dtype=np.int64) - first_piece[doc]) * capacity
    return doc, start, np.minimum(x[doc] - start, capacity).astype(np.int32)


def cut_stream(lengths: np.ndarray, capacity: int, *, align: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pieces of the concatenation of all documents, cut at every multiple of `capacity`.

    (doc int64[P], start int64[P], length int32[P]) in stream order. Every document begins at a multiple of `align`,
    which must divide the capacity. The bins are ⌈Σ aligned lengths / capacity⌉, all but the last exactly full, so
    `pack(length, capacity, "greedy", align=align)` gives the bin of every piece. A length of 0 gives no piece; a
    negative one is a ValueError.
    """
    x, capacity = _checked(lengths, capacity)
    align = positive("align", align)
    if capacity % align:
        raise ValueError(f"capacity {capacity} is not a multiple of align {align}: a cut would fall inside a slot.")
    slots = -(-x // align) * align
    ends = np.cumsum(slots)
    begins = ends - slots
    first_bin, last_bin = begins // capacity, np.maximum(ends - 1, begins) // capacity
    pieces = np.where(x > 0, last_bin - first_bin + 1, 0)
    doc = np.repeat(np.arange(x.size, dtype=np.int64), pieces)
    in_bin = first_bin[doc] + np.arange(doc.size, dtype=np.int64) - (np.cumsum(pieces) - pieces)[doc]
    low = np.maximum(begins[doc], in_bin * capacity)
    high = np.minimum(begins[doc] + x[doc], (in_bin + 1) * capacity)
    return doc, low - begins[doc], (high - low).astype(np.int32)


def _checked(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    x = as_integers(lengths).astype(np.int64)
    wrong = np.flatnonzero(x < 0)
    if wrong.size:
        raise ValueError(
            f"document {wrong[0]} has length {x[wrong[0]]}; {wrong.size} lengths are negative: fix the input."
        )
    return x, positive("capacity", capacity)
