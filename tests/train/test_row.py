"""Rows that hold more padding than documents: every token of it has a segment."""

import numpy as np
import torch

from make_shards import make_shards
from train.cut import Cut
from train.data import PackedLoader, Schedule, open_shards
from train.row import TAIL_SEGMENT

CPU = torch.device("cpu")


def test_a_rank_short_of_a_pack_has_room_for_all_its_padding(tmp_path):
    """Packs of one long document each have one segment; of padding alone there are more."""
    length = np.array([1024], np.int32)
    pack = np.ones(1024, np.int32), np.zeros(1024, np.uint8), length, length, np.arange(1), np.zeros(1, np.int32)
    folder = make_shards(tmp_path / "s", [pack] * 3, capacity=1024, order="input")
    loader = PackedLoader(open_shards(folder), Schedule(3, "input", 0, 0, 2, 1), dp_rank=1, dp_size=2, device=CPU)
    ends = []
    for _ in range(2):
        loader.next_step()
        for row in loader.rows():
            ends.append(row.segments.cu_seqlens.tolist())
            assert row.position_ids.max() == (1023 if len(ends) == 1 else 127)
    loader.close()
    assert ends == [[0, *[1024] * 9], [*range(0, 1025, TAIL_SEGMENT), 1024]]


def test_what_a_row_is_rounded_up_by_is_a_segment_of_its_own(tmp_path):
    """256 parts make a row of 300 tokens 512 long: more than a segment of other padding ever has."""
    length = np.array([300], np.int32)
    pack = np.ones(300, np.int32), np.zeros(300, np.uint8), length, length, np.arange(1), np.zeros(1, np.int32)
    dataset = open_shards(make_shards(tmp_path / "s", [pack], capacity=300))
    parts = []
    for rank in range(16):
        cut = Cut(16, rank, "contiguous", 16)
        loader = PackedLoader(dataset, Schedule(1, "input", 0, 0, 1, 1), dp_rank=0, dp_size=1, device=CPU, cut=cut)
        loader.next_step()
        parts += [row.clone() for row in loader.rows()]
        loader.close()
    ends = parts[0].segments.part.row_cu_seqlens
    assert ends.unique().tolist() == [0, 300, 512]
    positions = torch.cat([part.position_ids for part in parts]).tolist()
    assert positions == [*range(300), *range(212)]
    assert {part.segments.part.row_max_seqlen for part in parts} == {512}
    length[:] = 100
    short = *(column[:100] for column in pack[:2]), *pack[2:]
    dataset = open_shards(make_shards(tmp_path / "t", [short], capacity=300))
    loader = PackedLoader(dataset, Schedule(1, "input", 0, 0, 1, 1), dp_rank=0, dp_size=1, device=CPU, cut=cut)
    loader.next_step()
    (row,) = loader.rows()
    loader.close()
    assert row.segments.part.row_max_seqlen == 256, "the document has 100, the rest 212"
