"""Model families as data: how a Hugging Face `config.json` becomes a `ModelConfig`, and which tensor is which weight.

A family is one function from the keys of its `config.json` to a `ModelConfig`, and one table from our parameter names
to those of its safetensors files, which `sources.py` reads. Families with experts stand in `sparse_families.py`. Every
key must be read or be known not to matter: a key nobody knows is refused, since a model that is nearly right trains
without complaint.
"""

from typing import Any

import numpy as np

from train.model.config import LayerConfig, ModelConfig
from train.model.family import (
    LLAMA_BLOCK,
    QK_NORMS,
    Family,
    read_common,
    read_head_dim,
    read_qwen_layers,
    read_sliding,
    with_windows,
)
from train.model.keys import Keys, read_rope
from train.model.kinds import check_sizes
from train.model.sparse_families import SPARSE_FAMILIES

POST_NORMS = {
    "attention_post_norm": "post_attention_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
GEMMA_BLOCK = LLAMA_BLOCK | POST_NORMS | {"mlp_norm": "pre_feedforward_layernorm"}
OLMO2_BLOCK = (
    {ours: theirs for ours, theirs in LLAMA_BLOCK.items() if not ours.endswith("_norm")} | POST_NORMS | QK_NORMS
)
PHI3_BLOCK = LLAMA_BLOCK | {
    "attention.q_proj": "self_attn.qkv_proj",
    "attention.k_proj": "self_attn.qkv_proj",
    "attention.v_proj": "self_attn.qkv_proj",
    "mlp.gate_proj": "mlp.gate_up_proj",
    "mlp.up_proj": "mlp.gate_up_proj",
}
PHI3_FUSED = {
    "self_attn.qkv_proj": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}


def _llama(keys: Keys) -> ModelConfig:
    bias = keys.take("attention_bias", False)
    return read_common(keys, qkv_bias=bias, output_bias=bias, mlp_bias=keys.take("mlp_bias", False))


def _mistral(keys: Keys) -> ModelConfig:
    windows = (keys.take("sliding_window", None),) * keys.take("num_hidden_layers")
    return read_common(keys, layers=with_windows(keys, read_rope(keys, read_head_dim(keys)), windows))


def _qwen2(keys: Keys) -> ModelConfig:
    return read_common(keys, layers=read_qwen_layers(keys), qkv_bias=True)


def _qwen3(keys: Keys) -> ModelConfig:
    bias = keys.take("attention_bias", False)
    return read_common(keys, layers=read_qwen_layers(keys), qkv_bias=bias, output_bias=bias, qk_norm="head")


def _gemma(keys: Keys, **differences: Any) -> ModelConfig:
    """What Gemma 2 and 3 share: norms on both sides with 1 + weight, scaled embedding, a scale of its own."""
    if keys.take("use_bidirectional_attention", None):
        raise ValueError("use_bidirectional_attention is not supported: only causal Gemma models can be trained.")
    bias = keys.take("attention_bias", False)
    return read_common(
        keys,
        activation=keys.activation("hidden_activation", "gelu_pytorch_tanh"),
        attention_scale=keys.take("query_pre_attn_scalar", 256) ** -0.5,
        embedding_scale=float(np.float32(keys.take("hidden_size") ** 0.5)),  # stored in float32 where it was trained
        logit_softcap=keys.take("final_logit_softcapping", None),
        post_norm=True,
        norm_offset=1.0,
        qkv_bias=bias,
        output_bias=bias,
        **differences,
    )


def _gemma2(keys: Keys) -> ModelConfig:
    window = keys.take("sliding_window")
    keys.only("sliding_window_size", window)  # the same, under the name it had first
    slides = read_sliding(keys, lambda index: index % 2 == 0)
    layers = with_windows(
        keys, read_rope(keys, read_head_dim(keys)), tuple(window if sliding else None for sliding in slides)
    )
    return _gemma(keys, layers=layers, attention_softcap=keys.take("attn_logit_softcapping", None))


def _gemma3(keys: Keys) -> ModelConfig:
    """Windows and rotary embeddings alternate together; only the unwindowed layers have a scaled one."""
    window, head_dim = keys.take("sliding_window"), read_head_dim(keys)
    patterns = [keys.take(key, None) for key in ("_sliding_window_pattern", "sliding_window_pattern")]
    period = patterns[0] or patterns[1] or 6
    slides = read_sliding(keys, lambda index: (index + 1) % period != 0)
    far = read_rope(keys, head_dim, which="full_attention", default_theta=1e6)
    near = read_rope(keys, head_dim, which="sliding_attention", theta_key="rope_local_base_freq")
    layers = tuple(LayerConfig(window, near) if sliding else LayerConfig(None, far) for sliding in slides)
    return _gemma(keys, layers=layers, qk_norm="head")


def _phi3(keys: Keys) -> ModelConfig:
    """Phi-4-mini names two features and uses neither: full attention in every n-th layer only, stretched positions."""
    for key in ("full_attn_mod", "interpolate_factor"):
        keys.only(key, 1)
    windows = (keys.take("sliding_window", None),) * keys.take("num_hidden_layers")
    return read_common(keys, layers=with_windows(keys, read_rope(keys, read_head_dim(keys)), windows))


def _smollm3(keys: Keys) -> ModelConfig:
    """Every fourth layer has no position embedding (NoPE), and where windows are on, those layers have one."""
    count, period = keys.take("num_hidden_layers"), keys.take("no_rope_layer_interval")
    turned = keys.take("no_rope_layers", None) or [int((index + 1) % period != 0) for index in range(count)]
    if len(turned) != count:
        raise ValueError(f"no_rope_layers of config.json must name each of the {count} layers, not {len(turned)}.")
    window = keys.take("sliding_window", None) if keys.take("use_sliding_window", False) else None
    for key in ("sliding_window", "max_window_layers"):
        keys.take(key, None)
    slides = read_sliding(keys, lambda index: window is not None and not turned[index])
    rope = read_rope(keys, read_head_dim(keys))
    layers = tuple(
        LayerConfig(window if sliding else None, rope if turn else None)
        for sliding, turn in zip(slides, turned, strict=True)
    )
    bias = keys.take("attention_bias", False)
    return read_common(
        keys,
        layers=layers,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=keys.take("mlp_bias", False),
    )


def _olmo2(keys: Keys) -> ModelConfig:
    bias = keys.take("attention_bias", False)
    return read_common(keys, pre_norm=False, post_norm=True, qk_norm="projection", qkv_bias=bias, output_bias=bias)


FAMILIES = {
    family.name: family
    for family in (
        Family("llama", "LlamaForCausalLM", _llama, LLAMA_BLOCK),
        Family("mistral", "MistralForCausalLM", _mistral, LLAMA_BLOCK),
        Family("qwen2", "Qwen2ForCausalLM", _qwen2, LLAMA_BLOCK),
        Family("qwen3", "Qwen3ForCausalLM", _qwen3, LLAMA_BLOCK | QK_NORMS),
        Family("gemma2", "Gemma2ForCausalLM", _gemma2, GEMMA_BLOCK),
        Family("gemma3_text", "Gemma3ForCausalLM", _gemma3, GEMMA_BLOCK | QK_NORMS),
        Family("phi3", "Phi3ForCausalLM", _phi3, PHI3_BLOCK, PHI3_FUSED),
        Family("smollm3", "SmolLM3ForCausalLM", _smollm3, LLAMA_BLOCK),
        Family("olmo2", "Olmo2ForCausalLM", _olmo2, OLMO2_BLOCK),
        *SPARSE_FAMILIES,
    )
}


def model_config(config: dict[str, Any]) -> ModelConfig:
    """`ModelConfig` of a parsed `config.json`.

    Raises ValueError for an architecture, a key or a value that is not supported, and lists what is.
    """
    if not isinstance(config, dict):
        raise ValueError(f"config.json must hold an object, not {type(config).__name__}.")
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        known = ", ".join(f"{family.name} ({family.architecture})" for family in FAMILIES.values())
        raise ValueError(f"Models of type {kind!r} are not supported: use one of {known}.")
    family = FAMILIES[kind]
    architectures = config.get("architectures") or [family.architecture]
    if architectures != [family.architecture]:
        raise ValueError(
            f"config.json names {architectures}: among models of type {kind!r} only {family.architecture} is supported."
        )
    keys = Keys(kind, config)
    result = family.read(keys)
    keys.finish()
    check_sizes(result)
    return result
