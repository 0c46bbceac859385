"""What other options would give: packs, fill and padding for algorithms × capacities × context-parallel sizes."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from formats.cost import Model, PackCost
from formats.layout import align_up, slot_alignment
from prep.materialize import pack_columns
from prep.packing.balance import straggler
from prep.plan import STREAM, PackOptions, Plan, make_plan

LLAMA_8B = Model.from_config(
    dict(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    )
)
"""The shape of Llama-3-8B: what attention costs where no model is named."""

WIDTHS = (2, 4, 8, 16, 32, 64)
"""Data-parallel widths for which the straggler ratio is stated."""


class Outcome(NamedTuple):
    """One row of the table. Shares are of all room; `cut` counts documents cut into pieces; `straggler` is the largest
    over `WIDTHS`, with the packs in cost-balanced order (1.0 where there are too few packs)."""

    algo: str
    seq_len: int
    cp: int
    packs: int
    lower_bound: int
    fill: float
    slot_padding: float
    tail_padding: float
    cut: int
    straggler: float


def stragglers(sum_sq: np.ndarray, capacity: int, cost: PackCost) -> dict[int, float]:
    """Straggler of packs in training order (Σ sᵢ² int64[P]) by data-parallel width, as far as there are packs."""
    costs = cost.of(capacity, sum_sq)
    return {width: straggler(costs, width) for width in WIDTHS if width <= len(sum_sq)}


def plan_for(lengths: np.ndarray, algo: str, seq_len: int, cp: int, seed: int = 0) -> Plan:
    """The plan of documents of `lengths` int32[N]; what is over the capacity is cut."""
    overlong = "error" if algo == STREAM else "split"
    options = PackOptions(seq_len, algo, cp, order="cost", overlong=overlong, seed=seed)
    options.check()
    return make_plan(lengths, np.arange(len(lengths)), options)


def outcome(plan: Plan, algo: str, seq_len: int, cp: int, cost: PackCost) -> Outcome:
    """What a plan amounts to."""
    room = plan.num_packs * seq_len
    tokens = int(plan.length.sum(dtype=np.int64))
    slots = int(align_up(plan.length, slot_alignment(cp)).sum(dtype=np.int64))
    sum_sq = pack_columns(plan.length, plan.offsets)["sum_sq"]
    return Outcome(
        algo,
        seq_len,
        cp,
        plan.num_packs,
        plan.lower_bound,
        tokens / room,
        (slots - tokens) / room,
        (room - slots) / room,
        len(plan.split),
        max(stragglers(sum_sq, seq_len, cost).values(), default=1.0),
    )


def table(
    lengths: np.ndarray, algos: Sequence[str], seq_lens: Sequence[int], cps: Sequence[int], cost: PackCost | None = None
) -> list[Outcome]:
    """All combinations that are possible (a capacity that is no multiple of 2·cp is left out)."""
    cost = cost or LLAMA_8B.pack_cost()
    rows = []
    for seq_len in seq_lens:
        for algo in algos:
            for cp in cps:
                if seq_len % slot_alignment(cp) == 0:
                    rows.append(outcome(plan_for(lengths, algo, seq_len, cp), algo, seq_len, cp, cost))
    return rows
