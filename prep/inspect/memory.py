"""What one device holds while a model trains, from its `config.json` alone: an estimate, byte by byte.

Symbols as in the model code: T tokens on this device, D hidden size, N query heads and K key heads of H dimensions, F
width of the MLP (of all experts that a token visits), V vocabulary. What a layer keeps for its backward was counted on
the trainer's own modules; the tests compare the whole with the tensors of tracked training steps.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

CPU_LOGIT_BYTES, GPU_LOGIT_BYTES, MIN_CHUNK, MAX_CHUNK = 1 << 26, 1 << 29, 128, 8192
"""How many logits exist at a time: the constants of `train/loss.py`."""
RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class Layout:
    """How a run is spread. Sizes of the axes as in the trainer; `ep` divides dp_shard · cp · tp. `tokens`: of one
    row, all context-parallel ranks together. `rows`: rows of a step on one rank (accumulation, pipeline
    microbatches). `bytes`: of a parameter in forward and backward (2: bfloat16). `gpu`: the optimizer needs no
    temporaries, and the head takes larger chunks."""

    tokens: int
    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    rows: int = 1
    bytes: int = 2
    recompute: str = "full"
    gpu: bool = True

    @property
    def shards(self) -> int:
        """Ranks that FSDP divides parameters among."""
        return self.dp_shard * self.cp


class Layer(NamedTuple):
    """A layer: parameters outside of experts and in all experts, and elements a token: `wide` are those of hidden size
    (divided by tp through sequence parallelism), `kept` those inside attention and MLP (divided by tp) that backward
    needs; `costly` of them are results of matrix products and attention, which selective recompute keeps. `rows` are
    those of the rows that a token sends to experts."""

    dense: int
    experts: int
    wide: int
    kept: int
    costly: int
    rows: int = 0


def parameters(config: Mapping) -> int:
    """Parameters of a decoder by its Hugging Face `config.json`: those that the trainer makes of it."""
    text = config.get("text_config", config)
    ends = text["vocab_size"] * text["hidden_size"] * (1 if _tied(text) else 2) + text["hidden_size"]
    return ends + sum(layer.dense + layer.experts for layer in layers(config))


def layers(config: Mapping) -> list[Layer]:
    """The layers of a decoder."""
    text = config.get("text_config", config)
    return [_layer(text, index) for index in range(text["num_hidden_layers"])]


def memory(config: Mapping, layout: Layout) -> dict[str, int]:
    """Estimated bytes on the device that holds most, at the moment it does: {"parameters", "optimizer", "gradients",
    "gathered", "activations", "working", "total"}.

    parameters, optimizer: float32 weights and both moments of AdamW, sharded over dp_shard · cp, tp, pp (experts over
    ep, and over what ep leaves of dp_shard · cp · tp). gradients: float32; while rows are accumulated FSDP holds them
    whole. gathered: two layers and the head in the type of the computation, with a pipeline all layers of the stage.
    activations: what backward needs, of all rows that are under way in a pipeline. working: the larger of a layer
    computed again with its gradients, of the head with a chunk of logits and the gradient of its weight, and of the
    optimizer's temporaries. What CUDA, NCCL and fragmentation take (2 GiB or so) is not counted.
    """
    text = config.get("text_config", config)
    every = layers(config)
    stage = every[-(-len(every) // layout.pp) * -1 :]  # the last stage has the head, and experts wherever there are any
    hidden, vocabulary = text["hidden_size"], text["vocab_size"]
    ends = vocabulary * hidden * (1 if _tied(text) or layout.pp > 1 else 2) // layout.tp
    dense = sum(layer.dense for layer in stage) // layout.tp + ends
    experts = sum(layer.experts for layer in stage) // layout.ep
    local = dense // layout.shards + experts // max(1, layout.shards * layout.tp // layout.ep)
    tokens = layout.tokens // layout.cp

    whole = max((_gathered(layer, layout) for layer in stage), default=0)
    sharded = layout.shards > 1
    gathered = (layout.bytes * (dense + experts if layout.pp > 1 else 2 * whole + ends)) if sharded else 0
    accumulated = sharded and layout.rows > 1
    gradients = 4 * (dense + experts if accumulated else local)
    under_way = min(layout.pp, layout.rows)
    kept = sum(_kept(layer, layout, hidden) for layer in stage)
    activations = int(tokens * layout.bytes * kept * under_way)

    widest = max(layer.wide * hidden // layout.tp + layer.kept // layout.tp for layer in stage)
    gathered_keys = 2 * 2 * layout.tokens * _key_width(text) // layout.tp if layout.cp > 1 else 0
    again = (widest * tokens if layout.recompute == "full" else 0) + widest * tokens // 2 + gathered_keys
    backward = layout.bytes * again + ((layout.bytes + 4) * whole if sharded else 0)
    head = _head(tokens, hidden, vocabulary // layout.tp, layout)
    step = 0 if layout.gpu else 4 * local
    # (gradients, activations, working) at the moments that can be the highest. Gradients of the first row come while
    # its activations go; those of further rows find them all.
    moments = [(gradients, 0, backward), (gradients, 0, step)]
    if layout.rows == 1:
        moments += [(0, activations, head), (4 * ends // layout.shards, activations, backward)]
    else:
        moments += [(gradients, activations, head), (gradients, activations, backward)]
    held, alive, working = max(moments, key=sum)
    value = {"parameters": 4 * local, "optimizer": 8 * local, "gradients": held, "gathered": gathered}
    value |= {"activations": alive, "working": working}
    return {**value, "total": sum(value.values())}


def _gathered(layer: Layer, layout: Layout) -> int:
    return layer.dense // layout.tp + layer.experts // layout.ep


def _kept(layer: Layer, layout: Layout, hidden: int) -> float:
    """Elements that a layer keeps of a token."""
    if layout.recompute == "full":
        return hidden / layout.tp
    if layout.recompute == "selective":
        # Rows are not sent twice: what arrives and what comes back are kept beside what experts made of them.
        return (3 * hidden + layer.costly + (2 * layer.rows if layout.ep > 1 else 0)) / layout.tp
    return (layer.wide * hidden + layer.kept) / layout.tp


def _head(tokens: int, hidden: int, vocabulary: int, layout: Layout) -> int:
    """Normed input and its gradient, a chunk of logits (float32 beside a narrower type), the weight's gradient."""
    logit_bytes = GPU_LOGIT_BYTES if layout.gpu else CPU_LOGIT_BYTES
    chunk = min(max(logit_bytes // (4 * vocabulary), MIN_CHUNK), MAX_CHUNK, tokens)
    logits = chunk * vocabulary * (4 if layout.bytes == 4 else layout.bytes + 4)
    weight = vocabulary * hidden * (4 if layout.bytes == 4 else layout.bytes + 4)
    return 3 * tokens * hidden * layout.bytes + logits + weight


def _key_width(text: Mapping) -> int:
    heads = text["num_attention_heads"]
    if text.get("kv_lora_rank"):
        return heads * (text["qk_nope_head_dim"] + text["qk_rope_head_dim"])
    return (text.get("num_key_value_heads") or heads) * _head_dim(text)


def _head_dim(text: Mapping) -> int:
    return text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]


def _tied(text: Mapping) -> bool:
    return bool(text.get("tie_word_embeddings", text.get("model_type") in ("gemma2", "gemma3_text", "smollm3")))


def _layer(text: Mapping, index: int) -> Layer:
    hidden = text["hidden_size"]
    attention, kept, costly = _latent(text) if text.get("kv_lora_rank") else _attention(text)
    kind = text.get("model_type", "")
    norms = hidden * (4 if kind.startswith(("gemma2", "gemma3")) else 2)
    count = text.get("num_local_experts") or text.get("num_experts") or text.get("n_routed_experts") or 0
    sparse = (index + 1) % text.get("decoder_sparse_step", 1) == 0 and index >= text.get("first_k_dense_replace", 0)
    if not count or not sparse or index in (text.get("mlp_only_layers") or ()):
        width = text["intermediate_size"]
        bias = 2 * width + hidden if text.get("mlp_bias") else 0
        return Layer(attention + norms + 3 * hidden * width + bias, 0, 6, kept + 4 * width, costly + 2 * width)
    width = text.get("moe_intermediate_size") or text["intermediate_size"]
    shared = (text.get("n_shared_experts") or 0) * width + (text.get("shared_expert_intermediate_size") or 0)
    router = hidden * count + 3 * hidden * shared + (hidden if text.get("shared_expert_intermediate_size") else 0)
    experts = 3 * hidden * width * count
    if kind == "gpt_oss":  # every product of the experts and the router has a bias
        router, experts = router + count, experts + (2 * width + hidden) * count
    visited = text["num_experts_per_tok"]
    # Each visited expert keeps its input row, gate, up, both products of them, and its result.
    kept += visited * (2 * hidden + 4 * width) + 4 * shared + 2 * count
    costly += visited * (hidden + 2 * width) + 2 * shared
    return Layer(attention + norms + router, experts, 6, kept, costly, rows=visited * hidden)


def _attention(text: Mapping) -> tuple[int, int, int]:
    """(parameters, elements a token kept, of them costly) of multi-head attention: queries turned, keys turned, values,
    result."""
    hidden, heads, dim, kind = text["hidden_size"], text["num_attention_heads"], _head_dim(text), text.get("model_type")
    keys = text.get("num_key_value_heads") or heads
    count = hidden * dim * 2 * (heads + keys)
    if kind == "qwen2" or (kind == "qwen2_moe" and text.get("qkv_bias", True)):
        count += (heads + 2 * keys) * dim
    elif text.get("attention_bias", kind == "gpt_oss"):
        count += (heads + 2 * keys) * dim + hidden
    if kind in ("qwen3", "qwen3_moe", "gemma3_text"):
        count += 2 * dim
    if kind == "olmo2":
        count += (heads + keys) * dim
    if kind == "gpt_oss":
        count += heads
    kept = 2 * dim * (heads + keys)
    return count, kept, kept


def _latent(text: Mapping) -> tuple[int, int, int]:
    """As `_attention`, of latent attention (DeepSeek-V3)."""
    hidden, heads, rank = text["hidden_size"], text["num_attention_heads"], text["kv_lora_rank"]
    inner, turned, value = text["qk_nope_head_dim"], text["qk_rope_head_dim"], text["v_head_dim"]
    queries = text.get("q_lora_rank")
    count = hidden * (rank + turned) + rank + rank * heads * (inner + value) + heads * value * hidden
    head = heads * (inner + turned)
    count += hidden * queries + queries + queries * head if queries else hidden * head
    if text.get("attention_bias"):
        count += (queries or 0) + rank + turned + hidden
    vectors = 2 * (queries or 0) + 2 * rank + turned
    return (
        count,
        vectors + 2 * head + heads * (inner + value) + 2 * heads * value,
        vectors + 2 * head + 2 * heads * value,
    )
