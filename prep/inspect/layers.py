"""What a layer of a decoder is, from its `config.json` alone: its parameters, and what it keeps for its backward.

Counted on the trainer's own modules. Symbols as in the model code: D hidden size, N query heads and K key heads of H
dimensions, F width of the MLP or of an expert.
"""

from collections.abc import Mapping
from typing import NamedTuple

from formats.cost import holds_experts, num_experts
from formats.defaults import complete


class Layer(NamedTuple):
    """A layer: parameters outside of experts and in all experts, and `products`, those that a token is multiplied with.
    Of `dense`, every tensor rank has `whole` (norms, routers, the projections to latents), and `keys`,
    of keys and values, where their `key_heads` cannot be shared out.
    Elements a token that backward needs: `kept` without recompute, `costly` of it where only results of matrix products
    and attention are kept. `bytes`: what is kept besides whatever the type of the computation is (scores of a router in
    float32, indices)."""

    dense: int
    whole: int
    keys: int
    key_heads: int
    experts: int
    products: float
    kept: int
    costly: int
    bytes: int

    def dense_of(self, tp: int) -> int:
        """Parameters outside of experts that a tensor rank has."""
        cut = self.dense - self.whole - self.keys
        return self.whole + self.keys // (tp if self.key_heads % tp == 0 else 1) + cut // tp


def layers(config: Mapping, *, kernel: bool = True, ep: bool = False) -> list[Layer]:
    """The layers of a decoder. `kernel`: experts are computed by one kernel for all, from rows that are gathered
    before and combined after; else one after the other, where none of that is kept. `ep`: rows travel."""
    text = complete(config)
    return [_layer(text, index, kernel=kernel, ep=ep) for index in range(text["num_hidden_layers"])]


def head_dim(text: Mapping) -> int:
    """Dimensions of a head."""
    return text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]


def key_width(text: Mapping) -> int:
    """Elements of a token's keys."""
    heads = text["num_attention_heads"]
    if text.get("kv_lora_rank"):
        return heads * (text["qk_nope_head_dim"] + text["qk_rope_head_dim"])
    return (text.get("num_key_value_heads") or heads) * head_dim(text)


def _layer(text: Mapping, index: int, *, kernel: bool, ep: bool) -> Layer:
    hidden, kind = text["hidden_size"], text.get("model_type", "")
    attention, whole, keys, kept, costly = _latent(text) if text.get("kv_lora_rank") else _attention(text)
    heads = text["num_attention_heads"]
    key_heads = heads if text.get("kv_lora_rank") else text.get("num_key_value_heads") or heads
    before_and_after = kind.startswith(("gemma2", "gemma3"))
    norms = hidden * (4 if before_and_after else 2)
    dense, whole = attention + norms, whole + norms
    # A norm keeps its input, that divided by its size, and where a product follows its result.
    kept += hidden * (10 if before_and_after else 6)
    costly += 3 * hidden  # the input of the layer, and what both halves give
    if not holds_experts(text, index):
        width = text["intermediate_size"]
        bias = 2 * width + hidden if text.get("mlp_bias") else 0
        dense += 3 * hidden * width
        return Layer(dense + bias, whole, keys, key_heads, 0, dense, kept + 4 * width, costly + 2 * width, 0)
    width, gpt_oss = text.get("moe_intermediate_size") or text["intermediate_size"], kind == "gpt_oss"
    count = num_experts(text)
    visited, gated = text["num_experts_per_tok"], text.get("shared_expert_intermediate_size") or 0
    shared = (text.get("n_shared_experts") or 0) * width + gated
    beside = hidden * count + (hidden if gated else 0)
    dense, whole = dense + beside + 3 * hidden * shared, whole + beside
    experts = 3 * hidden * width * count
    products = dense + visited * 3 * hidden * width
    if gpt_oss:  # every product of the experts and the router has a bias
        dense, whole, experts = dense + count, whole + count, experts + (2 * width + hidden) * count
    # A visited expert keeps gate and up; with the kernel its input, what follows from both (thrice, where they are
    # clamped), and its result, too. Rows that travel are kept where they are computed and where they return.
    inner = (7 if gpt_oss else 4) if kernel else 2
    ends = 2 * hidden if kernel or ep else 0
    kept += visited * (ends + inner * width) + 4 * shared + (hidden if gated else 0)
    # Recompute begins anew before the norm of a mixture, whose three are kept, and for its experts.
    costly += 2 * hidden + visited * (2 * width + (hidden if kernel or ep else 0) + (2 * hidden if ep else 0))
    costly += 2 * shared + (hidden if shared else 0) + (hidden if gated else 0)
    return Layer(dense, whole, keys, key_heads, experts, products, kept, costly, 8 * count + 32 * visited)


def _attention(text: Mapping) -> tuple[int, int, int, int, int]:
    """(parameters, of them whole on tensor ranks, of them of keys and values, elements a token kept, of them costly) of
    multi-head attention: queries turned, keys turned, values, result; where heads are normed, both before that, too."""
    hidden, heads, dim, kind = text["hidden_size"], text["num_attention_heads"], head_dim(text), text.get("model_type")
    keys = text.get("num_key_value_heads") or heads
    count = hidden * dim * 2 * (heads + keys)
    of_keys, whole = 2 * hidden * dim * keys, 0
    if kind == "qwen2" or (kind == "qwen2_moe" and text["qkv_bias"]):
        count, of_keys = count + (heads + 2 * keys) * dim, of_keys + 2 * keys * dim
    elif text.get("attention_bias"):
        count, of_keys, whole = count + (heads + 2 * keys) * dim + hidden, of_keys + 2 * keys * dim, hidden
    costly = kept = 2 * dim * (heads + keys)
    if kind in ("qwen3", "qwen3_moe", "gemma3_text"):
        count, whole = count + 2 * dim, whole + 2 * dim
        kept *= 2
    if kind == "olmo2":
        count += (heads + keys) * dim
        kept *= 2
    if kind == "gpt_oss":
        count += heads
    return count, whole, of_keys, kept, costly


def _latent(text: Mapping) -> tuple[int, int, int, int, int]:
    """As `_attention`, of latent attention (DeepSeek-V3)."""
    hidden, heads, rank = text["hidden_size"], text["num_attention_heads"], text["kv_lora_rank"]
    inner, turned, value = text["qk_nope_head_dim"], text["qk_rope_head_dim"], text["v_head_dim"]
    queries = text.get("q_lora_rank")
    count = hidden * (rank + turned) + rank + rank * heads * (inner + value) + heads * value * hidden
    head = heads * (inner + turned)
    count += hidden * queries + queries + queries * head if queries else hidden * head
    whole = hidden * (rank + turned) + rank + (hidden * queries + queries if queries else 0)
    if text.get("attention_bias"):
        biases = (queries or 0) + rank + turned + hidden
        count, whole = count + biases, whole + biases
    vectors = 2 * (queries or 0) + 2 * rank + turned
    return (
        count,
        whole,
        0,
        vectors + 2 * head + heads * (inner + value) + 2 * heads * value,
        vectors + 2 * head + 2 * heads * value,
    )
