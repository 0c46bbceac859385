"""What one device holds while a model trains, from its `config.json` alone: an estimate, byte by byte.

The tests compare the whole with the tensors of training steps, of one process and of ranks of a mesh.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from formats.defaults import complete
from formats.stages import EMBEDDING_OVER_HEAD, split_by_cost
from prep.inspect.layers import Layer, key_width, layers, num_experts

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

    @property
    def fsdp(self) -> bool:
        """Whether FSDP has anything to do."""
        return self.shards * self.tp > 1 or self.bytes == 2

    @property
    def expert_shards(self) -> int:
        """Ranks that FSDP divides the experts of an expert-parallel rank among."""
        return max(1, self.shards * self.tp // self.ep)


def parameters(config: Mapping) -> int:
    """Parameters of a decoder by its Hugging Face `config.json`: those that the trainer makes of it."""
    text = complete(config)
    matrices = 1 if text.get("tie_word_embeddings") else 2
    ends = text["vocab_size"] * text["hidden_size"] * matrices + text["hidden_size"]
    return ends + sum(layer.dense + layer.experts for layer in layers(config))


def memory(config: Mapping, layout: Layout) -> dict[str, int]:
    """Estimated bytes on the device that holds most, at the moment it does: {"parameters", "optimizer", "gradients",
    "gathered", "activations", "working", "total"}.

    parameters, optimizer: float32 weights and both moments of AdamW, sharded over dp_shard · cp, tp, pp (experts over
    ep, and over what ep leaves of dp_shard · cp · tp). gradients: float32; while rows are accumulated FSDP holds them
    whole. gathered: two layers and the head in the type of the computation, with a pipeline all layers of the stage.
    activations: what backward needs, of all rows that are under way in a pipeline (with `--pp-schedule 1f1b`), and the
    hidden states that it receives. working: the larger of a layer computed again with its gradients, of the head with a
    chunk of logits and the gradient of its weight, and of the optimizer's temporaries. Experts are taken to be equally
    busy. What CUDA, NCCL and fragmentation take (2 GiB or so) is not counted.
    """
    text = complete(config)
    every = layers(config, kernel=layout.gpu, ep=layout.ep > 1)
    head = float(text["vocab_size"] * text["hidden_size"])
    sizes = split_by_cost([layer.products for layer in every], layout.pp, EMBEDDING_OVER_HEAD * head, head)
    starts = itertools.accumulate(sizes, initial=0)
    stages = [every[start : start + size] for start, size in zip(starts, sizes, strict=False)]
    found = [_of_stage(text, stage, number, layout) for number, stage in enumerate(stages)]
    return max(found, key=lambda value: value["total"])


def _of_stage(text: Mapping, stage: list[Layer], number: int, layout: Layout) -> dict[str, int]:
    """`memory` on a rank that holds these layers, under 1F1B."""
    hidden, vocabulary = text["hidden_size"], text["vocab_size"]
    first, last = number == 0, number == layout.pp - 1
    matrices = 1 if layout.pp == 1 and text.get("tie_word_embeddings") else first + last
    ends = vocabulary * hidden * matrices // layout.tp
    dense = sum(layer.dense_of(layout.tp) for layer in stage) + ends
    experts = sum(layer.experts for layer in stage) // layout.ep
    skew = expert_skew(text, layout)
    local = dense // layout.shards + int(experts * skew / layout.expert_shards)
    tokens = layout.tokens // layout.cp

    # What FSDP gathers of a layer: shares all as large as the largest. Over one rank it copies.
    wholes = [layer.dense_of(layout.tp) + int(layer.experts // layout.ep * skew) for layer in stage]
    whole = max(wholes) if layout.fsdp else 0
    gathered = layout.bytes * ((sum(wholes) if layout.pp > 1 else 2 * whole) + ends) if layout.fsdp else 0
    gradients = 4 * (dense + experts if layout.rows > 1 else local)
    under_way = min(layout.pp - number, layout.rows)
    kept = sum(_kept(layer, layout, hidden) for layer in stage)
    # torch makes room for the hidden states, and for their gradients, of all rows of a step.
    travels = layout.bytes * hidden // layout.tp * ((not first) + (not last)) * layout.rows
    activations = int(tokens * (kept * under_way + travels))

    widest = max(layer.kept * layout.bytes + layer.bytes for layer in stage) // layout.tp
    gathered_keys = 2 * 2 * layout.tokens * key_width(text) // layout.tp if layout.cp > 1 else 0
    again = (widest * tokens if layout.recompute == "full" else 0) + widest * tokens // 4 + layout.bytes * gathered_keys
    backward = again + (layout.bytes + 4) * whole
    head = _head(tokens, hidden, vocabulary // layout.tp, layout) if last else 0
    step = 0 if layout.gpu else 4 * local
    # (gradients, activations, working) at the moments that can be the highest. Gradients of the first row come while
    # its activations go; those of further rows find them all.
    moments = [(gradients, int(tokens * travels), backward), (gradients, 0, step)]
    if layout.rows == 1:
        moments += [(0, activations, head), (4 * ends // layout.shards, activations, backward)]
    else:
        moments += [(gradients, activations, head), (gradients, activations, backward)]
    held, alive, working = max(moments, key=sum)
    value = {"parameters": 4 * local, "optimizer": 8 * local, "gradients": held, "gathered": gathered}
    value |= {"activations": alive, "working": working}
    return {**value, "total": sum(value.values())}


def expert_skew(text: Mapping, layout: Layout) -> float:
    """Experts that the fullest FSDP rank holds over their mean: FSDP cuts those of an expert-parallel rank evenly
    between whole ones, their rows or their columns, or, where none of these can be divided, between whole ones."""
    ranks, held = layout.expert_shards, num_experts(text) // layout.ep
    width = text.get("moe_intermediate_size") or text["intermediate_size"]
    if not held or any(size % ranks == 0 for size in (held, text["hidden_size"], width)):
        return 1.0
    return -(-held // ranks) * ranks / held


def _kept(layer: Layer, layout: Layout, hidden: int) -> float:
    """Bytes that a layer keeps of a token."""
    if layout.recompute == "full":
        return layout.bytes * hidden / layout.tp
    elements = layer.costly if layout.recompute == "selective" else layer.kept
    return (layout.bytes * elements + layer.bytes) / layout.tp


def _head(tokens: int, hidden: int, vocabulary: int, layout: Layout) -> int:
    """Normed input and its gradient, a chunk of logits (float32 beside a narrower type), the weight's gradient."""
    logit_bytes = GPU_LOGIT_BYTES if layout.gpu else CPU_LOGIT_BYTES
    chunk = min(max(logit_bytes // (4 * vocabulary), MIN_CHUNK), MAX_CHUNK, tokens)
    logits = chunk * vocabulary * (4 if layout.bytes == 4 else layout.bytes + 4)
    weight = vocabulary * hidden * (4 if layout.bytes == 4 else layout.bytes + 4)
    return 3 * tokens * hidden * layout.bytes + logits + weight
