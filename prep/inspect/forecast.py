"""What training on packs would take: steps, memory, disk and compute, before anything is written."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from formats.cost import TRAINING, Model
from formats.layout import slot_alignment
from prep.inspect.whatif import Outcome, plan_for
from prep.packing.balance import straggler

FEW_STEPS = 100
"""Optimizer steps an epoch below which packing may leave too few updates to learn from."""
BYTES_PER_TOKEN = 5  # THD: an int32 id and a uint8 mask
GIB = 1 << 30


@dataclass(frozen=True)
class Setup:
    """What the training would run on. `batch_tokens`: tokens of an optimizer step, padding included. `config`: the
    `config.json` of the model, or None."""

    gpus: int
    batch_tokens: int
    config: Mapping | None = None
    peak_tflops: float = 989.0
    mfu: float = 0.4


def forecast(row: Outcome, lengths: np.ndarray, scale: float, setup: Setup) -> dict:
    """JSON-compatible: the forecast for one row of the what-if table, whose plan stands for `scale` times as much.

    batch_packs is what `--batch-packs` would be: the batch in packs, a multiple of the data-parallel width.
    """
    width = max(1, setup.gpus // row.cp)
    batch = max(1, round(setup.batch_tokens / row.seq_len / width)) * width
    packs = max(1, round(row.packs * scale))
    steps = -(-packs // batch)
    plan = plan_for(lengths, row.algo, row.seq_len, row.cp)
    sum_sq = np.add.reduceat(plan.length.astype(np.int64) ** 2, plan.offsets[:-1])
    model = Model.from_config(setup.config) if setup.config else None
    value = {
        "data_parallel": width,
        "batch_packs": batch,
        "steps_per_epoch": steps,
        "tokens_per_step": round(batch * row.seq_len * row.fill),
        "padding_share": row.slot_padding + row.tail_padding,
        "shard_bytes": round(packs * row.seq_len * BYTES_PER_TOKEN * (1 - row.tail_padding)),
        "store_bytes": round(packs * row.seq_len * BYTES_PER_TOKEN * row.fill),
    }
    if model is not None:
        cost = model.pack_cost()
        value["straggler"] = straggler(cost.of(row.seq_len, sum_sq), min(width, len(sum_sq)))
        flops = TRAINING * scale * model.flops(plan.length, plan.num_packs * row.seq_len)
        value["petaflops_per_epoch"] = flops / 1e15
        value["gpu_hours_per_epoch"] = value["straggler"] * flops / (setup.peak_tflops * 1e12 * setup.mfu) / 3600
        value["parameters"] = parameters(setup.config)
        value["memory_gib"] = {k: v / GIB for k, v in memory(setup.config, row.seq_len // row.cp, setup.gpus).items()}
    return value


def warnings(row: Outcome, value: Mapping) -> list[str]:
    """What to think twice about."""
    found = []
    if value["steps_per_epoch"] < FEW_STEPS:
        batch = value["batch_packs"]
        found.append(
            f"only {value['steps_per_epoch']} optimizer steps an epoch: a step of {batch} packs has "
            f"{value['tokens_per_step']:,} tokens; take a smaller batch, a shorter --seq-len, or more epochs"
        )
    if row.cut:
        found.append(f"{row.cut:,} documents are longer than {row.seq_len:,} tokens and would be cut")
    if row.seq_len % slot_alignment(row.cp) == 0 and row.slot_padding > 0.05:
        found.append(f"cp {row.cp} costs {row.slot_padding:.1%} in slot padding: documents are short for it")
    return found


def parameters(config: Mapping) -> int:
    """Parameters of a decoder by its Hugging Face config: embeddings, attention, feed-forward or experts, norms."""
    text = config.get("text_config", config)
    hidden, layers, vocab = text["hidden_size"], text["num_hidden_layers"], text["vocab_size"]
    total = vocab * hidden * (1 if text.get("tie_word_embeddings") else 2) + hidden
    return total + sum(_layer(text, layer) for layer in range(layers))


def _layer(text: Mapping, layer: int) -> int:
    hidden, heads = text["hidden_size"], text["num_attention_heads"]
    kv_heads, head_dim = text.get("num_key_value_heads") or heads, text.get("head_dim") or hidden // heads
    attention = hidden * head_dim * 2 * (heads + kv_heads)
    experts = text.get("num_local_experts") or text.get("num_experts") or text.get("n_routed_experts") or 0
    dense = 3 * hidden * text["intermediate_size"]
    if not experts or layer < text.get("first_k_dense_replace", 0) or layer in text.get("mlp_only_layers", ()):
        return attention + dense + 2 * hidden
    width = text.get("moe_intermediate_size") or text["intermediate_size"]
    shared = (text.get("n_shared_experts") or 0) * width + (text.get("shared_expert_intermediate_size") or 0)
    return attention + 3 * hidden * (experts * width + shared) + hidden * experts + 2 * hidden


def memory(config: Mapping, tokens: int, gpus: int) -> dict[str, int]:
    """Estimated bytes of one GPU that holds `tokens` of a row, with FSDP over all GPUs.

    states: float32 parameters, gradients and both moments of AdamW, sharded (16 bytes a parameter). gathered: two
    layers in bf16 (one in use, one on its way) and the head. activations: with recomputation, one bf16 hidden state a
    layer and what one layer holds while it runs; logits are computed in chunks and not counted.
    """
    text = config.get("text_config", config)
    hidden, layers = text["hidden_size"], text["num_hidden_layers"]
    widest = max(_layer(text, layer) for layer in (0, layers - 1))
    inside = 6 * hidden + 4 * text["intermediate_size"]
    value = {
        "states": 16 * parameters(config) // gpus,
        "gathered": 2 * (2 * widest + text["vocab_size"] * hidden) if gpus > 1 else 0,
        "activations": 2 * tokens * (layers * hidden + inside),
    }
    return {**value, "total": sum(value.values())}
