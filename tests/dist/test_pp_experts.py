"""Mixtures of experts in a pipeline: under every schedule loss, every gradient, the load and the biases after the step
are those of one process, with the auxiliary losses in them."""

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

MOVED = replace(BALANCED, router_bias_rate=0.01)
DTYPE = torch.float64


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """(model of 4 layers, shards of 7 packs, loss and load of one process, file of its gradients and biases)."""
    folder = tmp_path_factory.mktemp("pp-experts")
    sizes = {"vocab_size": 320, "intermediate_size": 40, "num_hidden_layers": 4, "first_k_dense_replace": 1}
    model = write_tiny_model(folder / "model", "deepseek_v3", **sizes)
    rows = random_packs(np.random.default_rng(4), 7, 120, 1, 320, max_docs=4)
    shards = make_shards(folder / "shards", rows, capacity=120)
    config, wanted = Config(data=Data(batch_packs=8), router=MOVED), folder / "wanted.pt"
    ((alone,),) = run_ranks(write_steps, 1, [(model, shards, config, DTYPE, wanted)])
    return model, shards, alone, wanted


CASES = {
    2: [Layout(pp=2, pp_schedule=name) for name in PP_SCHEDULES],
    4: [Layout(pp=2, pp_schedule=name, ep=2) for name in ("interleaved", "zbv", "dualpipev")],
}


@pytest.mark.parametrize("world", CASES)
def test_a_step_equals_that_of_one_process_under_every_schedule(world, places):
    """7 packs in a batch of 8: one row is empty."""
    model, shards, (wanted_loss, wanted_load), wanted = places
    config = Config(data=Data(batch_packs=8), router=MOVED)
    arguments = [(model, shards, replace(config, layout=layout), DTYPE, wanted) for layout in CASES[world]]
    results = zip(CASES[world], *run_ranks(compare_steps, world, arguments, timeout=280), strict=True)
    for layout, *ranks in results:
        for loss, error, of, load in ranks:
            assert loss == pytest.approx(wanted_loss, rel=LIMIT[DTYPE]), layout
            assert error <= LIMIT[DTYPE], f"{of}: {layout}"
            assert torch.equal(load.tokens, wanted_load.tokens), layout
            assert load.dropped == 0, layout
            assert load.aux_loss == pytest.approx(wanted_load.aux_loss, rel=LIMIT[DTYPE]), layout
            assert load.z_loss == pytest.approx(wanted_load.z_loss, rel=LIMIT[DTYPE]), layout
