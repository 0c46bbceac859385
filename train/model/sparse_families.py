"""Families whose layers, or some of them, hold a mixture of experts."""

import math
from dataclasses import replace
from typing import Any

from train.model.config import LayerConfig, MlaConfig, ModelConfig, MoeConfig
from train.model.family import (
    LLAMA_BLOCK,
    QK_NORMS,
    Family,
    read_common,
    read_head_dim,
    read_sliding,
    with_windows,
)
from train.model.keys import Keys, read_rope

QWEN_EXPERTS = {
    "mlp.router": "mlp.gate",
    "mlp.experts.gate_proj": "mlp.experts.{}.gate_proj.weight",
    "mlp.experts.up_proj": "mlp.experts.{}.up_proj.weight",
    "mlp.experts.down_proj": "mlp.experts.{}.down_proj.weight",
}
SHARED_EXPERT = {f"mlp.shared.{name}": f"mlp.shared_expert.{name}" for name in ("gate_proj", "up_proj", "down_proj")}
SHARED_EXPERTS = {ours: theirs.replace("expert.", "experts.") for ours, theirs in SHARED_EXPERT.items()}
STACKED = {
    "mlp.experts.gate_proj": "mlp.experts.gate_up_proj",
    "mlp.experts.up_proj": "mlp.experts.gate_up_proj",
    "mlp.experts.down_proj": "mlp.experts.down_proj",
}
STACKED_BIAS = {f"{ours}_bias": f"{theirs}_bias" for ours, theirs in STACKED.items()}
FUSED = {"mlp.experts.gate_up_proj": ("mlp.experts.gate_proj", "mlp.experts.up_proj")}
FUSED_BIAS = {f"{name}_bias": tuple(f"{part}_bias" for part in parts) for name, parts in FUSED.items()}
MIXTRAL_EXPERTS = {
    "mlp.router": "block_sparse_moe.gate",
    "mlp.experts.gate_proj": "block_sparse_moe.experts.{}.w1.weight",
    "mlp.experts.up_proj": "block_sparse_moe.experts.{}.w3.weight",
    "mlp.experts.down_proj": "block_sparse_moe.experts.{}.w2.weight",
}
DEEPSEEK_BLOCK = (
    LLAMA_BLOCK
    | {
        "attention.q_a_proj": "self_attn.q_a_proj",
        "attention.q_a_norm": "self_attn.q_a_layernorm",
        "attention.q_b_proj": "self_attn.q_b_proj",
        "attention.kv_a_proj": "self_attn.kv_a_proj_with_mqa",
        "attention.kv_a_norm": "self_attn.kv_a_layernorm",
        "attention.kv_b_proj": "self_attn.kv_b_proj",
        "mlp.router.correction_bias": "mlp.gate.e_score_correction_bias",
    }
    | QWEN_EXPERTS
    | SHARED_EXPERTS
)
GPT_OSS_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
"""The stretched context that a `config.json` means which says nothing of it."""
GPT_OSS_BLOCK = (
    LLAMA_BLOCK
    | STACKED
    | STACKED_BIAS
    | {
        "attention.sinks": "self_attn.sinks",
        "mlp.router": "mlp.router",
    }
)


def _moe(keys: Keys, count: str, **differences: Any) -> MoeConfig:
    """The keys that these families share. What config.json says of losses is for the trainer's flags to say; `count` is
    the published name of the number of experts, which transformers 5 also writes as `num_local_experts`."""
    for key in ("router_aux_loss_coef", "output_router_logits"):
        keys.take(key, None)
    number = keys.take("num_local_experts", None) or keys.take(count)
    keys.take(count, None)
    return MoeConfig(num_experts=number, top_k=keys.take("num_experts_per_tok"), **differences)


