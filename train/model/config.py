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
    experts: bool = False  # a mixture of experts (`ModelConfig.moe`) in place of the MLP


@dataclass(frozen=True)
class MoeConfig:
    """A mixture of experts: a router sends each token to `top_k` of `num_experts` small MLPs.

    The chosen experts' scores are their weights, divided by their sum (`renormalise`), times `scale`. With groups, only
    experts of the `top_groups` best of `groups` equal runs can be chosen; a group is as good as its two best experts.
    `router_bias` is a learned part of the logits. `correction_bias` is added to the scores for the choice alone, moved
    by the load, not by a gradient (arXiv 2408.15664). `swiglu_limit` clamps gate and up projection (GPT-OSS), and the
    expert then is gate·sigmoid(`swiglu_alpha`·gate)·(up + 1). A shared expert of `shared_size` (0: none) sees every
    token; `shared_gate` weighs it by the sigmoid of a projection.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    renormalise: bool = True
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    router_bias: bool = False
    correction_bias: bool = False
    expert_bias: bool = False
    swiglu_limit: float | None = None
    swiglu_alpha: float = 1.0
    shared_size: int = 0
    shared_gate: bool = False


@dataclass(frozen=True)
class MlaConfig:
    """Latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values are projections of a vector of `kv_rank`, and
    queries of one of `query_rank` (None: of the hidden state). The last `rope_dim` of a head's dimensions are turned,
    the same for the keys of all heads; values have `value_dim`. `interleaved`: pairs (0, 1), (2, 3) … are turned and
    not (0, R/2), (1, R/2 + 1) …"""

    query_rank: int | None
    kv_rank: int
    rope_dim: int
    value_dim: int
    interleaved: bool


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
    attention_sinks: bool = False  # a learned logit a head in the denominator of the softmax
    mla: MlaConfig | None = None
    moe: MoeConfig | None = None

    @property
    def num_layers(self) -> int:
        return len(self.layers)
