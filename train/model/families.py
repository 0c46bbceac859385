"""Model families as data: how a Hugging Face `config.json` becomes a `ModelConfig`, and which tensor is which weight.

A family is one function from the keys of its `config.json` to a `ModelConfig`, and one table from our parameter names
to those of its safetensors files. Every key must be read or be known not to matter: a key nobody knows is refused,
since a model that is nearly right trains without complaint.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from train.model.config import LayerConfig, ModelConfig, Rope
from train.model.keys import Keys, read_rope

# Our block modules -> theirs, as most families name them.
LLAMA_BLOCK = {
    "attention_norm": "input_layernorm",
    "attention.q_proj": "self_attn.q_proj",
    "attention.k_proj": "self_attn.k_proj",
    "attention.v_proj": "self_attn.v_proj",
    "attention.o_proj": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate_proj": "mlp.gate_proj",
    "mlp.up_proj": "mlp.up_proj",
    "mlp.down_proj": "mlp.down_proj",
}
QK_NORMS = {"attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm"}
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


@dataclass(frozen=True)
class Family:
    """`architecture` is the class named in `config.json`; `block` maps the modules of a block to the file's.

    `fused` names the file tensors that hold several of our parameters, one below the other in this order.
    """

    name: str
    architecture: str
    read: Callable[[Keys], ModelConfig]
    block: dict[str, str]
    fused: dict[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """Where a parameter stands in the files: rows `start` to `start + rows` of the tensor `name`."""

    name: str
    start: int
    rows: int
    total_rows: int


def _head_dim(keys: Keys) -> int:
    return keys.take("head_dim", None) or keys.take("hidden_size") // keys.take("num_attention_heads")


def _dense(keys: Keys, *, layers: tuple[LayerConfig, ...] | None = None, **differences: Any) -> ModelConfig:
    """The keys that all families share; `differences` wins over what is read here.

    Without `layers` all are alike: the whole document is visible, and there is one rotary embedding.
    """
    head_dim = _head_dim(keys)
    if layers is None:
        layers = _layers(keys, read_rope(keys, head_dim))
    fields = {
        "vocab_size": keys.take("vocab_size"),
        "hidden_size": keys.take("hidden_size"),
        "intermediate_size": keys.take("intermediate_size"),
        "num_heads": keys.take("num_attention_heads"),
        "num_kv_heads": keys.take("num_key_value_heads", None) or keys.take("num_attention_heads"),
        "head_dim": head_dim,
        "layers": layers,
        "max_positions": keys.take("max_position_embeddings"),
        "norm_eps": keys.take("rms_norm_eps", 1e-6),
        "attention_scale": head_dim**-0.5,
        "tied_embeddings": keys.take("tie_word_embeddings", False),
        "initializer_range": keys.take("initializer_range", 0.02),
        "activation": keys.activation(),
    }
    return ModelConfig(family=keys.family, **(fields | differences))


def _layers(keys: Keys, rope: Rope, windows: tuple[int | None, ...] | None = None) -> tuple[LayerConfig, ...]:
    if windows is None:
        windows = (None,) * keys.take("num_hidden_layers")
    return tuple(LayerConfig(window, rope) for window in windows)


def _layer_types(keys: Keys, default: Callable[[int], bool]) -> list[bool]:
    """Whether each layer slides a window; `default(index)` where config.json does not list its layers."""
    count = keys.take("num_hidden_layers")
    types = keys.take("layer_types", None)
    if types is None:
        return [default(index) for index in range(count)]
    known = {"sliding_attention": True, "full_attention": False}
    unknown = set(types) - known.keys()
    if unknown or len(types) != count:
        raise ValueError(
            f"layer_types of config.json must name one of {', '.join(known)} for each of the {count} layers"
            + (f", not {', '.join(sorted(unknown))}." if unknown else f", not for {len(types)}.")
        )
    return [known[kind] for kind in types]


def _llama(keys: Keys) -> ModelConfig:
    bias = keys.take("attention_bias", False)
    return _dense(keys, qkv_bias=bias, output_bias=bias, mlp_bias=keys.take("mlp_bias", False))


def _mistral(keys: Keys) -> ModelConfig:
    windows = (keys.take("sliding_window", None),) * keys.take("num_hidden_layers")
    return _dense(keys, layers=_layers(keys, read_rope(keys, _head_dim(keys)), windows))


def _qwen_layers(keys: Keys) -> tuple[LayerConfig, ...]:
    """Windows are off unless `use_sliding_window`, then in the layers from `max_window_layers` on."""
    window = keys.take("sliding_window", None) if keys.take("use_sliding_window", False) else None
    keys.take("sliding_window", None)
    first = keys.take("max_window_layers", 0)
    slides = _layer_types(keys, lambda index: window is not None and index >= first)
    windows = tuple(window if sliding else None for sliding in slides)
    return _layers(keys, read_rope(keys, _head_dim(keys)), windows)


def _qwen2(keys: Keys) -> ModelConfig:
    return _dense(keys, layers=_qwen_layers(keys), qkv_bias=True)


def _qwen3(keys: Keys) -> ModelConfig:
    bias = keys.take("attention_bias", False)
    return _dense(keys, layers=_qwen_layers(keys), qkv_bias=bias, output_bias=bias, qk_norm="head")


def _gemma(keys: Keys, **differences: Any) -> ModelConfig:
    """What Gemma 2 and 3 share: norms on both sides with 1 + weight, scaled embedding, a scale of its own."""
    if keys.take("use_bidirectional_attention", None):
        raise ValueError("use_bidirectional_attention is not supported: only causal Gemma models can be trained.")
    bias = keys.take("attention_bias", False)
    return _dense(
        keys,
        activation=keys.activation("hidden_activation", "gelu_pytorch_tanh"),
        tied_embeddings=keys.take("tie_word_embeddings", True),
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
    slides = _layer_types(keys, lambda index: index % 2 == 0)
    layers = _layers(keys, read_rope(keys, _head_dim(keys)), tuple(window if sliding else None for sliding in slides))
    return _gemma(keys, layers=layers, attention_softcap=keys.take("attn_logit_softcapping", None))


def _gemma3(keys: Keys) -> ModelConfig:
    """Windows and rotary embeddings alternate together; only the unwindowed layers have a scaled one."""
    window, head_dim = keys.take("sliding_window"), _head_dim(keys)
    period = keys.take("_sliding_window_pattern", None) or keys.take("sliding_window_pattern", None) or 6
    slides = _layer_types(keys, lambda index: (index + 1) % period != 0)
    far = read_rope(keys, head_dim, which="full_attention", default_theta=1e6)
    near = read_rope(keys, head_dim, which="sliding_attention", theta_key="rope_local_base_freq")
    layers = tuple(LayerConfig(window, near) if sliding else LayerConfig(None, far) for sliding in slides)
    return _gemma(keys, layers=layers, qk_norm="head")


def _phi3(keys: Keys) -> ModelConfig:
    windows = (keys.take("sliding_window", None),) * keys.take("num_hidden_layers")
    return _dense(keys, layers=_layers(keys, read_rope(keys, _head_dim(keys)), windows))


def _smollm3(keys: Keys) -> ModelConfig:
    """Every fourth layer has no position embedding (NoPE)."""
    windowed = _qwen_layers(keys)
    period = keys.take("no_rope_layer_interval", 4)
    turned = keys.take("no_rope_layers", None) or [(index + 1) % period != 0 for index in range(len(windowed))]
    layers = tuple(layer if turn else replace(layer, rope=None) for layer, turn in zip(windowed, turned, strict=True))
    bias = keys.take("attention_bias", False)
    return _dense(
        keys,
        layers=layers,
        tied_embeddings=keys.take("tie_word_embeddings", True),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=keys.take("mlp_bias", False),
    )


def _olmo2(keys: Keys) -> ModelConfig:
    bias = keys.take("attention_bias", False)
    return _dense(keys, pre_norm=False, post_norm=True, qk_norm="projection", qkv_bias=bias, output_bias=bias)


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
    )
}


def model_config(config: dict[str, Any]) -> ModelConfig:
    """`ModelConfig` of a parsed `config.json`.

    Raises ValueError for an architecture, a key or a value that is not supported, and lists what is.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
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
    return result


