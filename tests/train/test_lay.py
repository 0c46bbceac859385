"""Slots re-laid to another alignment: rows against a construction token by token, their length, and what is said."""

import numpy as np
import pytest
import torch

from formats.order import EMPTY
from make_shards import make_shards, random_packs
from train.cut import Cut
from train.data import PackedLoader, Schedule, open_shards
from train.lay import Lay, choose_lay

CPU = torch.device("cpu")
CAPACITY = 240


@pytest.fixture(scope="module", params=[1, 4])
def dataset(request, tmp_path_factory):
    rows = random_packs(np.random.default_rng(4), 7, CAPACITY, request.param, 50, max_docs=20)
    folder = tmp_path_factory.mktemp("lay") / "s"
    return open_shards(make_shards(folder, rows, capacity=CAPACITY, align=request.param, pad_id=7))


def laid_by_hand(dataset, packs, lay, longest_tail):
    """ids, labels, positions, lengths of documents' slots of a row, one token at a time."""
    ids, labels, positions, slots = [], [], [], []
    for number in packs:
        first = len(ids)
        if number != EMPTY:
            pack, start = dataset[number], 0
            for real, slot in zip(pack.seq_lens.tolist(), pack.seq_lens_padded.tolist(), strict=True):
                room = -(-real // lay.align) * lay.align
                kept = real if lay.relaid else slot
                for i in range(room):
                    ids.append(int(pack.input_ids[start + i]) if i < kept else 7)
                    positions.append(i)
                    trained = i + 1 < real and pack.loss_mask[start + i + 1]
                    labels.append(int(pack.input_ids[start + i + 1]) if trained else -100)
                slots.append(room)
                start += slot
        rest = lay.capacity - (len(ids) - first)
        assert rest >= 0
        ids += [7] * rest
        labels += [-100] * rest
        while rest:
            piece = min(rest, longest_tail)
            positions += range(piece)
            slots.append(piece)
            rest -= piece
    return ids, labels, positions, slots


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_relaid_rows_equal_the_documents_one_token_at_a_time(dataset, size):
    """The parts of all ranks together, over an epoch that ends with a short step: some rows hold an empty pack."""
    cut = Cut(size, 0, "mixed")
    align, lay = 2 * size, choose_lay(dataset, cut)
    if lay.relaid:
        largest = max(int((-(-dataset[i].seq_lens // align) * align).sum()) for i in range(len(dataset)))
        assert largest <= lay.capacity
        stated = align in (2, 4, 8, 16)
        assert not stated or lay.capacity == max(largest, -(-CAPACITY // align) * align)
    loaders = [
        PackedLoader(
            dataset, Schedule(7, "shuffle", 0, 3, 4, 2), dp_rank=1, dp_size=2, device=CPU, cut=Cut(size, r, "mixed")
        )
        for r in range(size)
    ]
    packs = Schedule(7, "shuffle", 0, 3, 4, 2)
    shapes = set()
    for start in (0, 4):
        for loader in loaders:
            facts = loader.next_step()
            assert facts.positions == 2 * 2 * lay.capacity
        mine = packs.rank_packs(start, min(start + 4, 7), packs.epoch_order(0), 1, 2)
        for numbers in mine:
            parts = [next(loader.rows()) for loader in loaders]
            align = lay.align
            ids, labels, positions, slots = laid_by_hand(dataset, numbers.tolist(), lay, 128 // align * align)
            for r, part in enumerate(parts):
                pieces = part.segments.part.pieces
                held = pieces.positions(r)
                assert part.input_ids.tolist() == [ids[i] for i in held]
                assert part.labels.tolist() == [labels[i] for i in held]
                assert part.position_ids.tolist() == [positions[i] for i in held]
                ends = part.segments.part.row_cu_seqlens.diff().tolist()
                assert ends == slots + [0] * (len(ends) - len(slots))
                assert part.segments.max_seqlen >= part.segments.cu_seqlens.diff().max()
                shapes.add((part.input_ids.shape, part.segments.cu_seqlens.shape))
    assert EMPTY in mine, "an empty pack was among them"
    assert len(shapes) == 1, "shapes must never change"
    for loader in loaders:
        loader.close()


def test_slots_stay_where_they_lie_when_their_alignment_serves(dataset):
    assert choose_lay(dataset, Cut()) == Lay(CAPACITY, dataset.manifest.align)
    assert choose_lay(dataset, Cut(5, 0)) == Lay(CAPACITY, dataset.manifest.align), "contiguous parts need none"
    if dataset.manifest.align == 4:
        assert choose_lay(dataset, Cut(2, 0, "mixed")) == Lay(CAPACITY, 4)
        assert not choose_lay(dataset, Cut(2, 0, "zigzag")).summary(CAPACITY, 2)


def test_the_cost_is_said_with_the_way_out(tmp_path):
    row = (np.ones(99, np.int32), np.zeros(99, np.uint8), *[np.full(99, 1, np.int32)] * 2, np.arange(99), np.zeros(99))
    dataset = open_shards(make_shards(tmp_path / "s", [row], capacity=100))
    lay = choose_lay(dataset, Cut(4, 0, "mixed"))
    assert lay == Lay(99 * 8, 8, relaid=True)
    assert lay.summary(100, 4) == (
        "slots re-laid to multiples of 8: 100 → 792 tokens a pack (+692.0%); "
        "shards of prep pack --cp 4 (or a multiple of it) need none of it"
    )
    three = choose_lay(dataset, Cut(3, 0, "mixed"))
    assert three == Lay(99 * 6, 6, relaid=True)
    assert three.summary(100, 3).endswith("; only a --cp that is a power of two finds shards that need none of it")