def _mixtral(keys: Keys) -> ModelConfig:
    if keys.take("router_jitter_noise", 0.0):
        raise ValueError("router_jitter_noise is not supported: set it to 0 in config.json.")
    windows = (keys.take("sliding_window", None),) * keys.take("num_hidden_layers")
    layers = with_windows(keys, read_rope(keys, read_head_dim(keys)), windows)
    moe = _moe(keys, "num_local_experts", intermediate_size=keys.take("intermediate_size"))
    return read_common(keys, layers=tuple(replace(layer, experts=True) for layer in layers), moe=moe)


def _qwen_sparse(keys: Keys, layers: tuple[LayerConfig, ...]) -> tuple[LayerConfig, ...]:
    """Which layers hold experts: every `decoder_sparse_step`-th, but none of `mlp_only_layers`."""
    step, dense = keys.take("decoder_sparse_step", 1), keys.take("mlp_only_layers", None) or ()
    return tuple(
        replace(layer, experts=(index + 1) % step == 0 and index not in dense) for index, layer in enumerate(layers)
    )


def _qwen2_moe(keys: Keys) -> ModelConfig:
    """Where windows are on, every second of the layers before `max_window_layers` has one."""
    window = keys.take("sliding_window", None) if keys.take("use_sliding_window", False) else None
    keys.take("sliding_window", None)
    first_full = keys.take("max_window_layers")
    slides = read_sliding(keys, lambda index: window is not None and index % 2 == 0 and index < first_full)
    windows = tuple(window if sliding else None for sliding in slides)
    layers = with_windows(keys, read_rope(keys, read_head_dim(keys)), windows)
    moe = _moe(
        keys,
        "num_experts",
        intermediate_size=keys.take("moe_intermediate_size"),
        renormalise=keys.take("norm_topk_prob", False),
        shared_size=keys.take("shared_expert_intermediate_size"),
        shared_gate=True,
    )
    return read_common(keys, layers=_qwen_sparse(keys, layers), qkv_bias=keys.take("qkv_bias", False), moe=moe)


def _qwen3_moe(keys: Keys) -> ModelConfig:
    """A window, where it is on, holds in every layer. Qwen3-Coder writes down three things that are always so."""
    for key, value in (("use_qk_norm", True), ("qkv_bias", False), ("shared_expert_intermediate_size", 0)):
        keys.only(key, value)
    window = keys.take("sliding_window", None) if keys.take("use_sliding_window", False) else None
    for key in ("sliding_window", "max_window_layers"):
        keys.take(key, None)
    rope = read_rope(keys, read_head_dim(keys))
    layers = with_windows(keys, rope, (window,) * keys.take("num_hidden_layers"))
    moe = _moe(
        keys,
        "num_experts",
        intermediate_size=keys.take("moe_intermediate_size"),
        renormalise=keys.take("norm_topk_prob", False),
    )
    bias = keys.take("attention_bias", False)
    layers = _qwen_sparse(keys, layers)
    return read_common(keys, layers=layers, qkv_bias=bias, output_bias=bias, qk_norm="head", moe=moe)


