"""Cost-balanced order: packs of like cost run at the same time on all ranks.

A data-parallel step lasts as long as its most expensive pack, and with equal tokens packs still differ by Σ sᵢ² of
attention. So packs are put in blocks of like cost: within windows of 16 blocks, drawn at random, packs are sorted by
cost and cut into blocks, and the blocks are shuffled. Nothing is sorted globally: every window of 16 blocks holds the
whole spread of costs once. Only the last block of each window, the tail of the distribution, where 64 neighbours may
lie far apart, is dealt anew among four windows: each still has one block of the costliest sixteenth, but narrower.

`formats.order` permutes whole blocks by seed and epoch, so the property holds in every epoch. All ordering is on the
integers Σ sᵢ² (a·capacity is the same for every pack); floats appear in the report only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from formats.cost import PackCost
from formats.order import permutation

BLOCKS = 16
"""Blocks in a window."""
MOST_BLOCK = 64
TAIL_WINDOWS = 4
"""Windows that share their costliest blocks. Measured at 64 ranks, 8B, mixed lengths at 128k: 1 gives a straggler of
1.05–1.08, 2 1.04–1.06, 4 1.03–1.045, 16 1.02–1.04; more windows make steps more alike inside (see `length_spread`)."""


def cost_order(sum_sq: np.ndarray, seed: int, block: int | None = None) -> tuple[np.ndarray, int]:
    """(order int64[P], block): position i trains pack order[i]; each aligned run of `block` positions is alike in cost.

    sum_sq: int64[P], Σ sᵢ² of the real lengths of each pack. block: packs in a block, a multiple of the data-parallel
    widths to be served; min(64, P // 16) when None. The last P mod block packs, a random draw, come last, since
    `formats.order` never permutes a partial block. Raises ValueError for a block under 1.
    """
    sum_sq = np.asarray(sum_sq, np.int64)
    packs = sum_sq.size
    if block is None:
        block = max(1, min(MOST_BLOCK, packs // BLOCKS))
    if block < 1:
        raise ValueError(f"block is {block}: use at least 1 pack.")
    drawn = permutation(packs, seed, 0)
    blocks = packs // block
    windows = -(-blocks // BLOCKS)
    order = drawn.copy()
    last_blocks = []
    for w in range(windows):
        low, high = w * BLOCKS * block, min((w + 1) * BLOCKS, blocks) * block
        order[low:high] = _sorted(drawn[low:high], sum_sq)
        last_blocks.append(slice(high - block, high))
    for g in range(0, windows, TAIL_WINDOWS):
        group = last_blocks[g : g + TAIL_WINDOWS]
        dealt = _sorted(np.concatenate([order[s] for s in group]), sum_sq).reshape(-1, block)
        for s, packs_of_block in zip(group, dealt, strict=True):
            order[s] = packs_of_block
    tail = order[blocks * block :]
    shuffled = order[: blocks * block].reshape(blocks, block)[permutation(blocks, seed, 1)]
    return np.concatenate([shuffled.ravel(), tail]), block


def straggler(cost: np.ndarray, width: int) -> float:
    """Σ max / Σ mean over micro-steps of `width` consecutive packs: 1.0 is balance, 1.2 is 20 % of the time waited.

    cost: float64[P] in training order. A last micro-step that is short is left out; 1.0 when there is no whole one.
    """
    whole = cost.size // width
    if whole == 0:
        return 1.0
    rows = cost[: whole * width].reshape(whole, width)
    return float(rows.max(axis=1).sum() / rows.mean(axis=1).sum())


@dataclass(frozen=True)
class BalanceReport:
    """What the order gains and what it costs, against a random order of the same packs.

    widths: data-parallel widths. before, after: the straggler at each. length_spread: coefficient of variation of the
    mean document length of a step, (random, this order). mix_spread: mean total variation between a step's mix of
    sources (by tokens) and the whole set's, (random, this order); None without sources.
    """

    widths: tuple[int, ...]
    before: tuple[float, ...]
    after: tuple[float, ...]
    length_spread: tuple[float, float]
    mix_spread: tuple[float, float] | None


def balance_report(
    sum_sq: np.ndarray,
    docs: np.ndarray,
    tokens: np.ndarray,
    order: np.ndarray,
    cost: PackCost,
    capacity: int,
    *,
    seed: int,
    batch_packs: int = MOST_BLOCK,
    widths: Sequence[int] = (2, 4, 8, 16, 32, 64),
    source_tokens: np.ndarray | None = None,
) -> BalanceReport:
    """Compares `order` int64[P] with a random order drawn from `seed`.

    sum_sq, docs, tokens: int64[P] per pack; source_tokens: int64[P, sources] or None; a step is `batch_packs` packs.
    """
    random = permutation(order.size, seed, 2)
    costs = cost.of(capacity, sum_sq)
    widths = tuple(w for w in widths if w <= order.size)
    both = (random, order)
    return BalanceReport(
        widths,
        tuple(straggler(costs[random], w) for w in widths),
        tuple(straggler(costs[order], w) for w in widths),
        tuple(_length_spread(tokens[o], docs[o], batch_packs) for o in both),
        None if source_tokens is None else tuple(_mix_spread(source_tokens[o], batch_packs) for o in both),
    )


def _sorted(packs: np.ndarray, sum_sq: np.ndarray) -> np.ndarray:
    return packs[np.argsort(sum_sq[packs], kind="stable")]


def _length_spread(tokens: np.ndarray, docs: np.ndarray, batch: int) -> float:
    mean = _steps(tokens[:, None], batch)[:, 0] / _steps(docs[:, None], batch)[:, 0]
    return float(mean.std() / mean.mean())


def _mix_spread(source_tokens: np.ndarray, batch: int) -> float:
    steps = _steps(source_tokens, batch)
    share = steps / steps.sum(axis=1, keepdims=True)
    whole = source_tokens.sum(axis=0) / source_tokens.sum()
    return float(np.abs(share - whole).sum(axis=1).mean() / 2)


def _steps(x: np.ndarray, batch: int) -> np.ndarray:
    """Sums over whole steps of `batch` packs (over everything when there is no whole step)."""
    batch = min(batch, x.shape[0])
    whole = x.shape[0] // batch
    return x[: whole * batch].reshape(whole, batch, -1).sum(axis=1)
