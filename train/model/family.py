"""What a family is, and what the `config.json` of most families have in common."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

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


@dataclass(frozen=True)
class Family:
    """`architecture` is the class named in `config.json`; `block` maps the modules of a block, or single parameters of
    it, to the file's; "{}" in a name of the file stands for the number of the expert that the tensor belongs to.

    `fused` names the file tensors that hold several of our parameters, one below the other in this order, or row by row
    in turn (`interleaved`). `transposed` names file tensors whose last two dims are swapped. `stacked` is what differs
    from `block` in files that hold all experts of a projection in one tensor. A family may have `extra_layers` after
    its last one, which predict further tokens: they are neither read nor written. What a `config.json` of the family
    may leave out stands in `formats.defaults`.
    """

    name: str
    architecture: str
    read: Callable[[Keys], ModelConfig]
    block: dict[str, str]
    fused: dict[str, tuple[str, ...]] = field(default_factory=dict)
    stacked: dict[str, str] = field(default_factory=dict)
    interleaved: frozenset[str] = frozenset()
    transposed: frozenset[str] = frozenset()
    extra_layers: bool = False


def read_head_dim(keys: Keys) -> int:
    hidden, heads, given = keys.take("hidden_size"), keys.take("num_attention_heads"), keys.take("head_dim", None)
    if given is None and hidden % heads:
        raise ValueError(
            f"hidden_size {hidden} of config.json is not a multiple of num_attention_heads {heads}, and there is no "
            "head_dim."
        )
    return given or hidden // heads


def read_common(keys: Keys, *, layers: tuple[LayerConfig, ...] | None = None, **differences: Any) -> ModelConfig:
    """The keys that all families share; `differences` wins over what is read here.

    Without `layers` all are alike: the whole document is visible, and there is one rotary embedding.
    """
    head_dim = differences.get("head_dim") or read_head_dim(keys)
    if layers is None:
        layers = with_windows(keys, read_rope(keys, head_dim))
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


def with_windows(keys: Keys, rope: Rope, windows: tuple[int | None, ...] | None = None) -> tuple[LayerConfig, ...]:
    if windows is None:
        windows = (None,) * keys.take("num_hidden_layers")
    return tuple(LayerConfig(window, rope) for window in windows)


def read_sliding(keys: Keys, default: Callable[[int], bool]) -> list[bool]:
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


def read_qwen_layers(keys: Keys) -> tuple[LayerConfig, ...]:
    """Windows are off unless `use_sliding_window`, then in the layers from `max_window_layers` on."""
    window = keys.take("sliding_window", None) if keys.take("use_sliding_window", False) else None
    keys.take("sliding_window", None)
    first = keys.take("max_window_layers")
    slides = read_sliding(keys, lambda index: window is not None and index >= first)
    windows = tuple(window if sliding else None for sliding in slides)
    return with_windows(keys, read_rope(keys, read_head_dim(keys)), windows)
