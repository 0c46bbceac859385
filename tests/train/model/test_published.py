"""Files `config.json` as published, key by key: they are read, and every layer has the window it should have.

The numbers of layers of a kind are counted on the models' own definition in transformers.
"""

import json

import pytest
import transformers

from formats.cost import Model
from train.flops import StepFlops
from train.model.families import FAMILIES, model_config

ALL = {"attention_dropout": 0.0, "initializer_range": 0.02, "rms_norm_eps": 1e-06, "use_cache": True}
ALL |= {"torch_dtype": "bfloat16", "transformers_version": "4.45.0", "bos_token_id": 2, "eos_token_id": 1}


def gemma2(hidden, layers, heads, kv_heads, width, **more):
    return {
        **ALL,
        "architectures": ["Gemma2ForCausalLM"],
        "attention_bias": False,
        "attn_logit_softcapping": 50.0,
        "cache_implementation": "hybrid",
        "final_logit_softcapping": 30.0,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": hidden,
        "intermediate_size": width,
        "max_position_embeddings": 8192,
        "model_type": "gemma2",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "pad_token_id": 0,
        "query_pre_attn_scalar": 256,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "vocab_size": 256000,
        **more,
    }


def gemma3(hidden, layers, heads, width, **more):
    return {
        **ALL,
        "architectures": ["Gemma3ForCausalLM"],
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": hidden,
        "intermediate_size": width,
        "max_position_embeddings": 32768,
        "model_type": "gemma3_text",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": 1,
        "pad_token_id": 0,
        "query_pre_attn_scalar": 256,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": 512,
        "vocab_size": 262144,
        **more,
    }


def plain(kind, architecture, hidden, layers, heads, kv_heads, width, vocabulary, **more):
    return {
        **ALL,
        "architectures": [architecture],
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": width,
        "max_position_embeddings": 32768,
        "model_type": kind,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rope_theta": 1000000.0,
        "vocab_size": vocabulary,
        **more,
    }