def weight_sources(config: ModelConfig) -> dict[str, Source]:
    """For every parameter of `Decoder(config)`, by its name: the tensor of the safetensors files that holds it."""
    family = FAMILIES[config.family]
    N, K, H, F = config.num_heads, config.num_kv_heads, config.head_dim, config.intermediate_size
    rows = {
        "attention.q_proj": N * H,
        "attention.k_proj": K * H,
        "attention.v_proj": K * H,
        "attention.o_proj": config.hidden_size,
        "attention.q_norm": H if config.qk_norm == "head" else N * H,
        "attention.k_norm": H if config.qk_norm == "head" else K * H,
        "mlp.gate_proj": F,
        "mlp.up_proj": F,
        "mlp.down_proj": config.hidden_size,
    }
    with_bias = {
        "attention.q_proj": config.qkv_bias,
        "attention.k_proj": config.qkv_bias,
        "attention.v_proj": config.qkv_bias,
        "attention.o_proj": config.output_bias,
        "mlp.gate_proj": config.mlp_bias,
        "mlp.up_proj": config.mlp_bias,
        "mlp.down_proj": config.mlp_bias,
    }
    sources = {"embed_tokens.weight": _whole("model.embed_tokens.weight", config.vocab_size)}
    for layer in range(config.num_layers):
        for ours, theirs in family.block.items():
            parts = family.fused.get(theirs, (ours,))
            start = sum(rows[part] for part in parts[: parts.index(ours)])
            size = rows.get(ours, config.hidden_size)
            total = size if len(parts) == 1 else sum(rows[part] for part in parts)
            for kind in ("weight", "bias") if with_bias.get(ours) else ("weight",):
                name = f"model.layers.{layer}.{theirs}.{kind}"
                sources[f"layers.{layer}.{ours}.{kind}"] = Source(name, start, size, total)
    sources["norm.weight"] = _whole("model.norm.weight", config.hidden_size)
    if not config.tied_embeddings:
        sources["lm_head.weight"] = _whole("lm_head.weight", config.vocab_size)
    return sources


def _whole(name: str, rows: int) -> Source:
    return Source(name, 0, rows, rows)
