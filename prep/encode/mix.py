"""Which documents of the sources are used, and how often: duplicates out, then shares by weight, repeat or limit.

A share is exact to one document: the tokens taken of a source differ from the tokens
asked for by less than the document at the border.
"""

from collections.abc import Sequence

import numpy as np

from formats.order import scrambled
from prep.encode.sources import SourceSpec
from prep.encode.store import DocumentStore
from prep.ledger import Ledger

MOST_PASSES = 10_000
"""A larger `repeat` is a slip of the pen, and rows repeated that often fill the memory."""


def select(
    store: DocumentStore,
    ranges: Sequence[tuple[int, int]],
    specs: Sequence[SourceSpec],
    ledger: Ledger,
    *,
    dedup: bool,
) -> list[np.ndarray]:
    """Rows of the store that each source contributes, in order, repeats included: int64 per source.

    Args:
        store: all documents.
        ranges: rows (first, last exclusive) of each source.
        specs: the sources.
        ledger: what is left out or repeated is entered here.
        dedup: keep only the first of equal documents.

    Raises:
        ValueError: shares that contradict each other or cannot be met.
    """
    shares = any(spec.has_share for spec in specs)
    lengths, hashes = store.lengths, store.doc_hashes
    rows = [np.arange(first, last, dtype=np.int64) for first, last in ranges]
    if dedup:
        first_of = _first_of_equals(store)
        for spec, found in zip(specs, rows, strict=True):
            gone = found[~first_of[found]]
            if gone.size:
                ledger.drop_kept(spec.name, "duplicate", gone.size, int(lengths[gone].sum(dtype=np.int64)))
        rows = [found[first_of[found]] for found in rows]
    if not shares:
        return rows
    tokens = [int(lengths[found].sum(dtype=np.int64)) for found in rows]
    wanted = wanted_tokens(specs, tokens)
    chosen = []
    for spec, found, have, want in zip(specs, rows, tokens, wanted, strict=True):
        if want > MOST_PASSES * have:
            raise ValueError(
                f"source {spec.name} would be read {want / have:.0f} times; at most {MOST_PASSES} are possible"
            )
        taken = take(found, lengths, hashes, want)
        if not taken.size:
            raise ValueError(
                f"source {spec.name}: its share of {want} tokens is too small for any of its documents; make its "
                "weight, repeat or limit_tokens larger, or take it out"
            )
        chosen.append(taken)
        _enter(ledger, spec.name, found, have, taken, lengths)
    return chosen


def _first_of_equals(store: DocumentStore) -> np.ndarray:
    """bool[N]: no earlier document has the same tokens and mask. Equal hashes are looked into, never trusted."""
    _, first, inverse = np.unique(store.doc_hashes, return_index=True, return_inverse=True)
    is_first = np.zeros(len(inverse), bool)
    is_first[first] = True
    for row in np.flatnonzero(~is_first).tolist():
        mine, other = store.document(row), store.document(int(first[inverse[row]]))
        is_first[row] = not all(map(np.array_equal, mine, other))
    return is_first


def check_shares(specs: Sequence[SourceSpec]) -> None:
    """Raise ValueError, naming the source, where shares contradict each other: before any work."""
    weighted = any(spec.weight is not None for spec in specs)
    for spec in specs:
        if weighted and (spec.weight is None or spec.repeat is not None):
            raise ValueError(f"source {spec.name}: with weights every source has a weight and none a repeat")
        for name in ("weight", "repeat", "max_epochs", "limit_tokens"):
            value = getattr(spec, name)
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (is_number and 0 < value < float("inf")):
                raise ValueError(f"source {spec.name}: {name} is {value!r}; it must be a number above 0")


def wanted_tokens(specs: Sequence[SourceSpec], tokens: Sequence[int]) -> list[int]:
    """Tokens to take of each source.

    With weights the sum is as large as it can be while no source is read more often than its `max_epochs` (1 by
    default) and none beyond its `limit_tokens`. Without, a source is taken `repeat` times, up to `limit_tokens`.
    """
    weighted = any(spec.weight is not None for spec in specs)
    for spec, have in zip(specs, tokens, strict=True):
        if have == 0:
            raise ValueError(f"source {spec.name}: no document is left of it; check its files or take it out")
    caps = [_cap(spec, have) for spec, have in zip(specs, tokens, strict=True)]
    if not weighted:
        epochs = [1 if spec.repeat is None else spec.repeat for spec in specs]
        return [min(cap, round(have * times)) for cap, have, times in zip(caps, tokens, epochs, strict=True)]
    total = sum(spec.weight for spec in specs)
    budget = min(cap * total / spec.weight for cap, spec in zip(caps, specs, strict=True))
    return [min(cap, round(budget * spec.weight / total)) for cap, spec in zip(caps, specs, strict=True)]


def _cap(spec: SourceSpec, have: int) -> int:
    default = 1.0 if spec.repeat is None else spec.repeat
    most = round(have * (default if spec.max_epochs is None else spec.max_epochs))
    return most if spec.limit_tokens is None else min(most, spec.limit_tokens)


def take(rows: np.ndarray, lengths: np.ndarray, hashes: np.ndarray, want: int) -> np.ndarray:
    """`want` tokens of these rows, exact to one document: whole passes, then a part chosen by hash. int64.

    Not by the smallest hashes: those are what `prep.splits` holds out, and the two choices must not know each other.
    """
    have = int(lengths[rows].sum(dtype=np.int64))
    passes, rest = divmod(want, have)
    order = rows[np.argsort(scrambled(hashes[rows]), kind="stable")]
    reached = np.cumsum(lengths[order], dtype=np.int64)
    count = int(np.searchsorted(reached, rest, side="right"))
    # The document at the border goes in when that brings the sum nearer.
    before = int(reached[count - 1]) if count else 0
    if count < len(order) and rest - before > int(reached[count]) - rest:
        count += 1
    return np.concatenate([*[rows] * passes, np.sort(order[:count])])


def _enter(ledger: Ledger, source: str, rows, have: int, taken, lengths) -> None:
    unused = np.setdiff1d(rows, taken)
    if unused.size:
        ledger.drop_kept(source, "beyond_share", unused.size, int(lengths[unused].sum(dtype=np.int64)))
    documents = len(taken) - (len(rows) - unused.size)
    if documents:
        tokens = int(lengths[taken].sum(dtype=np.int64)) - (have - int(lengths[unused].sum(dtype=np.int64)))
        ledger.repeat(source, documents, tokens)
