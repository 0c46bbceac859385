"""Mixtures of experts in a pipeline: under every schedule loss, every gradient, the load and the biases after the step
are those of one process, with the auxiliary losses in them."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from mixture_steps import BALANCED, compare_steps, write_steps
from parity import LIMIT
from tiny_models import write_tiny_model

from make_shards import make_shards, random_packs
from ranks import run_ranks
from train.config import PP_SCHEDULES, Config, Data, Layout

DTYPE = torch.float64
SIZES = {"vocab_size": 320, "intermediate_size": 40, "num_hidden_layers": 4}
FAMILIES = {"deepseek_v3": {"first_k_dense_replace": 1}, "qwen2_moe": {}, "gpt_oss": {}}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """family → (model of 4 layers, shards of 7 packs, config, loss and load of one process, file of its gradients and
    biases)."""
    folder = tmp_path_factory.mktemp("pp-experts")
    rows = random_packs(np.random.default_rng(4), 7, 120, 1, 320, max_docs=4)
    shards = make_shards(folder / "shards", rows, capacity=120)

    @functools.cache
    def compute(family):
        model, wanted = write_tiny_model(folder / family, family, **SIZES, **FAMILIES[family]), folder / f"{family}.pt"
        router = replace(BALANCED, router_bias_rate=0.01 if family == "deepseek_v3" else 0.0)
        config = Config(data=Data(batch_packs=8), router=router)  # one row is empty
        ((result,),) = run_ranks(write_steps, 1, [(model, shards, config, DTYPE, wanted)])
        return model, shards, config, result, wanted

    return compute


def case(schedule, family="deepseek_v3", **layout):
    return family, Layout(**({"pp": 2, "pp_schedule": schedule} | layout))


CASES = {
    2: [case(name) for name in PP_SCHEDULES],
    4: [case(name, ep=2) for name in ("interleaved", "zbv", "dualpipev")],
}
PRODUCT = {
    2: [case(name, family) for name in PP_SCHEDULES for family in ("qwen2_moe", "gpt_oss")],
    4: [
        *(case(name, "qwen2_moe", ep=2) for name in PP_SCHEDULES),
        *(case(name, "gpt_oss", tp=2) for name in PP_SCHEDULES),
        *(case(name, ep=2, tp=2) for name in PP_SCHEDULES),
        *(case(name, ep=2, cp=2) for name in PP_SCHEDULES),
        *(case(name, pp=4, pp_split="1,1,1,1") for name in ("gpipe", "1f1b")),
    ],
}


def check(world, cases, alone):
    arguments = []
    for family, layout in cases:
        model, shards, config, _, wanted = alone(family)
        arguments.append((model, shards, replace(config, layout=layout), DTYPE, wanted))
    for (family, layout), *ranks in zip(cases, *run_ranks(compare_steps, world, arguments, timeout=280), strict=True):
        where, (wanted_loss, wanted_load) = f"{family} {layout}", alone(family)[3]
        for loss, error, of, load in ranks:
            assert loss == pytest.approx(wanted_loss, rel=LIMIT[DTYPE]), where
            assert error <= LIMIT[DTYPE], f"{of}: {where}"
            assert torch.equal(load.tokens, wanted_load.tokens), where
            assert load.dropped == 0, where
            assert load.aux_loss == pytest.approx(wanted_load.aux_loss, rel=LIMIT[DTYPE]), where
            assert load.z_loss == pytest.approx(wanted_load.z_loss, rel=LIMIT[DTYPE]), where


@pytest.mark.parametrize("world", CASES)
def test_a_step_equals_that_of_one_process_under_every_schedule(world, alone):
    check(world, CASES[world], alone)


@pytest.mark.slow
@pytest.mark.parametrize("world", PRODUCT)
def test_and_so_does_the_whole_product(world, alone):
    check(world, PRODUCT[world], alone)
