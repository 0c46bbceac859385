"""What training on packs would take: steps, memory, disk and compute, before anything is written."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from formats.cost import TRAINING, Model, num_experts
from formats.defaults import complete
from formats.layout import slot_alignment
from prep.inspect.layers import layers
from prep.inspect.memory import Layout, expert_skew, memory, parameters
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
    pp: int = 1
    dp_replicate: int = 1
    tp: int = 1
    ep: int = 1
    micro_packs: int = 1
    recompute: str = "full"
    dtype: str = "bfloat16"

    def width(self, cp: int) -> int:
        """Data-parallel ranks beside `cp` context-parallel ones. ValueError when the axes do not make the GPUs."""
        others = self.pp * self.tp * cp
        if self.gpus % (others * self.dp_replicate):
            raise ValueError(
                f"--gpus {self.gpus} is not a multiple of pp {self.pp} × dp_replicate {self.dp_replicate} × cp {cp} × "
                f"tp {self.tp} = {others * self.dp_replicate}; change --gpus or an axis"
            )
        shards = self.gpus // (self.pp * self.dp_replicate)
        if shards % self.ep:
            raise ValueError(f"--ep {self.ep} does not divide dp_shard × cp × tp = {shards}; take a divisor of it")
        return self.gpus // others

    def check_model(self) -> None:
        """ValueError where the trainer would refuse the model on this mesh."""
        if self.config is None:
            return
        experts, depth = num_experts(complete(self.config)), len(layers(self.config))
        if self.ep > 1 and not experts:
            raise ValueError(f"--ep {self.ep} is for mixtures of experts, and this model has none: leave it out")
        if self.ep > 1 and experts % self.ep:
            raise ValueError(f"--ep {self.ep} does not divide the {experts} experts of a layer; take an --ep that does")
        if self.pp > depth:
            raise ValueError(f"--pp {self.pp} makes more stages than the {depth} layers; lower --pp")

    def fits(self, cp: int) -> bool:
        """Whether `cp` context-parallel ranks leave whole numbers of data-parallel ones."""
        try:
            return self.width(cp) > 0
        except ValueError:
            return False


def forecast(row: Outcome, lengths: np.ndarray, scale: float, setup: Setup) -> dict:
    """JSON-compatible: the forecast for one row of the what-if table, whose plan stands for `scale` times as much.

    batch_packs is what `--batch-packs` would be: the batch in packs, a multiple of the data-parallel width.
    """
    width = setup.width(row.cp)
    batch = max(1, round(setup.batch_tokens / row.seq_len / width)) * width
    least = setup.pp * setup.micro_packs * width
    if -(-batch // width // setup.micro_packs) < setup.pp:
        raise ValueError(
            f"--pp {setup.pp} needs at least {setup.pp} rows a rank and step, and {setup.batch_tokens} tokens make "
            f"{-(-batch // width // setup.micro_packs)}; take --batch-tokens {least * row.seq_len}"
        )
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
        layout = _layout(row, setup, batch // width)
        value["memory_gib"] = {name: size / GIB for name, size in memory(setup.config, layout).items()}
        value["expert_skew"] = expert_skew(complete(setup.config), layout)
    return value


def _layout(row: Outcome, setup: Setup, packs: int) -> Layout:
    """`packs`: packs of a step on one data-parallel rank."""
    return Layout(
        tokens=setup.micro_packs * row.seq_len,
        pp=setup.pp,
        dp_replicate=setup.dp_replicate,
        dp_shard=setup.width(row.cp) // setup.dp_replicate,
        cp=row.cp,
        tp=setup.tp,
        ep=setup.ep,
        rows=-(-packs // setup.micro_packs),
        bytes=2 if setup.dtype == "bfloat16" else 4,
        recompute=setup.recompute,
    )


def warnings(row: Outcome, value: Mapping) -> list[str]:
    """What to think twice about."""
    found = []
    if value["steps_per_epoch"] < FEW_STEPS:
        batch = value["batch_packs"]
        found.append(
            f"only {value['steps_per_epoch']} optimizer steps an epoch: a step of {batch} packs has "
            f"{value['tokens_per_step']:,} tokens; take a smaller batch, a shorter --seq-len, or more epochs"
        )
    if value.get("expert_skew", 1.0) > 1.05:
        found.append(
            f"FSDP cannot cut the experts evenly: the fullest of its ranks holds {value['expert_skew']:.1f} times "
            "their mean, of weights and optimizer; take another --ep or --dp-replicate"
        )
    if row.cut:
        found.append(f"{row.cut:,} documents are longer than {row.seq_len:,} tokens and would be cut")
    if row.seq_len % slot_alignment(row.cp) == 0 and row.slot_padding > 0.05:
        found.append(f"cp {row.cp} costs {row.slot_padding:.1%} in slot padding: documents are short for it")
    return found
