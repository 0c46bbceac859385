"""Every family against transformers: logits, packed gradients and round trip of tiny random models; old keys."""

import json
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from reference import KeepDouble, distance, gradient_distances, pack, random_documents, run_by_documents
from safetensors.torch import load_file

from train import hf, hf_write
from train.model.config import Rope
from train.model.decoder import Decoder
from train.model.families import FAMILIES, model_config
from train.model.rope import inverse_frequencies

LENGTHS = [23, 61, 1, 90, 17]
SIZES = {
    "vocab_size": 199,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 64}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
LONG_ROPE = {  # one document of LENGTHS is longer than the original context, the others are not
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [1.0, 2.0, 4.0],
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
DEEPSEEK = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 28,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 14,
    "num_key_value_heads": 4,
}
DEEPSEEK_ROPE = YARN_ROPE | {"mscale": 1.0, "mscale_all_dim": 0.8, "beta_fast": 32, "beta_slow": 1}
ALTERNATING = ["sliding_attention", "full_attention"] * 2


@dataclass(frozen=True)
class Case:
    family: str
    config: str
    options: dict[str, Any] = field(default_factory=dict)
    eager: bool = False  # where transformers' SDPA leaves out the softcap
    stacked: bool = False  # the files hold the experts of a layer in one tensor


