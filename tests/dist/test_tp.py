"""Tensor and sequence parallelism: every layout gives the loss and gradients of the documents one at a time, no token
reaches another document, and what does not fit together is refused by name."""

import functools

import numpy as np
import pytest
import torch
from parity import LIMIT, by_documents, packed_steps
from tiny_models import DENSE, EAGER, write_tiny_model

from formats.dataset import PackedDataset
from make_shards import make_shards, random_packs
from ranks import run_ranks
from train.config import Config, Data, Layout, Model

SHARDS = {"align 1": (199, 1, 1), "align 4": (200, 4, 2)}  # name → (capacity, align, cp): 199 tokens are cut by nothing


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """`places(name)` → folder of a model or of shards, made when first asked for."""
    folder = tmp_path_factory.mktemp("tp")

    @functools.cache
    def make(name):
        if name in DENSE:
            return write_tiny_model(folder / name, name)
        capacity, align, cp = SHARDS[name]
        rows = random_packs(np.random.default_rng(4), 5, capacity, align, 331)
        return make_shards(folder / name, rows, capacity=capacity, align=align, cp=cp)

    return make


@pytest.fixture(scope="module")
def wanted(places, tmp_path_factory):
    """`wanted(model, shards, dtype)` → (loss, file of the gradients) of transformers, document by document."""
    folder = tmp_path_factory.mktemp("wanted")

    @functools.cache
    def compute(model, shards, dtype):
        attention = "eager" if model in EAGER else "sdpa"
        loss, gradients = by_documents(places(model), PackedDataset(places(shards)), dtype, attention)
        path = folder / f"{model}-{shards}-{dtype}.pt"
        torch.save(gradients, path)
        return loss, path

    return compute


F32, F64 = torch.float32, torch.float64


def case(model, dtype=F64, shards="align 1", micro_packs=3, recompute="none", **layout):
    data = Data(batch_packs=6, micro_packs=micro_packs)
    return model, shards, dtype, Config(data=data, layout=Layout(**layout), model=Model(recompute=recompute))


# 5 packs and a batch of 6, of which one is empty: 2 rows of 3 packs are accumulated, or 1 over dp.
CASES = {
    2: [
        *(case(model, dtype, tp=2) for model in ("llama", "olmo2") for dtype in LIMIT),
        *(case(model, tp=2, sp=False, recompute="full") for model in ("llama", "olmo2")),
        case("gemma2", tp=2, micro_packs=2, recompute="full"),
    ],
    4: [
        *(case(model, tp=4) for model in ("llama", "olmo2", "gemma2")),  # 2 key/value heads on 4 ranks
        case("olmo2", F32, tp=4, sp=False, micro_packs=6, recompute="full"),
        case("olmo2", tp=2),
        case("llama", tp=2, dp_replicate=2, micro_packs=1),
        case("llama", tp=2, cp=2, shards="align 4"),
        case("gemma2", tp=2, cp=2, cp_method="needed", sp=False),
    ],
    8: [case("llama", F32, tp=2, cp=2, shards="align 4", recompute="full")],
}


def check(world, cases, places, wanted):
    arguments = [
        (places(model), places(shards), config, dtype, wanted(model, shards, dtype)[1])
        for model, shards, dtype, config in cases
    ]
    of_ranks = run_ranks(packed_steps, world, arguments, timeout=280)
    for (model, shards, dtype, config), *results in zip(cases, *of_ranks, strict=True):
        where = f"{model} {dtype} {shards} {config.layout} {config.data} {config.model.recompute}"
        for loss, error, parameter in results:
            assert loss == pytest.approx(wanted(model, shards, dtype)[0], rel=LIMIT[dtype]), where
            assert error <= LIMIT[dtype], f"{parameter}: {where}"


@pytest.mark.parametrize("world", CASES)
def test_loss_and_every_gradient_equal_the_documents_one_at_a_time(world, places, wanted):
    check(world, CASES[world], places, wanted)
