"""What a Hugging Face `config.json` means where it leaves keys out: one table, for trainer and `prep plan` alike."""

from collections.abc import Mapping
from typing import Any

_QWEN = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
_GEMMA = {"num_key_value_heads": 4, "head_dim": 256, "sliding_window": 4096, "tie_word_embeddings": True}

DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": _QWEN | {"num_key_value_heads": 32},
    "qwen3": _QWEN | {"num_key_value_heads": 32, "head_dim": 128},
    "gemma2": _GEMMA | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3_text": _GEMMA,
    "phi3": {"rms_norm_eps": 1e-5},
    "smollm3": {
        "num_key_value_heads": 4,
        "no_rope_layer_interval": 4,
        "rope_theta": 2e6,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
    },
    "olmo2": {"rms_norm_eps": 1e-5},
    "mixtral": {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6},
    "qwen2_moe": _QWEN | {"num_key_value_heads": 16, "qkv_bias": True},
    "qwen3_moe": {"num_key_value_heads": 4, "sliding_window": 4096, "use_sliding_window": False},
    "deepseek_v3": {"q_lora_rank": 1536, "first_k_dense_replace": 3},
    "gpt_oss": {
        "num_key_value_heads": 8,
        "head_dim": 64,
        "attention_bias": True,
        "rms_norm_eps": 1e-5,
        "sliding_window": 128,
        "rope_theta": 150000.0,
    },
}
"""By `model_type`: what the published configuration class takes for absent keys, where other families take something
else. A key that is there and null is not absent."""


def complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """The language model of a parsed `config.json` (its `text_config`, where it has one), absent keys filled in."""
    text = config.get("text_config", config)
    return {**DEFAULTS.get(text.get("model_type"), {}), **text}
