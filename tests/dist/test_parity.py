"""Packed equals unpacked, in every layout: loss and every gradient of a step, through the real loader, the real
`parallelize` and the real files, against `transformers` that sees the same documents one at a time."""

import functools
import itertools
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from parity import LIMIT, by_documents, packed_step, packed_steps
from tokenizers import Tokenizer

from formats.dataset import PackedDataset
from make_shards import make_shards, random_packs
from ranks import run_ranks
from train.config import Config, Data, Layout, Model

# name → (ranks, configuration). 5 packs and a batch of 6: some rank always runs an empty pack.
CASES = {
    "one rank": (1, Config()),
    "one rank, 5 packs a row": (1, Config(data=Data(micro_packs=5))),
    "dp_shard 2": (2, Config()),
    "dp_shard 2, 2 packs a row": (2, Config(data=Data(micro_packs=2))),
    "dp_shard 2, no reshard": (2, Config(layout=Layout(reshard=False))),
    "dp_shard 2, gradients reduced after each row": (2, Config(layout=Layout(defer_sync=False))),
    "dp_shard 2, recompute": (2, Config(model=Model(recompute="full"))),
    "dp_shard 2, selective recompute": (2, Config(model=Model(recompute="selective"))),
    "dp_shard 2, no prefetch": (2, Config(layout=Layout(prefetch=0))),
    "dp_shard 2, CPU offload": (2, Config(layout=Layout(cpu_offload=True))),
    "dp_replicate 2": (2, Config(layout=Layout(dp_replicate=2))),
    "dp_shard 4": (4, Config()),
    "dp_replicate 2 × dp_shard 2": (4, Config(layout=Layout(dp_replicate=2))),
    "dp_shard 4, prefetch 2": (4, Config(layout=Layout(prefetch=2))),
}
CASES = {name: (world, replace(c, data=replace(c.data, batch_packs=6))) for name, (world, c) in CASES.items()}


@pytest.fixture(scope="module")
def measured(tiny_llama_dir, tiny_llama_untied_dir, tmp_path_factory):
    """`measured(name, tied, dtype)` → (wanted loss, [(loss, worst distance, its name) of every rank])."""
    folder = tmp_path_factory.mktemp("parity")
    rows = random_packs(np.random.default_rng(0), 5, 200, 4, 320)
    shards = make_shards(folder / "shards", rows, capacity=200, align=4, cp=2)
    models = {True: tiny_llama_dir, False: tiny_llama_untied_dir}
    kinds = list(itertools.product(models, LIMIT))

    @functools.cache
    def wanted(tied, dtype):
        loss, gradients = by_documents(models[tied], PackedDataset(shards), dtype)
        path = folder / f"{tied}-{dtype}.pt"
        torch.save(gradients, path)
        return loss, path

    @functools.cache
    def run(world):
        keys = [(name, *kind) for name, case in CASES.items() if case[0] == world for kind in kinds]
        cases = [(models[tied], shards, CASES[name][1], dtype, wanted(tied, dtype)[1]) for name, tied, dtype in keys]
        of_ranks = run_ranks(packed_steps, world, cases, timeout=240)
        return dict(zip(keys, zip(*of_ranks, strict=True), strict=True))

    return lambda name, tied, dtype: (wanted(tied, dtype)[0], run(CASES[name][0])[name, tied, dtype])


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", LIMIT, ids=["fp32", "fp64"])
@pytest.mark.parametrize("name", CASES)
def test_loss_and_every_gradient_equal_the_documents_one_at_a_time(name, dtype, tied, measured):
    wanted_loss, of_ranks = measured(name, tied, dtype)
    assert len(of_ranks) == CASES[name][0]
    for loss, error, parameter in of_ranks:
        assert loss == pytest.approx(wanted_loss, rel=LIMIT[dtype])
        assert error <= LIMIT[dtype], parameter


TEXT = """The ferry leaves at nine. If the fog stays, it leaves at ten. — Who told you that? The woman at the counter,
and she has worked there for thirty years. Ein Satz auf Deutsch, damit nicht alles englisch ist; 一行中文也可以。
def f(x): return x + 1  # and some code. Numbers, too: 3.14159, 2,718, 10^9. Then there is one short line left. Yes."""


def real_packs(model_dir):
    """Three packs of 128 tokens with slots of 4, of real text cut at sentences; all but first tokens are targets."""
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    documents = [tokenizer.encode(part).ids for part in re.split(r"(?<=[.?。])\s", TEXT)]
    rows, doc = [], 0
    for k in range(3):
        ids, mask, lens, slots = [], [], [], []
        for document in documents[k:] + documents[:k]:
            slot = -(-len(document) // 4) * 4
            if len(ids) + slot > 128:
                break
            ids += document + [0] * (slot - len(document))
            mask += [0] + [1] * (len(document) - 1) + [0] * (slot - len(document))
            lens.append(len(document))
            slots.append(slot)
        columns = (ids, np.int32), (mask, np.uint8), (lens, np.int32), (slots, np.int32)
        docs = np.arange(doc, doc + len(lens)), np.zeros(len(lens), np.int32)
        rows.append((*(np.array(column, dtype) for column, dtype in columns), *docs))
        doc += len(lens)
    return rows


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.float64, 1e-8)], ids=["fp32", "fp64"])
@pytest.mark.parametrize("world", [1, 2])
def test_smollm2_packed_equals_its_documents_one_at_a_time(world, dtype, limit, smollm2_dir, tmp_path):
    shards = make_shards(tmp_path / "shards", real_packs(smollm2_dir), capacity=128, align=4, vocab_size=49152)
    wanted_loss, gradients = by_documents(smollm2_dir, PackedDataset(shards), dtype)
    torch.save(gradients, tmp_path / "wanted.pt")
    del gradients
    config = Config(data=Data(batch_packs=4))
    case = smollm2_dir, shards, config, dtype, tmp_path / "wanted.pt"
    for loss, error, parameter in run_ranks(packed_step, world, *case, timeout=280):
        assert loss == pytest.approx(wanted_loss, rel=limit)
        assert error <= limit, parameter