CASES = {
    "llama3-tied": Case("llama", "LlamaConfig", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "llama3-untied": Case("llama", "LlamaConfig", {"rope_parameters": LLAMA3_ROPE, "head_dim": 20}),
    "llama-biases": Case("llama", "LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "mistral-window": Case("mistral", "MistralConfig", {"sliding_window": 7}),
    "mistral-full": Case("mistral", "MistralConfig", {"sliding_window": None}),
    "qwen2": Case("qwen2", "Qwen2Config", {"tie_word_embeddings": True}),
    "qwen2-yarn": Case("qwen2", "Qwen2Config", {"rope_parameters": YARN_ROPE}),
    "qwen2-window": Case(
        "qwen2", "Qwen2Config", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2}
    ),
    "qwen3": Case("qwen3", "Qwen3Config", {"head_dim": 20}),
    "gemma2": Case(
        "gemma2",
        "Gemma2Config",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "sliding_window": 11,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
        eager=True,
    ),
    "gemma3": Case(
        "gemma3_text",
        "Gemma3TextConfig",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "sliding_window": 11,
            "layer_types": ALTERNATING,
            "rope_parameters": GEMMA3_ROPE,
        },
    ),
    "phi3": Case("phi3", "Phi3Config", {"sliding_window": 50}),
    "phi3-partial-rotary": Case(
        "phi3",
        "Phi3Config",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
    "phi3-longrope": Case("phi3", "Phi3Config", {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 64}),
    "smollm3": Case("smollm3", "SmolLM3Config", {"no_rope_layer_interval": 2}),
    "olmo2": Case("olmo2", "Olmo2Config"),
    "mixtral": Case("mixtral", "MixtralConfig", {"num_local_experts": 6, "num_experts_per_tok": 2}),
    "mixtral-stacked": Case("mixtral", "MixtralConfig", {"num_local_experts": 4, "sliding_window": 9}, stacked=True),
    "qwen3-moe": Case("qwen3_moe", "Qwen3MoeConfig", EXPERTS | {"norm_topk_prob": True, "mlp_only_layers": [1]}),
    "qwen3-moe-stacked": Case("qwen3_moe", "Qwen3MoeConfig", EXPERTS | {"decoder_sparse_step": 2}, stacked=True),
    "qwen2-moe": Case("qwen2_moe", "Qwen2MoeConfig", EXPERTS | {"shared_expert_intermediate_size": 40}),
    "qwen2-moe-window": Case(
        "qwen2_moe",
        "Qwen2MoeConfig",
        EXPERTS
        | {"shared_expert_intermediate_size": 40, "norm_topk_prob": True, "qkv_bias": False}
        | {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 3},
        stacked=True,
    ),
    "deepseek-v3": Case("deepseek_v3", "DeepseekV3Config", DEEPSEEK | {"rope_parameters": DEEPSEEK_ROPE}),
    "deepseek-v3-stacked": Case(
        "deepseek_v3",
        "DeepseekV3Config",
        DEEPSEEK
        | {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "rope_interleave": False, "v_head_dim": 20}
        | {"attention_bias": True, "norm_topk_prob": False},
        stacked=True,
    ),
    "gpt-oss": Case(
        "gpt_oss",
        "GptOssConfig",
        {"num_local_experts": 8, "num_experts_per_tok": 3, "head_dim": 16, "sliding_window": 9, "swiglu_limit": 1.0},
    ),
}


@pytest.fixture(scope="module", params=CASES, ids=list(CASES))
def case(request, tmp_path_factory):
    """(folder of a random model of the family, the case)."""
    case = CASES[request.param]
    config = getattr(transformers, case.config)(**(SIZES | case.options))
    folder = tmp_path_factory.mktemp("families") / request.param
    with torch.random.fork_rng():
        torch.manual_seed(11)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            offset = 1.0 if "norm" in name and not case.family.startswith("gemma") else 0.0
            torch.nn.init.normal_(parameter, mean=offset, std=0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                torch.nn.init.normal_(buffer, std=0.2)
    model.save_pretrained(folder, save_original_format=not case.stacked)
    return folder, case


def load(folder, case, dtype):
    with torch.device("meta"):
        ours = Decoder(hf.read_config(folder)).to(dtype)
    ours.to_empty(device="cpu")
    hf.load_weights(ours, folder)
    options = {"attn_implementation": "eager"} if case.eager else {}
    if ours.config.moe is not None:
        options["experts_implementation"] = "eager"  # the only one that runs in float64
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    return ours, theirs.to(dtype)


def test_every_family_is_covered():
    assert {case.family for case in CASES.values()} == FAMILIES.keys()


def test_logits_equal_transformers(case):
    ours, theirs = load(*case, torch.float32)
    documents = random_documents(LENGTHS, 199)
    ids, positions, _, segments = pack(documents)
    with torch.no_grad():
        packed = ours(ids, positions, segments).split(LENGTHS)
        for (document, _), logits in zip(documents, packed, strict=True):
            expected = theirs(document[None], use_cache=False).logits[0]
            assert expected.std() > 0.1  # not a comparison of zeros
            assert (logits - expected).abs().max() <= 1e-4


def test_packed_equals_separate(case):
    ours, theirs = load(*case, torch.float64)
    documents = random_documents(LENGTHS, 199)
    with torch.no_grad():  # makes longrope's table of long documents, in float32 as it is meant to be
        theirs(torch.zeros(1, 90, dtype=torch.int64), use_cache=False)
    with KeepDouble():
        total, gradients = run_by_documents(theirs, documents)
    ids, positions, labels, segments = pack(documents, align=4, tail=5)
    loss = ours(ids, positions, segments, labels)
    loss.backward()
    assert distance(loss, total) <= 1e-9
    distances = gradient_distances(ours, gradients)
    worst = max(distances, key=distances.get)
    assert distances[worst] <= 1e-9, worst


def test_round_trip_is_bit_equal(case, tmp_path):
    folder, _ = case
    ours, _ = load(*case, torch.float32)
    hf_write.save_weights(ours, folder, tmp_path / "out")
    before, after = (load_file(path / hf.WEIGHTS) for path in (folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert hf.read_config(tmp_path / "out") == ours.config


def test_no_token_reaches_another_document(case):
    """To the bit; with experts nearly: a changed token may visit others, and a product with one row more may add in
    another order."""
    ours, _ = load(*case, torch.float64)
    ids, positions, _, segments = pack(random_documents(LENGTHS, 199))
    own = slice(sum(LENGTHS[:3]), sum(LENGTHS[:4]))
    with torch.no_grad():
        before = ours(ids, positions, segments)
        ids[own.start + 5] = (ids[own.start + 5] + 1) % 199
        moved = (before - ours(ids, positions, segments)).abs().amax(1)
    moved = moved > (0.0 if ours.config.moe is None else 1e-12)
    assert moved[own][5:7].all()
    moved[own] = False
    assert not moved.any()


def read(tmp_path, **config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    return hf.read_config(tmp_path)


def test_gemma3_as_published_before_transformers_5(tmp_path):
    """google/gemma-3-1b-it's own keys."""
    config = read(
        tmp_path,
        architectures=["Gemma3ForCausalLM"],
        attention_bias=False,
        attention_dropout=0.0,
        attn_logit_softcapping=None,
        bos_token_id=2,
        cache_implementation="hybrid",
        eos_token_id=[1, 106],
        final_logit_softcapping=None,
        head_dim=256,
        hidden_activation="gelu_pytorch_tanh",
        hidden_size=1152,
        initializer_range=0.02,
        intermediate_size=6912,
        max_position_embeddings=32768,
        model_type="gemma3_text",
        num_attention_heads=4,
        num_hidden_layers=26,
        num_key_value_heads=1,
        pad_token_id=0,
        query_pre_attn_scalar=256,
        rms_norm_eps=1e-06,
        rope_local_base_freq=10000,
        rope_scaling=None,
        rope_theta=1000000,
        sliding_window=512,
        sliding_window_pattern=6,
        torch_dtype="bfloat16",
        transformers_version="4.50.0.dev0",
        use_cache=True,
        vocab_size=262144,
    )
    assert config.tied_embeddings
    assert [layer.window for layer in config.layers[:7]] == [512] * 5 + [None, 512]
    assert {(layer.window, layer.rope.theta) for layer in config.layers} == {(512, 10000), (None, 1000000)}


def test_llama3_as_published_before_transformers_5(tmp_path):
    """meta-llama/Llama-3.2-1B's own keys."""
    config = read(
        tmp_path,
        architectures=["LlamaForCausalLM"],
        attention_bias=False,
        attention_dropout=0.0,
        bos_token_id=128000,
        eos_token_id=128001,
        head_dim=64,
        hidden_act="silu",
        hidden_size=2048,
        initializer_range=0.02,
        intermediate_size=8192,
        max_position_embeddings=131072,
        mlp_bias=False,
        model_type="llama",
        num_attention_heads=32,
        num_hidden_layers=16,
        num_key_value_heads=8,
        pretraining_tp=1,
        rms_norm_eps=1e-05,
        rope_scaling={
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        rope_theta=500000.0,
        tie_word_embeddings=True,
        torch_dtype="bfloat16",
        transformers_version="4.45.0.dev0",
        use_cache=True,
        vocab_size=128256,
    )
    rope = Rope(500000.0, 64, "llama3", factor=32.0, original_context=8192)
    assert config.layers == (config.layers[0],) * 16
    assert config.layers[0].rope == rope
    frequencies = inverse_frequencies(rope)
    plain = inverse_frequencies(Rope(500000.0, 64))
    assert frequencies[0] == plain[0]  # short waves stay
    assert frequencies[-1] == plain[-1] / 32  # long ones are stretched by the factor


def test_qwen25_as_published_before_transformers_5(tmp_path):
    """Qwen/Qwen2.5-0.5B's own keys: a window is written down and not used."""
    config = read(
        tmp_path,
        architectures=["Qwen2ForCausalLM"],
        attention_dropout=0.0,
        bos_token_id=151643,
        eos_token_id=151643,
        hidden_act="silu",
        hidden_size=896,
        initializer_range=0.02,
        intermediate_size=4864,
        max_position_embeddings=32768,
        max_window_layers=24,
        model_type="qwen2",
        num_attention_heads=14,
        num_hidden_layers=24,
        num_key_value_heads=2,
        rms_norm_eps=1e-06,
        rope_theta=1000000.0,
        sliding_window=32768,
        tie_word_embeddings=True,
        torch_dtype="bfloat16",
        transformers_version="4.40.1",
        use_cache=True,
        use_mrope=False,
        use_sliding_window=False,
        vocab_size=151936,
    )
    assert {layer.window for layer in config.layers} == {None}
    assert (config.qkv_bias, config.output_bias, config.head_dim) == (True, False, 64)


@pytest.mark.parametrize("name", ["Gemma2", "Gemma3Text"])
def test_in_bfloat16_embeddings_are_scaled_by_what_bfloat16_makes_of_the_scale(name):
    config = getattr(transformers, f"{name}Config")(**SIZES, head_dim=16)
    reference = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    theirs = reference.get_input_embeddings()
    ours = Decoder(model_config(config.to_dict())).bfloat16()
    ours.embed_tokens.weight = theirs.weight
    ids = torch.arange(SIZES["vocab_size"])
    assert torch.equal(ours._embed(ids), theirs(ids))
    assert not torch.equal(ours._embed(ids), theirs.weight[ids] * ours.config.embedding_scale), (
        "not what 48 ** 0.5 makes"
    )


def test_layer_types_that_are_not_known_are_refused(tmp_path):
    config = transformers.Qwen2Config(**SIZES).to_dict() | {"architectures": ["Qwen2ForCausalLM"]}
    config["layer_types"] = ["full_attention", "linear_attention", "full_attention", "full_attention"]
    with pytest.raises(ValueError, match="not linear_attention"):
        read(tmp_path, **config)
    config["layer_types"] = ["full_attention"]
    with pytest.raises(ValueError, match="each of the 4 layers, not for 1"):
        read(tmp_path, **config)
