"""Which tokens are real and whose pack they are, read off the rows that the loader makes."""

import numpy as np
import pytest
import torch

from make_shards import make_shards, random_packs
from train.cut import choose_cut
from train.data import PackedLoader, Schedule, open_shards
from train.packs import token_packs


def numbered(rng, count, capacity, align):
    """Packs whose ids say where they stand: 1 + the number of the pack in real tokens, 0 in padding."""
    rows = random_packs(rng, count, capacity, align, 300)
    for number, (ids, _, lens, slots, *_) in enumerate(rows):
        start = 0
        for real, slot in zip(lens, slots, strict=True):
            ids[start : start + slot] = 0
            ids[start : start + real] = 1 + number
            start += slot
    return rows


@pytest.mark.parametrize(("capacity", "align"), [(199, 1), (200, 4), (208, 16)])
@pytest.mark.parametrize(("method", "size"), [("gather", 1), ("gather", 2), ("needed", 4)])
def test_every_token_knows_its_pack(tmp_path, capacity, align, method, size):
    rows = numbered(np.random.default_rng(3), 5, capacity, align)
    dataset = open_shards(make_shards(tmp_path / "s", rows, capacity=capacity, align=align, cp=max(1, align // 2)))
    real = torch.zeros(5, dtype=torch.int64)
    for rank in range(size):
        cut = choose_cut(method, size, rank, dataset.manifest)
        # 3 packs a row, 2 rows: the last pack of the second is empty
        schedule = Schedule(5, "input", 0, 0, 6, 3)
        loader = PackedLoader(dataset, schedule, dp_rank=0, dp_size=1, device=torch.device("cpu"), cut=cut)
        facts = loader.next_step()
        for row, first in zip(loader.rows(), (0, 3), strict=True):
            packs = token_packs(row.segments, row.position_ids)
            assert packs.count == 3
            assert torch.equal(packs.is_real, row.input_ids != 0)
            assert torch.equal((packs.pack + 1 + first)[packs.is_real], row.input_ids.long()[packs.is_real])
            assert packs.step_tokens == facts.tokens
            for k in range(3):
                expected = rows[first + k][2].sum() if first + k < 5 else 0
                assert packs.tokens[k] == expected
                if first + k < 5:
                    real[first + k] += (packs.pack == k).sum()
        loader.close()
    assert real.tolist() == [row[2].sum() for row in rows]
