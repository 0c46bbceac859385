"""What the values of a `config.json` may be, key by key, and which sizes of a model fit together."""

import math
from typing import Any

from train.model.config import LayerConfig, ModelConfig, Rope


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


KINDS = (
    (
        "a whole number above 0",
        lambda value: _is_whole(value) and value > 0,
        (
            *("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers"),
            *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"),
            *("original_max_position_embeddings", "num_local_experts", "num_experts", "n_routed_experts"),
            *("num_experts_per_tok", "n_group", "topk_group", "decoder_sparse_step", "no_rope_layer_interval"),
            *("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"),
            *("sliding_window_pattern", "_sliding_window_pattern"),
        ),
    ),
    (
        "a whole number, 0 or more",
        lambda value: _is_whole(value) and value >= 0,
        (
            *("sliding_window", "max_window_layers", "first_k_dense_replace", "n_shared_experts"),
            "shared_expert_intermediate_size",
        ),
    ),
    (
        "a number above 0",
        lambda value: _is_number(value) and value > 0,
        (
            *("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping", "routed_scaling_factor"),
            *("swiglu_limit", "swiglu_alpha", "rope_theta", "rope_local_base_freq", "partial_rotary_factor", "factor"),
            *("attention_factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"),
        ),
    ),
    (
        "a number, 0 or more",
        lambda value: _is_number(value) and value >= 0,
        ("rms_norm_eps", "initializer_range", "mscale", "mscale_all_dim"),
    ),
    (
        "true or false",
        lambda value: isinstance(value, bool),
        (
            *("tie_word_embeddings", "attention_bias", "mlp_bias", "qkv_bias", "use_sliding_window", "norm_topk_prob"),
            *("rope_interleave", "truncate"),
        ),
    ),
    ("an object", lambda value: isinstance(value, dict), ("rope_parameters", "rope_scaling")),
    ("a string", lambda value: isinstance(value, str), ("rope_type", "type")),
    (
        "a list of strings",
        lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value),
        ("layer_types",),
    ),
    (
        "a list of whole numbers",
        lambda value: isinstance(value, list) and all(map(_is_whole, value)),
        ("mlp_only_layers", "no_rope_layers"),
    ),
    (
        "a list of numbers above 0",
        lambda value: isinstance(value, list) and all(_is_number(item) and item > 0 for item in value),
        ("short_factor", "long_factor"),
    ),
)
_KIND_OF = {key: (says, holds) for says, holds, keys in KINDS for key in keys}


def check_kind(key: str, value: Any) -> None:
    """Raise a ValueError of one sentence when `value`, that of `key`, is neither null nor what it may be."""
    if value is not None and key in _KIND_OF:
        says, holds = _KIND_OF[key]
        if not holds(value):
            raise ValueError(f"{key} of config.json must be {says}, not {value!r}.")


def check_sizes(config: ModelConfig) -> None:
    """Raise a ValueError of one sentence when sizes do not fit together."""
    if config.num_heads % config.num_kv_heads:
        raise ValueError(
            f"num_key_value_heads {config.num_kv_heads} of config.json does not divide num_attention_heads "
            f"{config.num_heads}: every key/value head serves as many query heads."
        )
    for layer in dict.fromkeys(config.layers):
        _check_layer(layer, config)
    if config.moe is None:
        return
    moe = config.moe
    if moe.num_experts % moe.groups or (moe.groups > 1 and moe.num_experts // moe.groups < 2):
        raise ValueError(
            f"n_group {moe.groups} of config.json does not make groups of two or more of {moe.num_experts} experts."
        )
    if moe.top_groups > moe.groups:
        raise ValueError(f"topk_group {moe.top_groups} of config.json is more than the {moe.groups} groups (n_group).")
    most = moe.top_groups * moe.num_experts // moe.groups
    if moe.top_k > most:
        of = f" of {moe.top_groups} of {moe.groups} groups" if moe.groups > 1 else ""
        raise ValueError(f"num_experts_per_tok {moe.top_k} of config.json is more than the {most} experts{of}.")


def _check_layer(layer: LayerConfig, config: ModelConfig) -> None:
    if layer.window is not None and layer.window < 1:
        raise ValueError(f"sliding_window of config.json must be 1 or more tokens, not {layer.window}.")
    if layer.rope is not None:
        _check_rope(layer.rope, config.head_dim)


def _check_rope(rope: Rope, head_dim: int) -> None:
    if rope.dim % 2 or not 0 < rope.dim <= head_dim:
        raise ValueError(
            f"Rotary embeddings turn pairs of a head's dimensions, and config.json asks for {rope.dim} of {head_dim}: "
            "head_dim (times partial_rotary_factor) must be even."
        )
    if rope.kind == "llama3" and not rope.low_freq_factor < rope.high_freq_factor:
        raise ValueError(
            f"low_freq_factor {rope.low_freq_factor} of config.json must be below high_freq_factor "
            f"{rope.high_freq_factor}."
        )
    for name, factors in (("short_factor", rope.short_factors), ("long_factor", rope.long_factors)):
        if rope.kind == "longrope" and len(factors) != rope.dim // 2:
            raise ValueError(
                f"{name} of config.json must list {rope.dim // 2} numbers, one for each pair of dimensions, not "
                f"{len(factors)}."
            )
