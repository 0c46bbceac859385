"""Model families as data: how a Hugging Face `config.json` becomes a `ModelConfig`, and which tensor is which weight.

A family is one function from the keys of its `config.json` to a `ModelConfig`, and one table from our parameter names
to those of its safetensors files. Every key must be read or be known not to matter: a key nobody knows is refused,
since a model that is nearly right trains without complaint.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from train.model.config import LayerConfig, ModelConfig
from train.model.keys import Keys, read_rope

# Our block parameters -> theirs, as most families name them. `{bias}` parameters follow their weight's name.
LLAMA_BLOCK = {
    "attention_norm": "input_layernorm",
    "attention.q_proj": "self_attn.q_proj",
    "attention.k_proj": "self_attn.k_proj",
    "attention.v_proj": "self_attn.v_proj",
    "attention.o_proj": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate_proj": "mlp.gate_proj",
    "mlp.up_proj": "mlp.up_proj",
    "mlp.down_proj": "mlp.down_proj",
}


@dataclass(frozen=True)
class Family:
    """`architecture` is the class named in `config.json`; `block` maps parameter names of a block to the file's.

    `fused` names the file tensors that hold several of our parameters, one below the other in this order.
    """

    name: str
    architecture: str
    read: Callable[[Keys], ModelConfig]
    block: dict[str, str]
    fused: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Source:
    """Where a parameter stands in the files: rows `start` to `start + rows` of the tensor `name`."""

    name: str
    start: int
    rows: int
    total_rows: int


def _dense(keys: Keys, **differences: Any) -> ModelConfig:
    """The keys that all families share; `differences` wins over what is read here."""
    heads = keys.take("num_attention_heads")
    hidden = keys.take("hidden_size")
    head_dim = keys.take("head_dim", None) or hidden // heads
    layers = differences.pop("layers", None)
    if layers is None:
        layer = LayerConfig(window=None, rope=read_rope(keys, head_dim))
        layers = (layer,) * keys.take("num_hidden_layers")
    fields = {
        "vocab_size": keys.take("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": keys.take("intermediate_size"),
        "num_heads": heads,
        "num_kv_heads": keys.take("num_key_value_heads", None) or heads,
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


def _llama(keys: Keys) -> ModelConfig:
    bias = keys.take("attention_bias", False)
    return _dense(keys, qkv_bias=bias, output_bias=bias, mlp_bias=keys.take("mlp_bias", False))


FAMILIES = {family.name: family for family in (Family("llama", "LlamaForCausalLM", _llama, LLAMA_BLOCK, fused={}),)}


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
    absent = set()
    if config.qk_norm is None:
        absent |= {"attention.q_norm", "attention.k_norm"}

    sources = {"embed_tokens.weight": _whole("model.embed_tokens.weight", config.vocab_size)}
    for layer in range(config.num_layers):
        for ours, theirs in family.block.items():
            if ours in absent:
                continue
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
