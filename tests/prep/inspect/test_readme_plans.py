"""The commands of the README that forecast training print the figures that stand beside them, and the trainer lays its
models out as its rows say: on as many ranks as they name, of which one is real."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from make_shards import make_shards, random_packs
from prep.cli import main
from prep.inspect.memory import Layout, memory
from ranks import run_ranks

README = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^prep plan (PACKS .*--model .*?) +# ([0-9.]+) GiB$", README, re.MULTILINE)
ROWS = re.findall(r"^\| (\S+), \d+k \| (\d+) \| `(.*)` \|$", README, re.MULTILINE)
LLAMA = {"model_type": "llama", "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False}
MODELS = {  # of each config.json what says how large the model is
    "Llama-3.1-8B": {
        **LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
    },
    "Llama-3.1-70B": {
        **LLAMA,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_hidden_layers": 80,
    },
    "Qwen3-30B-A3B": {
        "model_type": "qwen3_moe",
        "decoder_sparse_step": 1,
        "head_dim": 128,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "mlp_only_layers": [],
        "moe_intermediate_size": 768,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
        "vocab_size": 151936,
    },
    "DeepSeek-V3": {
        "model_type": "deepseek_v3",
        "first_k_dense_replace": 3,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "kv_lora_rank": 512,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_attention_heads": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 61,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "tie_word_embeddings": False,
        "v_head_dim": 128,
        "vocab_size": 129280,
    },
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("plans")
    make_shards(root / "PACKS", random_packs(np.random.default_rng(0), 5, 400, 1, 320), capacity=400)
    for name, config in MODELS.items():
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(config))
    return root


def test_every_model_of_the_table_has_its_command():
    assert [re.search(r"--model (\S+)", command)[1] for command, _ in COMMANDS] == list(MODELS)
    assert [name for name, *_ in ROWS] == list(MODELS)


@pytest.mark.parametrize(("command", "figure"), COMMANDS, ids=[*MODELS])
def test_a_command_prints_its_figure_and_the_batch_of_its_row(command, figure, root, monkeypatch):
    monkeypatch.chdir(root)
    result = CliRunner().invoke(main, ["plan", *shlex.split(command)])
    assert result.exit_code == 0, result.output
    assert re.search(r"memory a GPU at its highest \(estimate\) +([0-9.]+) GiB", result.output)[1] == figure
    model, gpus = (re.search(rf"--{flag} (\S+)", command)[1] for flag in ("model", "gpus"))
    (row,) = re.findall(rf"^\| {re.escape(model)}, .*$", README, re.MULTILINE)
    batch = re.search(r"--batch-packs +([0-9,]+)", result.output)[1].replace(",", "")
    assert f"--batch-packs {batch}" in row
    assert f"| {gpus} |" in row
    for axis in ("dp-replicate", "cp", "tp", "pp", "ep"):
        (planned, trained) = (re.search(rf"--{axis} (\d+)", text) for text in (command, row))
        assert (planned[1] if planned else "1") == (trained[1] if trained else "1"), axis


def fullest(config, flags, gpus):
    """Parameters that the fullest of so many ranks holds: the first of each pipeline stage, in a world that is fake."""
    import torch
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from train.flags import parse
    from train.mesh import build_mesh
    from train.model.decoder import Decoder
    from train.model.families import model_config
    from train.parallel.apply import parallelize

    given = parse(["--shards", "PACKS", "--model", "DIR", "--out", "OUT", "--recompute", "full", *flags])
    counts = []
    for rank in range(0, gpus, gpus // given.layout.pp):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=gpus)
        mesh = build_mesh(given.layout, torch.device("cpu"), experts=model_config(config).moe is not None)
        with torch.device("meta"):
            model = Decoder(model_config(config))
        parameters = list(parallelize(model, mesh, given).parameters())
        assert all(isinstance(p, DTensor) for p in parameters)
        counts.append(sum(p.to_local().numel() for p in parameters))
        dist.destroy_process_group()
    return max(counts)


@pytest.mark.parametrize(("name", "gpus", "flags"), ROWS, ids=[row[0] for row in ROWS])
def test_the_trainer_lays_out_a_row_as_the_plan_has_it(name, gpus, flags):
    config = MODELS[name] | {"max_position_embeddings": 131072, "rms_norm_eps": 1e-6}
    (count,) = run_ranks(fullest, 1, config, shlex.split(flags), int(gpus), process_group=False)
    sizes = {axis: int(size) for axis, size in re.findall(r"--(pp|dp-replicate|cp|tp|ep) (\d+)", flags)}
    replicas = sizes.pop("dp-replicate", 1)
    dp_shard = int(gpus) // (replicas * sizes.get("pp", 1) * sizes.get("cp", 1) * sizes.get("tp", 1))
    planned = memory(config, Layout(8192, dp_replicate=replicas, dp_shard=dp_shard, rows=16, **sizes))
    assert planned["parameters"] / 4 == pytest.approx(count, rel=1e-3)