def _deepseek_v3(keys: Keys) -> ModelConfig:
    for key in ("head_dim", "qk_head_dim", "num_key_value_heads", "num_nextn_predict_layers", "num_mtp_layers"):
        keys.take(key, None)  # follow from others, or describe layers that are not trained
    for key, only in (("topk_method", "noaux_tc"), ("scoring_func", "sigmoid"), ("moe_layer_freq", 1), ("ep_size", 1)):
        if keys.take(key, only) != only:
            raise ValueError(f"{key} of config.json must be {only!r} in a deepseek_v3 model.")
    for key in ("aux_loss_alpha", "seq_aux"):
        keys.take(key, None)
    turned = keys.take("qk_rope_head_dim")
    mla = MlaConfig(
        query_rank=keys.take("q_lora_rank", None),
        kv_rank=keys.take("kv_lora_rank"),
        rope_dim=turned,
        value_dim=keys.take("v_head_dim"),
        interleaved=keys.take("rope_interleave", True),
    )
    head_dim = keys.take("qk_nope_head_dim") + turned
    if mla.value_dim > head_dim:
        raise ValueError(f"v_head_dim {mla.value_dim} is larger than a head of queries ({head_dim}): not supported.")
    moe = _moe(
        keys,
        "n_routed_experts",
        intermediate_size=keys.take("moe_intermediate_size"),
        score="sigmoid",
        renormalise=keys.take("norm_topk_prob", True),
        scale=keys.take("routed_scaling_factor", 2.5),
        groups=keys.take("n_group", 8) or 1,
        top_groups=keys.take("topk_group", 4) or 1,
        correction_bias=True,
        shared_size=keys.take("moe_intermediate_size") * keys.take("n_shared_experts"),
    )
    layers = with_windows(keys, read_rope(keys, turned))
    dense = keys.take("first_k_dense_replace")
    bias = keys.take("attention_bias", False)
    return read_common(
        keys,
        layers=tuple(replace(layer, experts=index >= dense) for index, layer in enumerate(layers)),
        num_kv_heads=keys.take("num_attention_heads"),
        head_dim=head_dim,
        attention_scale=head_dim**-0.5 * _yarn_scale(keys) ** 2,
        qkv_bias=bias,
        output_bias=bias,
        mla=mla,
        moe=moe,
    )


def _yarn_scale(keys: Keys) -> float:
    """What a stretched context multiplies queries and keys by, each."""
    rope = keys.take("rope_parameters", None) or keys.take("rope_scaling", None) or {}
    factor, mscale = rope.get("factor") or 1.0, rope.get("mscale_all_dim") or 0.0
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _gpt_oss(keys: Keys) -> ModelConfig:
    window = keys.take("sliding_window", None)
    slides = read_sliding(keys, lambda index: index % 2 == 0)
    windows = tuple(window if sliding else None for sliding in slides)
    layers = with_windows(keys, read_rope(keys, read_head_dim(keys), default_scaling=GPT_OSS_ROPE), windows)
    keys.take("initial_context_length", None)  # stands in the rotary parameters, too
    keys.take("experts_per_token", None)  # an older name of num_experts_per_tok
    moe = _moe(
        keys,
        "num_local_experts",
        intermediate_size=keys.take("intermediate_size"),
        router_bias=True,
        expert_bias=True,
        swiglu_limit=keys.take("swiglu_limit", 7.0),
        swiglu_alpha=keys.take("swiglu_alpha", 1.702),
    )
    bias = keys.take("attention_bias", False)
    layers = tuple(replace(layer, experts=True) for layer in layers)
    return read_common(keys, layers=layers, qkv_bias=bias, output_bias=bias, attention_sinks=True, moe=moe)


SPARSE_FAMILIES = (
    Family(
        "mixtral",
        "MixtralForCausalLM",
        _mixtral,
        LLAMA_BLOCK | MIXTRAL_EXPERTS,
        FUSED,
        stacked=STACKED | {"mlp.router": "mlp.gate"},
    ),
    Family(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        _qwen2_moe,
        LLAMA_BLOCK | QWEN_EXPERTS | SHARED_EXPERT | {"mlp.shared_gate": "mlp.shared_expert_gate"},
        FUSED,
        stacked=STACKED,
    ),
    Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        _qwen3_moe,
        LLAMA_BLOCK | QK_NORMS | QWEN_EXPERTS,
        FUSED,
        stacked=STACKED,
    ),
    Family(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        _deepseek_v3,
        DEEPSEEK_BLOCK,
        FUSED,
        stacked=STACKED,
        extra_layers=True,
    ),
    Family(
        "gpt_oss",
        "GptOssForCausalLM",
        _gpt_oss,
        GPT_OSS_BLOCK,
        FUSED | FUSED_BIAS,
        interleaved=frozenset((*FUSED, *FUSED_BIAS)),
        transposed=frozenset((*FUSED, "mlp.experts.down_proj")),
    ),
)
