"""Context parallelism by method: bytes that ranks exchange, attention FLOPs of the slowest rank over the mean, and both
beside `axolotl-ringmaster`, the nearest peer, on packed documents.

    python tools/bench_cp.py [--capacity 32768] [--cp 8] [--packs 200] [--json FILE]
    python tools/bench_cp.py --peer FOLDER [--ranks 4] [--json FILE]    # FOLDER: pip install --target of the peer

The first form is arithmetic over packs of made-up chats and long texts, by the same functions that training uses.
Counted is what a rank receives from others in the forward pass of one layer, in bf16 with the heads of Llama-3 8B (32
query, 8 key/value, 128 dimensions): mean, and worst rank of any pack. Backward returns as much; that of a ring fetches
the keys again as well. FLOPs are query-key pairs of a pack, slowest rank over mean, averaged over packs.

The second form runs both on gloo ranks of this machine, forward and backward of one attention layer, and compares them
with the documents one at a time; bytes are those handed to torch.distributed (own part of a collective left out), time
is the median of 5 rounds in one run.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np  # noqa: E402

from formats.layout import cu_seqlens, zigzag_indices  # noqa: E402
from train.parallel.cp import needed_counts  # noqa: E402
from train.pieces import Pieces, block, halo  # noqa: E402

HEADS, KV_HEADS, HEAD_DIM, BYTES = 32, 8, 128, 2
LENGTHS = {"chats": (6.2, 0.9), "long texts": (9.0, 1.0)}  # mean and deviation of the logarithm of made-up lengths
WINDOW = 1024


def packs(kind, count, capacity, align, rng):
    """Rows of slot lengths, filled in order of arrival; the last of each is padding, in segments of 128."""
    row, rows = [], []
    while len(rows) < count:
        length = min(capacity, max(8, int(rng.lognormal(*LENGTHS[kind]))))
        slot = -(-length // align) * align
        if sum(row) + slot > capacity:
            tail = capacity - sum(row)
            rows.append((np.array(row), [128] * (tail // 128) + [tail % 128] * (tail % 128 > 0)))
            row = []
        row.append(slot)
    return rows


def needed_tokens(ends, capacity, cp, window):
    """Tokens of keys and values that each rank receives by the method `needed`."""
    part = capacity // cp
    firsts = ends[np.searchsorted(ends, np.arange(cp) * part, side="right") - 1]
    return np.array(needed_counts(tuple(firsts.tolist()), part, window)).sum(0)


def ring_tokens(ends, capacity, cp, window):
    """The same by the method `ring`."""
    pieces = Pieces.of(ends, cp)
    if window is not None:
        received = [halo(pieces, r, window).receive_counts for r in range(cp)]
        return np.array([sum(counts) - counts[r] for r, counts in enumerate(received)])
    return np.array([sum(len(block(pieces, r, j).k_rows) for j in range(cp) if j != r) for r in range(cp)])


def arithmetic(options):
    capacity, cp = options.capacity, options.cp
    per_token, part = 2 * KV_HEADS * HEAD_DIM * BYTES, capacity // cp
    gather = capacity - part
    heads = HEADS + 2 * max(KV_HEADS, cp) + HEADS  # q, k, v there and the output back
    ulysses = (cp - 1) * part * heads // cp / (2 * KV_HEADS)
    print(f"capacity {capacity:,}, cp {cp}, {options.packs} packs of a kind, one layer forward\n")
    print(f"{'packs':<12}{'method':<28}{'mean MB':>9}{'worst MB':>10}{'of gather':>11}{'slowest/mean':>14}")
    rows = []
    for kind in LENGTHS:
        made = packs(kind, options.packs, capacity, 2 * cp, np.random.default_rng(0))
        made = [cu_seqlens(np.concatenate((slots, tail)).astype(np.int64)) for slots, tail in made]
        for window in (None, WINDOW):
            for method, cut, tokens in (
                ("gather", "contiguous", lambda ends, w: [gather]),
                ("gather", "zigzag", lambda ends, w: [gather]),
                ("needed", "contiguous", lambda ends, w: needed_tokens(ends, capacity, cp, w)),
                ("ring", "mixed", lambda ends, w: ring_tokens(ends, capacity, cp, w)),
                ("ulysses", "heads", lambda ends, w: [ulysses]),
            ):
                received = [tokens(ends, window) for ends in made]
                mean = float(np.mean([np.mean(t) for t in received])) * per_token
                worst = float(np.max([np.max(t) for t in received])) * per_token
                balance = float(np.mean([imbalance(ends, cp, cut, window) for ends in made]))
                name = f"{method}, {cut}" + f", window {window}" * (window is not None)
                print(
                    f"{kind:<12}{name:<28}{mean / 1e6:>9.2f}{worst / 1e6:>10.2f}"
                    f"{mean / (gather * per_token):>11.1%}{balance:>14.3f}"
                )
                rows.append(
                    {
                        "packs": kind,
                        "method": method,
                        "cut": cut,
                        "window": window,
                        "mean_bytes": round(mean),
                        "worst_bytes": round(worst),
                        "of_gather": round(mean / (gather * per_token), 4),
                        "slowest_rank_over_mean": round(balance, 4),
                    }
                )
    return {"capacity": capacity, "cp": cp, "packs": options.packs, "rows": rows}


def imbalance(ends, cp, cut, window):
    """Query-key pairs of the slowest rank over the mean of a pack."""
    slots = np.diff(ends)
    pairs = np.concatenate([np.arange(1, slot + 1) for slot in slots])
    if window is not None:
        pairs = np.minimum(pairs, window)
    if cut == "heads":
        return 1.0
    if cut == "contiguous":
        work = pairs.reshape(cp, -1).sum(1)
    elif cut == "zigzag":
        work = np.array([pairs[zigzag_indices(slots, cp, r)].sum() for r in range(cp)])
    else:
        pieces = Pieces.of(ends, cp)
        work = np.array([pairs[pieces.positions(r)].sum() for r in range(cp)])
    return work.max() / work.mean()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capacity", type=int, default=32768)
    parser.add_argument("--cp", type=int, default=8)
    parser.add_argument("--packs", type=int, default=200)
    parser.add_argument("--peer", help="folder that axolotl-ringmaster is installed in")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args()
    if options.peer:
        from tools.bench_cp_peer import compare

        result = compare(options.peer, options.ranks)
    else:
        result = arithmetic(options)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
