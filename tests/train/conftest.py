"""Fixtures of whole runs: packs, flags, and a run without a break."""

import functools
import shutil

import numpy as np
import pytest
from plain_mixtures import SIZES
from tiny_models import write_tiny_model
from whole_runs import arguments, run

from make_shards import make_shards, random_packs
from ranks import run_ranks


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Folders of 10 packs to train on and 3 to evaluate on."""
    folder = tmp_path_factory.mktemp("data")
    for name, seed, count in (("train", 0, 10), ("eval", 1, 3)):
        rows = random_packs(np.random.default_rng(seed), count, 160, 4, 320)
        make_shards(folder / name, rows, capacity=160, align=4)
    return folder


@pytest.fixture
def flags(data, tiny_llama_dir, tmp_path):
    """`flags(steps=3, …)` → arguments of a run into tmp_path/out."""
    return functools.partial(arguments, data, tiny_llama_dir, tmp_path / "out")


@pytest.fixture(scope="session")
def straight(data, tiny_llama_dir, tmp_path_factory):
    """The folder of a run of all 6 steps without a break, on 2 ranks; only to be read."""
    out = tmp_path_factory.mktemp("straight") / "out"
    run_ranks(run, 2, arguments(data, tiny_llama_dir, out))
    return out


@pytest.fixture
def finished(straight, tmp_path):
    """A copy of that run, as tmp_path/out."""
    return shutil.copytree(straight, tmp_path / "out")


@pytest.fixture(scope="session")
def mixtral_dir(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("moe") / "mixtral", "mixtral", **SIZES)


@pytest.fixture(scope="session")
def deepseek_dir(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("moe") / "deepseek_v3", "deepseek_v3", **SIZES)
