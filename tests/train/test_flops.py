"""FLOPs of a step against counts made another way, and what is logged from them."""

import numpy as np
import pytest
import torch
import transformers
from tiny_models import write_tiny_model
from whole_runs import arguments, read_metrics, run

from formats.cost import Model
from make_shards import make_shards, random_packs
from ranks import run_ranks
from train import hf
from train.data import PackedLoader, Schedule, open_shards
from train.flops import StepFlops, peak_flops
from train.model.decoder import Decoder

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 199,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {"sliding_window": 7, "head_dim": 20}),
    "qwen2": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2}),
    "qwen3": ("Qwen3Config", {"head_dim": 20}),
    "gemma2": ("Gemma2Config", {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 8}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 8}),
    "phi3": ("Phi3Config", {}),
    "olmo2": ("Olmo2Config", {}),
    "smollm3": ("SmolLM3Config", {}),
}


@pytest.fixture(params=sorted(CONFIGS))
def folder(request, tmp_path):
    name, options = CONFIGS[request.param]
    getattr(transformers, name)(**{**SIZES, **options}, architectures=[]).save_pretrained(tmp_path)
    return tmp_path


def loader_of(folder, dp_size, dp_rank, windows):
    dataset = open_shards(str(folder))
    schedule = Schedule(len(dataset), "shuffle", 0, 0, 5, 2)
    return PackedLoader(dataset, schedule, dp_rank=dp_rank, dp_size=dp_size, device=CPU, windows=windows)


def test_a_models_flops_are_those_of_its_matrices_and_windows(folder):
    config = hf.read_config(folder)
    with torch.device("meta"):
        model = Decoder(config)
    counted = Model.from_config(transformers.AutoConfig.from_pretrained(folder).to_dict())
    matrices = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert counted.linear == 2 * (matrices + config.vocab_size * config.hidden_size)
    assert counted.pair == 4 * config.num_heads * config.head_dim
    assert list(counted.windows) == [layer.window or 0 for layer in config.layers]
    assert StepFlops(folder).windows == tuple(sorted({layer.window for layer in config.layers if layer.window}))


@pytest.mark.parametrize("dp_size", [1, 3])
def test_a_steps_flops_count_every_visible_pair_once(dp_size, tmp_path):
    transformers.MistralConfig(**SIZES, sliding_window=7).save_pretrained(tmp_path)
    rows = random_packs(np.random.default_rng(0), 11, 160, 4, 199)
    shards = make_shards(tmp_path / "shards", rows, capacity=160, align=4)
    flops = StepFlops(tmp_path)
    loaders = [loader_of(shards, dp_size, rank, flops.windows) for rank in range(dp_size)]
    order = loaders[0]._schedule.epoch_order(0)
    for packs in (order[:5], order[5:10], order[10:]):
        facts = [loader.next_step() for loader in loaders]
        for loader in loaders:
            for _ in loader.rows():
                pass
        pairs = {7: sum(loader.pairs[7] for loader in loaders)}
        lengths = [int(n) for pack in packs for n in rows[pack][2]]
        visible = sum(min(query + 1, 7) for n in lengths for query in range(n))
        assert pairs[7] == visible
        linear = 2 * sum(lengths) * (4 * (48 * 48 * 2 + 48 * 24 * 2 + 3 * 48 * 80) + 199 * 48)
        assert flops.of(facts[0], pairs) == 3 * (linear + 4 * 4 * 12 * 4 * visible)
    for loader in loaders:
        loader.close()


def test_what_a_run_on_two_ranks_logs_counts_the_pairs_of_both(tmp_path):
    folder, out = write_tiny_model(tmp_path / "model", "mistral", vocab_size=320), tmp_path / "out"
    rows = random_packs(np.random.default_rng(0), 4, 160, 4, 320)
    make_shards(tmp_path / "train", rows, capacity=160, align=4, order="input")
    run_ranks(run, 2, arguments(tmp_path, folder, out, steps=1))
    (line,) = read_metrics(out)
    lengths = [int(n) for row in rows for n in row[2]]
    visible = sum(min(query + 1, 7) for n in lengths for query in range(n))
    linear = 2 * sum(lengths) * (2 * (48 * 48 * 2 + 48 * 24 * 2 + 3 * 48 * 81) + 320 * 48)
    flops = 3 * (linear + 4 * 4 * 12 * 2 * visible)
    assert line["flops_per_second_per_device"] * line["step_seconds"] * 2 == pytest.approx(flops)


def test_without_windows_the_index_is_enough(tmp_path):
    transformers.LlamaConfig(**SIZES).save_pretrained(tmp_path)
    rows = random_packs(np.random.default_rng(0), 5, 160, 4, 199)
    flops = StepFlops(tmp_path)
    loader = loader_of(make_shards(tmp_path / "shards", rows, capacity=160, align=4), 1, 0, flops.windows)
    lengths = [int(n) for row in rows for n in row[2]]
    pairs = sum(n * (n + 1) // 2 for n in lengths)
    linear = 2 * sum(lengths) * (4 * (48 * 48 * 2 + 48 * 24 * 2 + 3 * 48 * 80) + 199 * 48)
    assert flops.of(loader.next_step(), {}) == 3 * (linear + 4 * 4 * 12 * 4 * pairs)
    loader.close()


def test_no_peak_is_made_up_for_a_device_that_is_not_known():
    assert peak_flops(0.0, CPU, torch.bfloat16) is None
    assert peak_flops(2.0, CPU, torch.float32) == 2e12


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H200", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40", 181.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_the_peak_of_a_known_gpu_is_that_of_its_data_sheet(name, tflops, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    peak = peak_flops(0.0, torch.device("cuda"), torch.bfloat16)
    assert peak == (None if tflops is None else tflops * 1e12)
    assert peak_flops(0.0, torch.device("cuda"), torch.float32) is None
