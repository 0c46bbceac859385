"""What context-parallel ranks exchange, as arithmetic."""

from dataclasses import replace

import pytest
import torch

from train import hf
from train.attention.interface import Part, Segments
from train.model.config import LayerConfig
from train.packs import Packs
from train.parallel.cp import check_heads, check_no_window, needed_counts


def test_a_rank_needs_the_keys_of_the_document_that_its_part_begins_in():
    # Documents begin at 0, 3, 22 and 30 of a row of 4 × 10: rank 1 and 2 are inside the second, rank 3 begins with one.
    assert needed_counts((0, 3, 3, 30), 10, None) == [[0, 7, 7, 0], [0, 0, 10, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_a_window_needs_no_more_than_it_sees():
    # The first query of a part sees itself and 4 keys before it.
    assert needed_counts((0, 3, 18, 30), 10, 5) == [[0, 4, 0, 0], [0, 0, 2, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert needed_counts((0, 0, 0), 4, 7) == [[0, 4, 2], [0, 0, 4], [0, 0, 0]]
    assert needed_counts((0, 0), 4, 1) == [[0, 0], [0, 0]]


@pytest.mark.parametrize("size", [2, 4])
def test_heads_that_can_be_shared_out(size, tiny_llama_dir):
    check_heads(hf.read_config(tiny_llama_dir), size)


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 3), (12, 4, 6), (4, 1, 8)])
def test_heads_that_cannot_be_shared_out_are_refused(heads, kv_heads, size, tiny_llama_dir):
    config = replace(hf.read_config(tiny_llama_dir), num_heads=heads, num_kv_heads=kv_heads)
    with pytest.raises(ValueError, match=f"cannot share out {heads} query and {kv_heads} key/value heads over --cp"):
        check_heads(config, size)


def test_segments_of_a_part_know_the_length_of_their_documents():
    row = torch.tensor([0, 4, 12, 12], dtype=torch.int32)
    contiguous = Segments(torch.tensor([0, 0, 6, 6]), 6, Part(row, 8))
    assert contiguous.document_lengths.tolist() == [4, 8, 0]
    zigzag = Segments(torch.tensor([0, 1, 2, 4, 6, 6, 6]), 6, Part(row, 8))
    assert zigzag.document_lengths.tolist() == [4, 4, 8, 8, 0, 0]
    real = Packs(torch.tensor([3, 7, 0], dtype=torch.int32), 1, 12, torch.tensor([10]))
    assert replace(contiguous, packs=real).document_lengths.tolist() == [3, 7, 0], "padding of a slot is not counted"
    assert replace(zigzag, packs=real).document_lengths.tolist() == [3, 3, 7, 7, 0, 0]


def test_windows_over_transformer_engines_ring_are_refused(tiny_llama_dir):
    config = hf.read_config(tiny_llama_dir)
    check_no_window(config)
    with pytest.raises(ValueError, match="--attention te has no sliding window over --cp-method ring"):
        check_no_window(replace(config, layers=(*config.layers, LayerConfig(window=7, rope=None))))
