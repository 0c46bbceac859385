"""Bytes that context-parallel ranks exchange a layer, by method: arithmetic over packs of chats and of long texts.

    python tools/bench_cp.py [--capacity 32768] [--cp 8] [--packs 200]

Counted is what a rank receives from others in the forward pass of one layer (backward sends the same back), in bf16
with the heads of Llama-3 8B (32 query, 8 key/value, 128 dimensions): mean, and worst rank of any pack. The attention
imbalance is that of the cut: query-key pairs of the slowest rank over the mean of a pack, averaged over packs.
"""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np  # noqa: E402

from formats.layout import cu_seqlens, zigzag_indices  # noqa: E402
from train.parallel.cp import needed_counts  # noqa: E402

HEADS, KV_HEADS, HEAD_DIM, BYTES = 32, 8, 128, 2
LENGTHS = {"chats": (6.2, 0.9), "long texts": (9.0, 1.0)}  # mean and deviation of the logarithm of made-up lengths
WINDOW = 1024


def packs(kind, count, capacity, align, rng):
    """Rows of slot lengths, filled in order of arrival; the tail is left out."""
    row, rows = [], []
    while len(rows) < count:
        length = min(capacity, max(8, int(rng.lognormal(*LENGTHS[kind]))))
        slot = -(-length // align) * align
        if sum(row) + slot > capacity:
            rows.append(np.array(row))
            row = []
        row.append(slot)
    return rows


def received(slots, capacity, cp, window):
    """Tokens of keys and values that each rank receives by the method `needed`."""
    ends, part = cu_seqlens(slots), capacity // cp
    ends = np.append(ends, capacity)
    begins = np.arange(cp) * part
    firsts = ends[np.searchsorted(ends, begins, side="right") - 1]
    return np.array(needed_counts(tuple(firsts.tolist()), part, window)).sum(0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capacity", type=int, default=32768)
    parser.add_argument("--cp", type=int, default=8)
    parser.add_argument("--packs", type=int, default=200)
    options = parser.parse_args()
    capacity, cp = options.capacity, options.cp
    per_token = 2 * KV_HEADS * HEAD_DIM * BYTES
    part = capacity // cp
    gather = (capacity - part) * per_token
    heads = HEADS + 2 * max(KV_HEADS, cp) + HEADS  # q, k, v there and the output back
    ulysses = (cp - 1) * part * heads // cp * HEAD_DIM * BYTES
    print(f"capacity {capacity:,}, cp {cp}, {options.packs} packs, received a layer in forward\n")
    print(f"{'packs':<12}{'method':<24}{'mean MB':>9}{'worst MB':>10}{'of gather':>11}")
    for kind in LENGTHS:
        rows = packs(kind, options.packs, capacity, 2 * cp, np.random.default_rng(0))
        table = {"gather": (gather, gather), "ulysses": (ulysses, ulysses)}
        for name, window in (("needed", None), (f"needed, window {WINDOW}", WINDOW)):
            tokens = np.array([received(slots, capacity, cp, window) for slots in rows])
            table[name] = tokens.mean() * per_token, tokens.max() * per_token
        for name, (mean, worst) in table.items():
            print(f"{kind:<12}{name:<24}{mean / 1e6:>9.2f}{worst / 1e6:>10.2f}{mean / gather:>11.1%}")
        for cut in ("contiguous", "zigzag"):
            work = np.array([work_of(slots, capacity, cp, cut) for slots in rows])
            print(f"{kind:<12}attention work, {cut}: slowest rank / mean {(work.max(1) / work.mean(1)).mean():.3f}")


def work_of(slots, capacity, cp, cut):
    """Query-key pairs of each rank."""
    pairs = np.concatenate([np.arange(1, slot + 1) for slot in slots])
    if cut == "zigzag":
        return [pairs[zigzag_indices(slots, cp, r)].sum() for r in range(cp)]
    pairs = np.append(pairs, np.zeros(capacity - len(pairs), np.int64))
    return pairs.reshape(cp, -1).sum(1)


if __name__ == "__main__":
    main()
