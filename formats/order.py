"""Which pack is trained when and where: pure functions of (packs, order, seed, epoch) and of the position.

The position in the data is one integer, the number of packs consumed. What a data-parallel rank reads at a step
follows from it and from the world size alone, so a run resumes at any other world size without repeating or losing
a pack.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

EMPTY = -1
"""Position of an empty pack: all padding, no targets."""


def scrambled(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014), uint64 → uint64, a bijection.

    numpy's own generators promise no stable stream between versions; an order that a resume depends on must not
    change with a library.
    """
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """A pseudo-random permutation of 0 … n−1, int64[n], a function of its arguments alone (any numpy version)."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        key = scrambled(scrambled(np.array([seed % 2**64], np.uint64) + golden) + np.uint64(epoch % 2**64) + golden)
        return np.argsort(scrambled(np.arange(n, dtype=np.uint64) * golden + key), kind="stable")


def epoch_order(num_packs: int, order: str, block: int, seed: int, epoch: int) -> np.ndarray:
    """Pack ids in the order in which `epoch` trains them, int64[num_packs].

    Args:
        order: `input` never permutes; `shuffle` permutes packs; `cost` permutes whole blocks of `block` packs of like
            cost, so that the packs of a micro-step stay alike (a last, partial block stays last).
    """
    if order == "input":
        return np.arange(num_packs)
    if order == "shuffle":
        return permutation(num_packs, seed, epoch)
    if order != "cost" or block < 1:
        raise ValueError(f"order must be input, shuffle or cost (with block ≥ 1), not {order!r} with block {block}")
    whole = num_packs // block
    blocks = permutation(whole, seed, epoch)
    head = (blocks[:, None] * block + np.arange(block)).ravel()
    return np.concatenate([head, np.arange(whole * block, num_packs)])


@dataclass(frozen=True)
class Stream:
    """One folder of a mixture: `num_packs` packs in its own `order` (and `block`), of which an epoch of the mixture
    takes the next `share`, beginning anew (and permuted anew) after each pass."""

    num_packs: int
    order: str
    block: int
    share: int


def shares(num_packs: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Packs that each folder gives to an epoch of Σ num_packs, in the ratio of `weights`, exact to one pack (largest
    remainders; of equal ones the first)."""
    total, weight = sum(num_packs), sum(weights)
    exact = [total * w / weight for w in weights]
    given = [int(x) for x in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: given[i] - exact[i])
    for i in by_remainder[: total - sum(given)]:
        given[i] += 1
    return given


def mixed_order(streams: Sequence[Stream], seed: int, epoch: int) -> np.ndarray:
    """Pack ids in the order in which `epoch` of a mixture trains them, int64[Σ share]; the ids of a folder follow those
    of the one before.

    The folders' packs are spread evenly: pack k of a share of n stands at (k + ½)/n of the epoch, so every stretch has
    the ratio of the shares, to about a pack (or a block of like cost, which stays together) of each. Every num_packs
    draws from a folder hold each of its packs exactly once, over the ends of epochs too.
    """
    ids, times, first = [], [], 0
    for stream in streams:
        drawn = np.arange(epoch * stream.share, (epoch + 1) * stream.share)
        unit = stream.block if stream.order == "cost" else 1
        passes = range(drawn[0] // stream.num_packs, drawn[-1] // stream.num_packs + 1) if len(drawn) else ()
        order = [epoch_order(stream.num_packs, stream.order, stream.block, seed, i) for i in passes]
        own = np.concatenate(order)[drawn - passes[0] * stream.num_packs] if len(drawn) else drawn
        ids.append(first + own)
        into_block = drawn % stream.num_packs % unit
        times.append((drawn - into_block - epoch * stream.share + unit / 2) / max(1, stream.share))
        first += stream.num_packs
    return np.concatenate(ids)[np.argsort(np.concatenate(times), kind="stable")]


def steps_per_epoch(num_packs: int, batch_packs: int) -> int:
    """Optimizer steps in an epoch; the last may be short."""
    return -(-num_packs // batch_packs)


def step_span(consumed: int, num_packs: int, batch_packs: int) -> tuple[int, int, int]:
    """`(epoch, start, stop)`: the positions in the epoch's order that the step after `consumed` packs trains.

    A step never crosses an epoch: the last one of an epoch is short.
    """
    epoch, start = divmod(consumed, num_packs)
    return epoch, start, min(start + batch_packs, num_packs)


def accumulation(batch_packs: int, micro_packs: int, dp_size: int) -> int:
    """Micro-steps of every rank in a step: ceil(batch_packs / (dp_size · micro_packs))."""
    return -(-batch_packs // (dp_size * micro_packs))


def rank_positions(
    start: int | np.ndarray,
    stop: int | np.ndarray,
    batch_packs: int,
    micro_packs: int,
    dp_rank: int,
    dp_size: int,
) -> np.ndarray:
    """Positions that one data-parallel rank trains in a step, int64[accumulation, micro_packs], `EMPTY` where none; of
    n steps at once, `start` and `stop` int64[n]: int64[n, accumulation, micro_packs].

    Packs are dealt round-robin, so that neighbours of the order (packs of like cost) run at the same time on
    different ranks. Every rank gets equally many rows, also in a short step: any world size works.
    """
    rows = accumulation(batch_packs, micro_packs, dp_size)
    start, stop = np.asarray(start)[..., None], np.asarray(stop)[..., None]
    position = start + dp_rank + dp_size * np.arange(rows * micro_packs)
    return np.where(position < stop, position, EMPTY).reshape(*start.shape[:-1], rows, micro_packs)
