"""Which packs pass through which stage of a pipeline: each of an epoch once, and the same ones in all stages.

The packs can be told apart wherever they are seen: all tokens and targets of pack p are p, and its first document is p
tokens long. So the ids of the first stage, the labels of the last and the segments of every stage each name it.
"""

import numpy as np
import pytest
import torch
from tiny_models import write_tiny_model

import train.data
from make_shards import make_shards
from ranks import run_ranks
from train import hf
from train.config import Config, Data, Layout
from train.cut import WHOLE
from train.data import PackedLoader, Schedule, open_shards
from train.mesh import build_mesh
from train.model.decoder import Decoder
from train.parallel.apply import parallelize
from train.step import accumulate_gradients

PACKS, EPOCHS, CAPACITY = 7, 2, 40
BATCH = 3  # steps of 3, 3 and 1 packs an epoch


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packs")
    rows = []
    for p in range(1, PACKS + 1):
        lens = np.array([p, 20], np.int32)
        ids, mask = np.full(lens.sum(), p, np.int32), np.ones(lens.sum(), np.uint8)
        mask[[0, p]] = 0
        rows.append((ids, mask, lens, lens, np.arange(2 * p, 2 * p + 2), np.zeros(2, np.int32)))
    shards = make_shards(folder / "shards", rows, capacity=CAPACITY)
    return write_tiny_model(folder / "model", "gpt_oss", vocab_size=320, num_hidden_layers=4), shards


def in_order(values):
    """Distinct values above 0, as they come."""
    return [value for value in dict.fromkeys(values.tolist()) if value > 0]


def epochs(model_dir, shards, config):
    """(data rank, steps) of this rank; of each step and each of its stages the packs of every row."""
    train.data.RUN_TOKENS = 1  # buffers of the loader are filled again as soon as can be
    mesh = build_mesh(config.layout, torch.device("cpu"))
    with torch.device("meta"):
        model = Decoder(hf.read_config(model_dir))
    model = parallelize(model, mesh, config)
    model.to_empty(device="cpu")
    hf.load_weights(model, model_dir)
    seen = {number: [] for number in model._stages}

    def look(number, stage):
        def hook(_, args):
            first, _, segments, labels = args
            packs = in_order(segments.packs.seq_lens.masked_fill(segments.packs.seq_lens == 20, 0))
            if stage.embed_tokens is not None:
                assert in_order(first) == packs
            if stage.lm_head is not None:
                assert set(in_order(labels)) == set(packs)
            seen[number].append(packs)

        return hook

    for number, stage in model._stages.items():
        stage.register_forward_pre_hook(look(number, stage))  # after the pipeline's, which hands the row over
    data = config.data
    schedule = Schedule(PACKS, "shuffle", 0, 5, data.batch_packs, data.micro_packs)
    options = {"dp_rank": mesh.dp_rank, "dp_size": mesh.dp_size, "device": torch.device("cpu"), "cut": WHOLE}
    loader = PackedLoader(open_shards(shards, 320), schedule, **options)
    steps = []
    for _ in range(schedule.steps(EPOCHS)):
        facts = loader.next_step()
        accumulate_gradients(model, loader.rows(), loader.row_count, facts.target_tokens)
        model.zero_grad()
        steps.append({number: rows.copy() for number, rows in seen.items()})
        for rows in seen.values():
            rows.clear()
    loader.close()
    return mesh.dp_rank, steps


def all_epochs(cases):
    return [epochs(*case) for case in cases]


def case(micro=1, **layout):
    return Config(data=Data(batch_packs=BATCH, micro_packs=micro), layout=Layout(**layout))


CASES = {
    4: [case(pp=2, ep=2), case(pp=2, pp_schedule="interleaved"), case(pp=2, pp_schedule="zbv", micro=2)],
    8: [
        case(pp=2, ep=2, dp_replicate=2, pp_schedule="gpipe"),
        case(pp=2, ep=2, pp_schedule="gpipe"),  # ep_shard 2
        case(pp=2, ep=4, tp=2),
        case(pp=2, tp=2, pp_schedule="interleaved-zb"),
    ],
}


@pytest.mark.parametrize("world", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_every_stage_sees_each_pack_of_an_epoch_once(world, places):
    """Over numbers of data ranks that do not divide a batch, so that some rows are empty."""
    cases = [(*places, config) for config in CASES[world]]
    for (*_, config), *ranks in zip(cases, *run_ranks(all_epochs, world, cases, timeout=200), strict=True):
        data_ranks = {data_rank for data_rank, _ in ranks}
        of_rank = {}
        for data_rank, steps in ranks:
            for s, step in enumerate(steps):
                for rows in step.values():
                    assert of_rank.setdefault((s, data_rank), rows) == rows, f"stages differ: {config.layout}"
        per_epoch = len(ranks[0][1]) // EPOCHS
        for epoch in range(EPOCHS):
            its_steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
            packs = [p for s in its_steps for d in data_ranks for row in of_rank[s, d] for p in row]
            assert sorted(packs) == list(range(1, PACKS + 1)), config.layout
            assert any(not row for s in its_steps for d in data_ranks for row in of_rank[s, d]), config.layout
