"""The mixed cut of a row, which ring attention takes, and what each rank needs of the others: pure host arithmetic.

A document that is long enough is cut zigzag, so that all ranks share its work and each holds two pieces of it. The
others stay whole, or lie across the border of two ranks: their keys are then sent to one neighbour instead of to all.
Who needs which keys follows from where documents lie, which every rank knows without asking: keys that nobody needs are
not sent, and a step of the ring that nobody needs does not happen.

Shapes: S documents of a row (its padding included), C ranks; positions and lengths are int64.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from formats.layout import cu_seqlens


def longest_whole(tokens: int, size: int) -> int:
    """Longest document, in tokens, that is not cut zigzag in a row of `tokens` over `size` ranks: a quarter of a part.

    For chats of 32,768 over 8 ranks (`tools/bench_cp.py`) the slowest rank then computes 1.09 times the mean, and 0.38
    of all keys are sent. Cutting every document makes that 1.00 and 0.75, and many calls of a few tokens; cutting none
    2.10 and 0.02. Long texts are balanced to 1.00 either way.
    """
    return tokens // size // 4


@dataclass(frozen=True, eq=False)  # one object a row: what is derived from it is remembered by identity
class Pieces:
    """Where the pieces of the documents of a row lie: rank r holds tokens `begins[r, s, p]` up to `ends[r, s, p]`
    (counted from the start of document s) for p = 0, 1; the second piece may be empty, and so may both.

    A rank holds its pieces in the order of the row, so those of one document lie side by side.
    """

    begins: np.ndarray  # [C, S, 2]
    ends: np.ndarray  # [C, S, 2]
    starts: np.ndarray  # [S], first token of each document on the row
    zigzag: np.ndarray  # bool[S]

    @classmethod
    def of(cls, row_ends: np.ndarray, size: int) -> "Pieces":
        """Pieces of a row with `cu_seqlens` `row_ends` [S+1] over `size` ranks. A document longer than `longest_whole`
        is cut zigzag and must be a multiple of 2·`size`; the rest of the row is cut into equal runs, wherever
        documents begin and end."""
        row_ends = np.asarray(row_ends, np.int64)
        starts, lengths = row_ends[:-1], np.diff(row_ends)
        zigzag = lengths > longest_whole(int(row_ends[-1]), size)
        chunk = lengths // (2 * size)
        assert not (lengths[zigzag] % (2 * size)).any(), "the loader lays slots to multiples of 2 · cp"
        rest = np.where(zigzag, 0, lengths)
        rest_starts, part = np.cumsum(rest) - rest, rest.sum() // size
        assert part * size == rest.sum(), "the loader rounds rows up to what can be cut"
        ranks = np.arange(size)[:, None]
        run_begins, run_ends = (np.clip((ranks + i) * part - rest_starts, 0, rest) for i in (0, 1))
        mirrored = 2 * size - 1 - ranks
        begins = np.where(zigzag, ranks * chunk, run_begins), np.where(zigzag, mirrored * chunk, 0)
        ends = np.where(zigzag, (ranks + 1) * chunk, run_ends), np.where(zigzag, (mirrored + 1) * chunk, 0)
        return cls(np.stack(begins, -1), np.stack(ends, -1), starts, zigzag)

    @property
    def size(self) -> int:
        return len(self.begins)

    @cached_property
    def lengths(self) -> np.ndarray:
        """[C, S, 2]"""
        return self.ends - self.begins

    @cached_property
    def held(self) -> np.ndarray:
        """[C, S] tokens that a rank holds of a document."""
        return self.lengths.sum(-1)

    @cached_property
    def local_starts(self) -> np.ndarray:
        """[C, S] where they begin among the rank's tokens."""
        return np.cumsum(self.held, axis=1) - self.held

    def positions(self, rank: int) -> np.ndarray:
        """Positions on the row of the tokens of `rank`, in its order, which is that of the row."""
        return runs(self.starts[:, None] + self.begins[rank], self.lengths[rank])


