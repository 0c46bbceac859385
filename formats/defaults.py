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


NEEDED = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
_NEEDED_WITH = {
    "kv_lora_rank": ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), ("num_experts_per_tok",)),
}
_WHOLE = (*NEEDED, *_NEEDED_WITH, *("num_key_value_heads", "head_dim", "moe_intermediate_size", "sliding_window"))


def complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """The language model of a parsed `config.json` (its `text_config`, where it has one), absent keys filled in.

    Raises: ValueError naming a size that is missing, or is no whole number.
    """
    text = config.get("text_config", config)
    if not isinstance(text, Mapping):
        raise ValueError(f"text_config of the model's config.json must be an object, not {text!r}")
    kind = text.get("model_type", "")
    if not isinstance(kind, str):
        raise ValueError(f"model_type of the model's config.json must be a string, not {kind!r}")
    whole = {**DEFAULTS.get(kind, {}), **text}
    needed = [*NEEDED, *(key for given, keys in _NEEDED_WITH.items() if whole.get(given) for key in keys)]
    if missing := [key for key in needed if whole.get(key) is None]:
        raise ValueError(f"the model's config.json has no {missing[0]!r}, which its size and cost follow from")
    for key in dict.fromkeys((*_WHOLE, *needed)):
        value, least = whole.get(key), int(key in needed)
        if value is not None and not (isinstance(value, int) and not isinstance(value, bool) and value >= least):
            raise ValueError(f"{key} of the model's config.json must be a whole number from {least} on, not {value!r}")
    return whole
