"""What a pack costs: floating-point operations from the lengths of its documents.

Equal tokens are not equal work. A linear layer costs the same for every token, attention the square of a document's
length. For ordering packs a pack's cost is a·capacity + b·Σ sᵢ² (`PackCost`), for MFU the exact count from `seq_lens`
per kind of layer (`Model`). Everything here is forward; a training step costs three times as much (two more for the
backward), recomputation not counted, as in Chowdhery et al., "PaLM" (arXiv 2204.02311, appendix B).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from formats.defaults import complete

TRAINING = 3
"""Forward and backward over forward."""


@dataclass(frozen=True)
class PackCost:
    """a·capacity + b·Σ sᵢ² in FLOPs: `a` per token (padding is computed too), `b` per squared token of a document."""

    a: float
    b: float

    def of(self, capacity: int, sum_sq: np.ndarray) -> np.ndarray:
        """float64[P] from sum_sq int[P], the Σ sᵢ² of each pack."""
        return self.a * capacity + self.b * np.asarray(sum_sq, np.float64)


@dataclass(frozen=True)
class Model:
    """The shape of a decoder, as far as its FLOPs need it.

    linear: FLOPs per token of every matrix product outside the attention core, output head included. pair: FLOPs per
    (query, key) pair of one layer, all heads: QKᵀ and PV. windows: one entry per layer, 0 for full causal attention,
    else the number of keys that a query sees at most.
    """

    linear: float
    pair: float
    windows: tuple[int, ...]

    @classmethod
    def from_config(cls, config: Mapping) -> "Model":
        """From a Hugging Face `config.json` of a decoder: dense or mixture of experts, with or without windows.

        Raises ValueError naming a size that is missing.
        """
        text = complete(config)
        hidden, layers = text["hidden_size"], text["num_hidden_layers"]
        heads = text["num_attention_heads"]
        if text.get("kv_lora_rank"):
            projections, pair = _latent_attention(text)
        else:
            kv_heads = text.get("num_key_value_heads") or heads
            head_dim = text.get("head_dim") or hidden // heads
            projections = 2 * hidden * head_dim * (2 * heads + 2 * kv_heads)
            pair = 4 * heads * head_dim
        linear = sum(projections + _feed_forward(text, layer) for layer in range(layers))
        linear += 2 * hidden * text["vocab_size"]
        return cls(float(linear), float(pair), _windows(text, layers))

    def flops(self, seq_lens: np.ndarray, tokens: int | None = None) -> float:
        """Forward FLOPs of documents of `seq_lens` int[n]; `tokens`: rows computed, padding included (Σ if None)."""
        s = np.asarray(seq_lens, np.int64)
        rows = int(s.sum()) if tokens is None else tokens
        pairs = sum(self.windows.count(w) * int(causal_pairs(s, w).sum()) for w in set(self.windows))
        return self.linear * rows + self.pair * pairs

    def pack_cost(self) -> PackCost:
        """The coefficients for ordering: full layers pay s²/2 pairs, windowed ones nearly their window per token."""
        full = self.windows.count(0)
        return PackCost(self.linear + self.pair * sum(self.windows), self.pair * full / 2)


def causal_pairs(seq_lens: np.ndarray, window: int = 0) -> np.ndarray:
    """int64[n]: (query, key) pairs of causal attention in each document; `window` > 0 limits the keys of a query."""
    s = np.asarray(seq_lens, np.int64)
    if window == 0:
        return s * (s + 1) // 2
    inside = np.minimum(s, window)
    return inside * (inside + 1) // 2 + (s - inside) * window


def num_experts(config: Mapping) -> int:
    """Experts of a layer that has any; 0 in a dense model. Of a complete configuration (`formats.defaults`)."""
    return config.get("num_local_experts") or config.get("num_experts") or config.get("n_routed_experts") or 0


def holds_experts(config: Mapping, layer: int) -> bool:
    """Whether a layer has a mixture of experts in place of its MLP, in a complete configuration."""
    return (
        num_experts(config) > 0
        and (layer + 1) % (config.get("decoder_sparse_step") or 1) == 0
        and layer >= (config.get("first_k_dense_replace") or 0)
        and layer not in (config.get("mlp_only_layers") or ())
    )


def _latent_attention(config: Mapping) -> tuple[int, int]:
    """(FLOPs per token of the projections, per pair) of latent attention (DeepSeek-V3): queries and keys have other
    dimensions than values, and both come from vectors of a low rank."""
    hidden, heads, rank = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    inner, turned = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    value, queries = config["v_head_dim"], config.get("q_lora_rank")
    head = heads * (inner + turned)
    weights = hidden * (rank + turned) + rank * heads * (inner + value) + heads * value * hidden
    weights += (hidden + head) * queries if queries else hidden * head
    return 2 * weights, 2 * heads * (inner + turned + value)


def _feed_forward(config: Mapping, layer: int) -> int:
    """FLOPs per token of one layer's MLP (gate, up, down) or of the experts that a token visits."""
    hidden = config["hidden_size"]
    if holds_experts(config, layer):
        width = config.get("moe_intermediate_size") or config["intermediate_size"]
        shared = (config.get("n_shared_experts") or 0) * width + (config.get("shared_expert_intermediate_size") or 0)
        return 6 * hidden * (config["num_experts_per_tok"] * width + shared) + 2 * hidden * num_experts(config)
    return 6 * hidden * config["intermediate_size"]


def _windows(config: Mapping, layers: int) -> tuple[int, ...]:
    """The window of each layer, 0 where there is none: as `layer_types` lists them, or as files before transformers 5
    say it, each family in its own way."""
    window = config.get("sliding_window") or 0 if config.get("use_sliding_window", True) else 0
    kinds = config.get("layer_types")
    if kinds is not None:
        return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
    slides = _SLIDES.get(config.get("model_type"), lambda config, layer: True)
    return tuple(window if slides(config, layer) else 0 for layer in range(layers))


def _alternates(config: Mapping, layer: int) -> bool:
    return layer % 2 == 0


def _gemma3(config: Mapping, layer: int) -> bool:
    period = config.get("_sliding_window_pattern") or config.get("sliding_window_pattern") or 6
    return (layer + 1) % period != 0


def _late_layers(config: Mapping, layer: int) -> bool:
    return layer >= config["max_window_layers"]


def _early_alternating_layers(config: Mapping, layer: int) -> bool:
    return layer % 2 == 0 and layer < config["max_window_layers"]


def _layers_without_rope(config: Mapping, layer: int) -> bool:
    turned = config.get("no_rope_layers")
    return not turned[layer] if turned else (layer + 1) % config["no_rope_layer_interval"] == 0


_SLIDES = {
    "gemma2": _alternates,
    "gemma3_text": _gemma3,
    "gpt_oss": _alternates,
    "qwen2": _late_layers,
    "qwen2_moe": _early_alternating_layers,
    "qwen3": _late_layers,
    "smollm3": _layers_without_rope,
}
"""By `model_type`: whether a layer slides a window, where windows are on. Of other types every layer does."""