@dataclass(frozen=True)
class Block:
    """What rank r computes with keys of another rank j: the queries `q_rows` (among r's tokens) in segments
    `cu_seqlens_q`, each of which sees all the keys of its segment: `k_rows` (among j's tokens) in `cu_seqlens_k`. Every
    segment has queries and keys, so no kernel ever meets a row that sees nothing."""

    q_rows: np.ndarray
    k_rows: np.ndarray
    cu_seqlens_q: np.ndarray
    cu_seqlens_k: np.ndarray


def block(pieces: Pieces, r: int, j: int) -> Block:
    """The block of queries of rank `r` and keys of rank `j` ≠ `r`.

    Of a zigzag document rank r holds chunks r and 2C−1−r. Those of an earlier rank j are j, before both of r, and
    2C−1−j, after both: two chunks see one. Those of a later rank lie between the two of r: one chunk sees two. Of a
    document in a run, all that an earlier rank holds lies before all that rank r holds.
    """
    if j < r:
        q_first, q_length = pieces.local_starts[r], pieces.held[r]
        k_length = np.where(pieces.zigzag, pieces.lengths[j, :, 0], pieces.held[j])
    else:
        q_first, q_length = pieces.local_starts[r] + pieces.lengths[r, :, 0], pieces.lengths[r, :, 1]
        k_length = pieces.held[j]
    meets = (q_length > 0) & (k_length > 0)
    q_length, k_length = q_length[meets], k_length[meets]
    return Block(
        runs(q_first[meets], q_length),
        runs(pieces.local_starts[j, meets], k_length),
        cu_seqlens(q_length),
        cu_seqlens(k_length),
    )


@dataclass(frozen=True)
class Halo:
    """What rank r of C needs where a query sees at most `window` keys: for each of its pieces (segment 2s + p is piece
    p of document s) the keys of the piece and those that its first query sees before it.

    `send_rows` are rows among r's tokens, `send_counts[d]` of them for rank d; `receive_counts[j]` come from rank j.
    What was received, taken in the order `order`, are the keys in segments `cu_seqlens_k` for queries in segments
    `cu_seqlens_q`. A rank's own keys count as sent to itself. A key that both pieces of a document see travels once and
    is taken twice.
    """

    send_rows: np.ndarray
    send_counts: list[int]
    receive_counts: list[int]
    order: np.ndarray
    cu_seqlens_q: np.ndarray
    cu_seqlens_k: np.ndarray


def halo(pieces: Pieces, r: int, window: int) -> Halo:
    """See `Halo`."""
    size, lengths = pieces.size, pieces.lengths
    first_keys = np.maximum(0, pieces.begins - window + 1)
    key_lengths = np.where(lengths > 0, pieces.ends - first_keys, 0)
    held = [pieces.positions(d) for d in range(size)]
    owner, row = np.empty((2, sum(map(len, held))), np.int64)
    for d, positions in enumerate(held):
        owner[positions], row[positions] = d, np.arange(len(positions))
    seen = [runs(pieces.starts[:, None] + first_keys[d], key_lengths[d]) for d in range(size)]
    needed = [_distinct(keys, len(owner)) for keys in seen]
    sent = [row[keys[owner[keys] == r]] for keys in needed]
    arriving = needed[r][np.argsort(owner[needed[r]], kind="stable")]  # the keys as they come, rank after rank
    place = np.empty(len(owner), np.int64)
    place[arriving] = np.arange(len(arriving))
    return Halo(
        np.concatenate(sent),
        [len(rows) for rows in sent],
        np.bincount(owner[needed[r]], minlength=size).tolist(),
        place[seen[r]],
        cu_seqlens(lengths[r].ravel()),
        cu_seqlens(key_lengths[r].ravel()),
    )


def _distinct(positions: np.ndarray, tokens: int) -> np.ndarray:
    """Those of a row's `tokens` that occur among `positions`, in the order of the row."""
    occurs = np.zeros(tokens, bool)
    occurs[positions] = True
    return np.flatnonzero(occurs)


def runs(first: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """first[0], first[0]+1, … `lengths[0]` of them, then those of the next run: int64[Σ lengths]."""
    first, lengths = first.ravel(), lengths.ravel()
    before = np.cumsum(lengths) - lengths
    return np.repeat(first - before, lengths) + np.arange(lengths.sum())