QWEN = {"sliding_window": 4096, "use_sliding_window": True}
PHI4_MINI = plain(
    *("phi3", "Phi3ForCausalLM", 3072, 32, 24, 8, 8192, 200064),
    _name_or_path="Phi-4-mini-instruct",
    attention_bias=False,
    auto_map={"AutoConfig": "configuration_phi3.Phi3Config", "AutoTokenizer": "Xenova/gpt-4o"},
    embd_pdrop=0.0,
    full_attn_mod=1,
    interpolate_factor=1,
    lm_head_bias=False,
    mlp_bias=False,
    original_max_position_embeddings=4096,
    pad_token_id=199999,
    partial_rotary_factor=0.75,
    resid_pdrop=0.0,
    rope_scaling={"long_factor": [1 + i for i in range(48)], "short_factor": [1.0] * 48, "type": "longrope"},
    sliding_window=262144,
    tie_word_embeddings=True,
) | {"max_position_embeddings": 131072, "rope_theta": 10000.0}
QWEN3_CODER = plain(
    *("qwen3_moe", "Qwen3MoeForCausalLM", 2048, 48, 32, 4, 5472, 151936),
    decoder_sparse_step=1,
    head_dim=128,
    max_window_layers=28,
    mlp_only_layers=[],
    moe_intermediate_size=768,
    norm_topk_prob=True,
    num_experts=128,
    num_experts_per_tok=8,
    output_router_logits=False,
    qkv_bias=False,
    router_aux_loss_coef=0.0,
    shared_expert_intermediate_size=0,
    sliding_window=None,
    use_qk_norm=True,
    use_sliding_window=False,
)
PUBLISHED = {  # config.json, layers with a window
    "gemma-2-2b": (gemma2(2304, 26, 8, 4, 9216), 13),
    "gemma-2-9b": (gemma2(3584, 42, 16, 8, 14336, sliding_window_size=4096), 21),
    "gemma-3-1b": (gemma3(1152, 26, 4, 6912, sliding_window_pattern=6), 22),
    "gemma-3-270m": (gemma3(640, 18, 4, 2048, _sliding_window_pattern=6, use_bidirectional_attention=False), 15),
    "gemma-3, both names": (gemma3(640, 18, 4, 2048, _sliding_window_pattern=6, sliding_window_pattern=6), 15),
    "mistral-7b-v0.1": (
        plain("mistral", "MistralForCausalLM", 4096, 32, 32, 8, 14336, 32000, sliding_window=4096),
        32,
    ),
    "mistral-7b-v0.3": (
        plain("mistral", "MistralForCausalLM", 4096, 32, 32, 8, 14336, 32768, sliding_window=None),
        0,
    ),
    "phi-3-mini-4k": (plain("phi3", "Phi3ForCausalLM", 3072, 32, 32, 32, 8192, 32064, sliding_window=2047), 32),
    "phi-4-mini": (PHI4_MINI, 32),
    "qwen2, windows in the last layers": (
        plain("qwen2", "Qwen2ForCausalLM", 896, 24, 14, 2, 4864, 151936, max_window_layers=21, **QWEN),
        3,
    ),
    "qwen3-0.6b": (
        plain(
            *("qwen3", "Qwen3ForCausalLM", 1024, 28, 16, 8, 3072, 151936),
            attention_bias=False,
            head_dim=128,
            max_window_layers=28,
            sliding_window=None,
            use_sliding_window=False,
        ),
        0,
    ),
    "qwen2-moe, windows": (
        plain(
            *("qwen2_moe", "Qwen2MoeForCausalLM", 2048, 24, 16, 16, 5632, 151936),
            decoder_sparse_step=1,
            max_window_layers=21,
            moe_intermediate_size=1408,
            norm_topk_prob=False,
            num_experts=60,
            num_experts_per_tok=4,
            shared_expert_intermediate_size=5632,
            **QWEN,
        ),
        11,
    ),
    "qwen3-coder-30b-a3b": (QWEN3_CODER, 0),
    "gpt-oss-20b before layer_types": (
        plain(
            *("gpt_oss", "GptOssForCausalLM", 2880, 24, 64, 8, 2880, 201088),
            head_dim=64,
            num_local_experts=32,
            num_experts_per_tok=4,
            sliding_window=128,
        ),
        12,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_read_with_every_window_where_it_belongs(name, tmp_path):
    config, windowed = PUBLISHED[name]
    windows = [layer.window or 0 for layer in model_config(config).layers]
    assert windows.count(config["sliding_window"] or 0) == (windowed or len(windows))
    assert windows.count(0) == len(windows) - windowed
    reference = getattr(transformers, FAMILIES[config["model_type"]].architecture.replace("ForCausalLM", "Config"))
    if config["model_type"].startswith("gemma3"):
        reference = transformers.Gemma3TextConfig
    if kinds := getattr(reference(**config), "layer_types", None):
        assert windows == [config["sliding_window"] if kind == "sliding_attention" else 0 for kind in kinds]
    assert list(Model.from_config(config).windows) == windows, "what orders packs by cost counts the same"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert list(StepFlops(tmp_path)._model.windows) == windows, "and so does MFU"


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("gemma-2-9b", "sliding_window_size", 512),
        ("phi-4-mini", "full_attn_mod", 2),
        ("phi-4-mini", "lm_head_bias", True),
        ("qwen3-coder-30b-a3b", "use_qk_norm", False),
        ("qwen3-coder-30b-a3b", "qkv_bias", True),
        ("qwen3-coder-30b-a3b", "shared_expert_intermediate_size", 512),
    ],
)
def test_a_feature_that_is_not_there_is_refused_as_soon_as_it_matters(name, key, value):
    with pytest.raises(ValueError, match=key):
        model_config(PUBLISHED[name][0] | {key: value})


def test_what_tools_note_in_a_config_is_no_part_of_the_model():
    """As transformers 4.46 to 4.51, Unsloth and gradient checkpointing have left it in published files."""
    noted = {"_attn_implementation_autoset": True, "unsloth_fixed": True, "gradient_checkpointing": True}
    noted |= {"attn_implementation": "flash_attention_2", "tokenizer_class": "GemmaTokenizer", "_commit_hash": "0" * 40}
    config, _ = PUBLISHED["gemma-2-9b"]
    assert model_config(config | noted) == model_config(config)
