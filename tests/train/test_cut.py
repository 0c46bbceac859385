"""The cut of a row over context-parallel ranks, against literal lists and tokens that name their place."""

import numpy as np
import pytest
import torch

from formats.layout import cu_seqlens
from make_shards import make_shards, random_packs
from train.cut import Cut, choose_cut
from train.data import PackedLoader, Schedule, open_shards

CPU = torch.device("cpu")


def cut_row(cut, lengths):
    """(part, host's facts) of a row of such segments whose ids are 0, 1, 2 …, labels 100 more, positions 200 more."""
    tokens = sum(lengths)
    ends = [*cu_seqlens(np.array(lengths)), tokens, tokens]  # padded, as the loader pads them
    row = {"cu_seqlens": torch.tensor(ends, dtype=torch.int32), "input_ids": torch.arange(tokens, dtype=torch.int32)}
    row |= {"labels": 100 + torch.arange(tokens), "position_ids": 200 + row["input_ids"]}
    part = cut.buffers(row, pinned=False)
    facts = cut.fill(*({name: x.numpy() for name, x in tensors.items()} for tensors in (row, part)))
    return {name: x.tolist() for name, x in part.items()}, facts


def test_a_contiguous_part_begins_and_ends_inside_documents():
    part, facts = cut_row(Cut(3, 1), [3, 5, 1, 3])
    assert part == {
        "input_ids": [4, 5, 6, 7],
        "labels": [104, 105, 106, 107],
        "position_ids": [204, 205, 206, 207],
        "cu_seqlens": [0, 0, 4, 4, 4, 4, 4],
        "row_cu_seqlens": [0, 3, 8, 9, 12, 12, 12],
    }
    assert facts == {"first_keys": (0, 3, 8)}, "part 2 begins with a document"


def test_a_zigzag_part_has_two_chunks_of_every_document_and_their_keys_from_its_start():
    part, facts = cut_row(Cut(2, 1, "zigzag"), [4, 8])
    assert part == {
        "input_ids": [1, 2, 6, 7, 8, 9],
        "labels": [101, 102, 106, 107, 108, 109],
        "position_ids": [201, 202, 206, 207, 208, 209],
        "cu_seqlens": [0, 1, 2, 4, 6, 6, 6, 6, 6],
        "row_cu_seqlens": [0, 4, 12, 12, 12],
        "cu_seqlens_k": [0, 2, 5, 9, 15, 15, 15, 15, 15],
        # The ranks hold 0 3 4 5 10 11 | 1 2 6 7 8 9, so token 1 is row 6, token 4 is row 2, …
        "key_rows": [*[0, 6], *[0, 6, 7], *[2, 3, 8, 9], *[2, 3, 8, 9, 10, 11]],
    }
    assert facts == {}


@pytest.mark.parametrize("kind", ["contiguous", "zigzag", "mixed"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_parts_of_all_ranks_are_the_row(size, kind):
    lengths = [8, 16, 40, 8, 24]
    parts = [cut_row(Cut(size, r, kind), lengths)[0] for r in range(size)]
    assert sorted(i for part in parts for i in part["input_ids"]) == list(range(96))
    for part in parts:
        assert part["labels"] == [i + 100 for i in part["input_ids"]]
        ends = part["cu_seqlens"]
        per_document = 2 if kind == "zigzag" else 1
        for s in range(len(ends) - 1):
            whole = range(sum(lengths[: s // per_document]), sum(lengths[: s // per_document + 1]))
            assert set(part["input_ids"][ends[s] : ends[s + 1]]) <= set(whole)


def test_zigzag_only_where_the_method_takes_it_and_slots_are_aligned(tmp_path):
    rows = random_packs(np.random.default_rng(0), 2, 96, 8, 320)
    manifest = open_shards(make_shards(tmp_path, rows, capacity=96, align=8, cp=4)).manifest
    assert choose_cut("gather", 4, 1, manifest) == Cut(4, 1, "zigzag")
    assert choose_cut("gather", 2, 0, manifest) == Cut(2, 0, "zigzag")
    assert choose_cut("gather", 8, 0, manifest) == Cut(8, 0)
    assert choose_cut("needed", 4, 0, manifest) == Cut(4, 0)
    assert choose_cut("gather", 1, 0, manifest) == Cut()


@pytest.mark.parametrize("size", [2, 3, 5])
def test_a_row_is_rounded_up_to_what_can_be_cut(size, tmp_path):
    rows = random_packs(np.random.default_rng(1), 4, 97, 1, 320)
    dataset = open_shards(make_shards(tmp_path, rows, capacity=97))
    schedule = Schedule(4, "input", 0, 0, 2, 2)
    loaders = [
        PackedLoader(dataset, schedule, dp_rank=0, dp_size=1, device=CPU, cut=cut)
        for cut in (Cut(), *(Cut(size, r) for r in range(size)))
    ]
    for _ in range(2):
        facts = [loader.next_step() for loader in loaders]
        whole, *parts = [next(loader.rows()) for loader in loaders]
        rest = -len(whole.input_ids) % size
        assert facts[1].positions == 194 + rest
        for name in ("input_ids", "labels", "position_ids"):
            got = torch.cat([getattr(part, name) for part in parts])
            assert torch.equal(got[:194], getattr(whole, name))
        assert torch.equal(torch.cat([part.labels for part in parts])[194:], torch.full((rest,), -100))
        ends = parts[0].segments.part.row_cu_seqlens
        assert set(ends.tolist()) == {*whole.segments.cu_seqlens.tolist(), 194 + rest}
        for part in parts:
            assert part.segments.cu_seqlens[-1] == len(part.input_ids) == (194 + rest) // size
    for loader in loaders:
        loader.close()
