"""What a decoder is, as plain data. `families.py` makes it from a Hugging Face `config.json`."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: which frequencies turn the first `dim` dimensions of a head.

    `kind` "default": θ^(−2i/dim). "linear": those divided by `factor`. "llama3": frequencies whose wavelength exceeds
    the original context divided by `factor`, a smooth step between `high_freq_factor` and `low_freq_factor`.
    "yarn" (arXiv 2309.00071): the same idea with a linear ramp over dimensions; cosine and sine are multiplied by
    `attention_factor`. "longrope" (arXiv 2402.13753): each frequency is divided by a factor of its own, one of
    `short_factors` in a document that fits the original context, one of `long_factors` in a longer one.
    """

    theta: float
    dim: int
    kind: Literal["default", "linear", "llama3", "yarn", "longrope"] = "default"
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    attention_factor: float = 1.0


@dataclass(frozen=True)
class LayerConfig:
    """What differs from layer to layer."""

    window: int | None  # visible keys, the query's own included; None: the whole document
    rope: Rope | None  # None: no position embedding


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer. Sizes are global: a tensor-parallel rank holds fewer heads and columns."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[LayerConfig, ...]
    max_positions: int
    norm_eps: float
    attention_scale: float
    tied_embeddings: bool
    initializer_range: float = 0.02
    activation: Literal["silu", "gelu_tanh"] = "silu"
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: Literal["head", "projection"] | None = None  # over each head's dimensions, or over the whole projection
    pre_norm: bool = True  # normalise the input of attention and of the MLP
    post_norm: bool = False  # normalise their output before it joins the residual stream
    norm_offset: float = 0.0  # Gemma multiplies by 1 + weight
    embedding_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None

    @property
    def num_layers(self) -> int:
        return len(self.layers)
