"""The mixed cut and what its ranks need of each other: literal lists, and every pair of tokens computed once."""

import numpy as np
import pytest

from formats.layout import cu_seqlens
from train.pieces import Pieces, block, halo, longest_whole

# Two ranks over 48 tokens: a document of more than 48 / 2 / 4 = 6 tokens is cut zigzag.
LENGTHS = [4, 16, 6, 8, 2, 12]


def pieces_of(lengths, size):
    return Pieces.of(cu_seqlens(np.array(lengths)), size)


def test_long_documents_are_cut_zigzag_and_the_rest_into_runs():
    pieces = pieces_of(LENGTHS, 2)
    assert longest_whole(48, 2) == 6
    assert pieces.zigzag.tolist() == [False, True, False, True, False, True]
    # Chunks 0 and 3 of the long ones; the short ones have 12 tokens in all, of which 6 are rank 0's.
    of_rank_0 = [*range(0, 4), *range(4, 8), *range(16, 20), *range(20, 22), 26, 27, 32, 33, *range(36, 39)]
    assert pieces.positions(0).tolist() == [*of_rank_0, *range(45, 48)]
    assert pieces.positions(1).tolist() == [*range(8, 16), *range(22, 26), *range(28, 32), 34, 35, *range(39, 45)]
    assert pieces.held.tolist() == [[4, 8, 2, 4, 0, 6], [0, 8, 4, 4, 2, 6]]


def test_a_block_has_the_queries_and_keys_that_meet():
    pieces = pieces_of(LENGTHS, 2)
    # Rank 1 sees the first chunk that rank 0 has of each long document, and the two tokens of the one across the cut.
    later = block(pieces, 1, 0)
    assert later.cu_seqlens_q.tolist() == [0, 8, 12, 16, 22]
    assert later.cu_seqlens_k.tolist() == [0, 4, 6, 8, 11]
    assert later.k_rows.tolist() == [*range(4, 8), 12, 13, 14, 15, 18, 19, 20]
    # Rank 0's last chunks see both chunks that rank 1 has.
    earlier = block(pieces, 0, 1)
    assert earlier.q_rows.tolist() == [*range(8, 12), 16, 17, *range(21, 24)]
    assert earlier.k_rows.tolist() == [*range(0, 8), *range(12, 16), *range(18, 24)]


def test_nobody_needs_anything_of_documents_that_lie_whole():
    pieces = pieces_of([4] * 16, 4)
    assert not pieces.zigzag.any()
    assert not any(len(block(pieces, r, j).k_rows) for r in range(4) for j in range(4) if r != j)
    across = pieces_of([1, *[4] * 15, 3], 4)
    needed = {(r, j) for r in range(4) for j in range(4) if r != j and len(block(across, r, j).k_rows)}
    assert needed == {(1, 0), (2, 1), (3, 2)}, "one step of three"


def random_lengths(rng, size, documents=12):
    lengths = (rng.integers(1, 40, documents) * 2 * size // rng.integers(1, 12, documents) // (2 * size) + 1) * 2 * size
    return lengths.tolist()


@pytest.mark.parametrize("size", [2, 3, 4, 8])
@pytest.mark.parametrize("seed", range(4))
def test_every_visible_pair_is_computed_once(size, seed):
    lengths = random_lengths(np.random.default_rng(seed), size)
    pieces = pieces_of(lengths, size)
    document = np.repeat(np.arange(len(lengths)), lengths)
    place = np.arange(len(document))
    visible = (document[:, None] == document) & (place[:, None] >= place)
    computed = np.zeros_like(visible, dtype=int)
    held = [pieces.positions(r) for r in range(size)]
    assert sorted(np.concatenate(held).tolist()) == place.tolist()
    assert {len(positions) for positions in held} == {len(place) // size}
    for r in range(size):
        assert np.array_equal(pieces.held[r], np.bincount(document[held[r]], minlength=len(lengths)))
        own = held[r]  # its own keys: causal inside what it holds of each document
        computed[np.ix_(own, own)] += (document[own][:, None] == document[own]) & (own[:, None] >= own)
        for j in set(range(size)) - {r}:
            met = block(pieces, r, j)
            for s in range(len(met.cu_seqlens_q) - 1):
                queries = held[r][met.q_rows[met.cu_seqlens_q[s] : met.cu_seqlens_q[s + 1]]]
                keys = held[j][met.k_rows[met.cu_seqlens_k[s] : met.cu_seqlens_k[s + 1]]]
                assert len(queries), "no row may reach a kernel without keys, no keys without a row"
                assert len(keys)
                computed[np.ix_(queries, keys)] += 1
    assert np.array_equal(computed, visible)


@pytest.mark.parametrize("window", [1, 2, 7, 30, 1000])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_window_brings_each_piece_the_keys_it_sees(size, window):
    lengths = random_lengths(np.random.default_rng(size), size)
    pieces = pieces_of(lengths, size)
    held = [pieces.positions(r) for r in range(size)]
    starts = np.cumsum(lengths) - lengths
    halos = [halo(pieces, r, window) for r in range(size)]
    for r, mine in enumerate(halos):
        # What all ranks send to r, in the order of the ranks, as an exchange delivers it.
        arrived = []
        for j, theirs in enumerate(halos):
            before = sum(theirs.send_counts[:r])
            arrived += held[j][theirs.send_rows[before : before + theirs.send_counts[r]]].tolist()
            assert theirs.send_counts[r] == mine.receive_counts[j]
        assert len(arrived) == len(set(arrived)), "a key that both pieces of a document see travels once"
        keys = np.array(arrived)[mine.order]
        queries = held[r]
        for s in range(2 * len(lengths)):
            of_piece = queries[mine.cu_seqlens_q[s] : mine.cu_seqlens_q[s + 1]].tolist()
            seen = keys[mine.cu_seqlens_k[s] : mine.cu_seqlens_k[s + 1]].tolist()
            if not of_piece:
                assert not seen
                continue
            assert seen == list(range(max(starts[s // 2], of_piece[0] - window + 1), of_piece[-1] + 1))
