"""Speed and quality of the packing planner against its peers, in one run, every result checked.

    python tools/bench_pack.py --json bench_pack.json            # everything, some minutes
    python tools/bench_pack.py --sections speed,quality --sizes 10000,100000

Peers are used where they import and named loudly where they do not (`tools/bench_pack_peers.py` says how to install
them). Times are medians of runs that alternate between all contenders; compare ratios, never times of another day.
Sections: quality (all workloads, sizes and packers), speed (ratios of the targets), large (1e8 documents), krell,
balance, start.
"""

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numba
import numpy as np
from numba import njit

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from formats.cost import Model  # noqa: E402
from prep.packing import Packing, pack  # noqa: E402
from prep.packing.balance import balance_report, cost_order  # noqa: E402
from prep.packing.bfd import bfd  # noqa: E402
from prep.packing.lengths import Lengths  # noqa: E402
from tools.bench_pack_peers import available, lpfhp  # noqa: E402

SECTIONS = ("quality", "speed", "large", "krell", "balance", "start")
OURS = ("greedy", "ordered", "ffd", "bfd", "level", "best", "optimal")
LLAMA_8B = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "intermediate_size": 14336, "vocab_size": 128256,
}  # fmt: skip


def lognormal(mu: float, sigma: float):
    return lambda rng, n, c: np.clip(rng.lognormal(mu, sigma, n), 1, c)


def pareto(rng, n, c):
    return np.clip((rng.pareto(1.1, n) + 1) * 200, 1, c)


def uniform(low: float, high: float):
    return lambda rng, n, c: rng.integers(max(1, int(low * c)), int(high * c) + 1, n)


WORKLOADS = {
    "sft@2048": (lognormal(6, 0.8), 2048),
    "sft@32768": (lognormal(6, 1.2), 32768),
    "short@4096": (lognormal(4, 0.6), 4096),
    "web@8192": (pareto, 8192),
    "web@131072": (pareto, 131072),
    "uniform@2048": (uniform(0, 1), 2048),
    "thirds@8192": (uniform(1 / 5, 1 / 2), 8192),
    "thirds@256": (uniform(1 / 5, 1 / 2), 256),
    "gsm8k-like@512": (lambda rng, n, c: np.clip(rng.normal(170, 55, n), 20, c), 512),
    "c4-like@2048": (lognormal(5.6, 1.05), 2048),
    "over half@8192": (lambda rng, n, c: rng.integers(c // 2 + 1, c // 2 + 300, n), 8192),
    "constant@2048": (lambda rng, n, c: np.full(n, 700), 2048),
}


def lengths_of(name: str, n: int) -> tuple[np.ndarray, int]:
    make, capacity = WORKLOADS[name]
    return make(np.random.default_rng(0), n, capacity).astype(np.int32), capacity


def demo_lengths(model: Path, capacity: int) -> np.ndarray | None:
    """Token counts of the demo's conversations, as ChatML, cut off at the capacity; None (said loudly) without them."""
    try:
        from tokenizers import Tokenizer

        from tools.demo_chats import chatterbot, chitchat

        tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        chats = [turns for source in (chitchat(), chatterbot()) for turns in source if turns]
    except Exception as error:  # packages or the demo's tokenizer are missing: tools/demo makes both
        print(f"!! DEMO DATA LEFT OUT: {type(error).__name__}: {error} (run tools/demo first)", flush=True)
        return None
    texts = ["".join(f"<|im_start|>user\n{turn}<|im_end|>\n" for turn in turns) for turns in chats]
    lengths = [len(e.ids) for e in tokenizer.encode_batch_fast(texts)]
    return np.clip(lengths, 1, capacity).astype(np.int32)


@njit(cache=True)
def bincount(x, counts):
    for v in x:
        counts[v] += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default=",".join(SECTIONS), help="comma-separated; default all")
    parser.add_argument("--sizes", default="10000,100000", help="documents, for the quality section")
    parser.add_argument("--lengths", type=Path, action="append", default=[], help=".npy of real lengths, for quality")
    parser.add_argument("--capacity", type=int, default=2048, help="capacity for --lengths")
    parser.add_argument(
        "--demo-model", type=Path, default=ROOT / "demo-out" / "model", help="folder with the tokenizer"
    )
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write all results here")
    options = parser.parse_args()
    peers, missing = available()
    for name, reason in missing.items():
        print(f"!! PEER MISSING: {name} ({reason})", flush=True)
    print(f"peers in this run: {', '.join(peers) or 'none'}\n", flush=True)
    results, targets = {"missing": missing}, []
    for section in options.sections.split(","):
        print(f"== {section}", flush=True)
        results[section] = globals()[f"run_{section}"](options, peers, targets)
        print(flush=True)
    print("== targets")
    for t in targets:
        mark = "ok  " if t["met"] else "MISS"
        print(f"{mark} {t['what']}: {t['measured']:.4g} (target {t['relation']} {t['target']:g})")
    results["targets"] = targets
    results["about"] = {
        "command": " ".join(["python", "tools/bench_pack.py", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "numba": numba.__version__},
    }
    if options.json:
        options.json.write_text(json.dumps(results, indent=1, sort_keys=True, default=float) + "\n")


def target(targets: list, what: str, measured: float, relation: str, limit: float) -> None:
    met = measured >= limit if relation == ">=" else measured <= limit
    targets.append({"what": what, "measured": float(measured), "relation": relation, "target": limit, "met": bool(met)})


# ---- running and checking -------------------------------------------------------------------------------------------


def check(lengths: np.ndarray, capacity: int, ids: np.ndarray, num_bins: int) -> None:
    """Each document in exactly one bin, no bin over, none empty."""
    assert ids.shape == lengths.shape, "not every document is packed"
    assert ids.min() >= 0, "a document has no bin"
    load = np.bincount(ids, weights=lengths, minlength=num_bins)
    assert load.size == num_bins, "bins are not numbered 0 … num_bins − 1"
    assert load.max() <= capacity, "a bin is over the capacity"
    assert np.bincount(ids, minlength=num_bins).min() > 0, "a bin is empty"


def check_peer(lengths: np.ndarray, capacity: int, bins: list[list[int]]) -> int:
    docs = np.concatenate([np.asarray(b, np.int64) for b in bins])
    assert np.array_equal(np.sort(docs), np.arange(lengths.size)), "a document is missing or packed twice"
    ids = np.empty(lengths.size, np.int64)
    ids[docs] = np.repeat(np.arange(len(bins)), [len(b) for b in bins])
    check(lengths, capacity, ids, len(bins))
    return len(bins)


def alternate(contenders: dict, repeats: int, budget: float = 20.0) -> dict[str, float]:
    """Median seconds of each contender; all take turns, one that has used up its budget drops out of later rounds.

    A turn is about 20 ms of runs in a row, at least one, so that no contender is timed on caches that another filled.
    """
    times = {name: [] for name in contenders}
    in_a_row = {}
    for name, run in contenders.items():
        run()  # lazy imports, kernels from the cache
        in_a_row[name] = max(1, min(50, int(0.02 / _timed(run))))
    for _ in range(repeats):
        for name, run in contenders.items():
            if sum(times[name]) < budget:
                gc.collect()
                times[name] += [_timed(run) for _ in range(in_a_row[name])]
    return {name: statistics.median(t) for name, t in times.items()}


def _timed(run) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def peak_extra_mb(run) -> float:
    """Peak resident memory during `run` over that before it, in MB (Linux)."""
    ctypes.CDLL(None).malloc_trim(0)  # what earlier runs freed must not hide what this one takes
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    keep = run()
    peak = _status("VmHWM")
    del keep
    return (peak - before) / 1024


def _status(field: str) -> int:
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if field in line)


# ---- sections -------------------------------------------------------------------------------------------------------


def run_quality(options, peers, targets) -> list[dict]:
    rows, worse = [], 0
    cases = [(name, *lengths_of(name, int(n))) for n in options.sizes.split(",") for name in WORKLOADS]
    demo = demo_lengths(options.demo_model, 1024)
    cases += [] if demo is None else [("demo@1024", demo, 1024)]
    cases += [(path.stem, np.load(path).astype(np.int32), options.capacity) for path in options.lengths]
    print(f"{'workload':16} {'N':>8} {'packer':18} {'ms':>10} {'fill %':>8} {'bins':>8} {'over bound %':>12} {'MB':>7}")
    for name, lengths, capacity in cases:
        found: dict[str, tuple] = {}
        for algo in OURS:
            packing: Packing = pack(lengths, capacity, algo)  # also loads the kernels
            seconds = _timed(partial(pack, lengths, capacity, algo))
            check(lengths, capacity, packing.bin_ids, packing.num_bins)
            memory = peak_extra_mb(partial(pack, lengths, capacity, algo))
            found[algo] = packing.num_bins, seconds, memory
            if algo == "optimal":
                bound, certificate = packing.lower_bound, str(packing.certificate)
        for peer, (prepare, most) in peers.items():
            if lengths.size > most or (peer == "lightbinpack bfd" and lengths.size > 10**5):
                continue
            plan = prepare(lengths, capacity)
            begin = time.perf_counter()
            bins = plan()
            seconds = time.perf_counter() - begin
            if peer == "olmo-core":
                plan.convert = True
                bins = plan()
            number = plan.bins if bins is None else check_peer(lengths, capacity, bins)
            found[peer] = number, seconds, peak_extra_mb(plan)
        best_peer = min((found[p][0] for p in peers if p in found), default=None)
        worse += best_peer is not None and found["best"][0] > best_peer
        for packer, (bins, seconds, memory) in found.items():
            row = {
                "workload": name, "documents": lengths.size, "packer": packer, "ms": seconds * 1e3, "bins": bins,
                "fill": float(lengths.sum(dtype=np.int64) / (bins * capacity)), "over_bound": bins / bound - 1,
                "peak_extra_mb": memory,
            }  # fmt: skip
            rows.append(row)
            print(
                f"{name:16} {lengths.size:8} {packer:18} {row['ms']:10.2f} {100 * row['fill']:8.3f} {bins:8} "
                f"{100 * row['over_bound']:12.4f} {memory:7.1f}",
                flush=True,
            )
        print(f"{'':16} certificate: {certificate}")
        gaps = {a: found[a][0] / bound - 1 for a in ("bfd", "best")}
        limit = {"thirds@8192": 0.6, "web@8192": 0.5, "c4-like@2048": 0.5}.get(name)
        if limit and gaps["bfd"] > 0:
            target(
                targets,
                f"gap of best over gap of bfd, {name}, N={lengths.size}",
                gaps["best"] / gaps["bfd"],
                "<=",
                limit,
            )
        if name == "thirds@256":
            gap = found["optimal"][0] / bound - 1
            target(targets, f"optimal over the LP bound, {name}, N={lengths.size}", gap, "<=", 0.005)
    target(targets, "cases where best has more bins than the best peer", worse, "<=", 0)
    return rows


def run_speed(options, peers, targets) -> list[dict]:
    rows = []
    goals = {
        ("sft@2048", 10**5): {"trl bfd": 700, "automodel neat": 250, "lightbinpack obfd": 15},
        ("sft@2048", 10**6): {"lightbinpack obfd": 50},
        ("web@131072", 10**4): {"lightbinpack obfd": 5},
    }
    for (name, n), goal in goals.items():
        lengths, capacity = lengths_of(name, n)
        contenders = {"bfd": partial(pack, lengths, capacity, "bfd")}
        contenders |= {peer: peers[peer][0](lengths, capacity) for peer in peers if n <= peers[peer][1]}
        times = alternate(contenders, options.repeats)
        for packer, seconds in times.items():
            ratio = seconds / times["bfd"]
            rows.append({"workload": name, "documents": n, "packer": packer, "ms": seconds * 1e3, "ratio": ratio})
            print(f"{name:12} {n:9} {packer:18} {seconds * 1e3:10.3f} ms {ratio:8.1f}x", flush=True)
        for peer, limit in goal.items():
            if peer in times:
                target(targets, f"times faster than {peer}, {name}, N={n}", times[peer] / times["bfd"], ">=", limit)
    return rows


def run_large(options, peers, targets) -> dict:
    lengths, capacity = lengths_of("sft@2048", 10**8)
    counts = np.zeros(capacity + 1, np.int64)
    times = alternate(
        {"bincount": lambda: bincount(lengths, counts), "bfd": lambda: pack(lengths, capacity, "bfd")},
        min(options.repeats, 7),
        60.0,
    )
    packing = pack(lengths, capacity, "bfd")
    check(lengths, capacity, packing.bin_ids, packing.num_bins)
    del packing
    extra = peak_extra_mb(lambda: pack(lengths, capacity, "bfd")) - lengths.nbytes / 2**20
    ratio = times["bfd"] / times["bincount"]
    print(f"1e8 documents: bfd {times['bfd']:.3f} s, bincount {times['bincount']:.3f} s, ratio {ratio:.2f}")
    print(f"{extra:.1f} MB beyond input and output")
    target(targets, "bfd over a numba bincount, N=1e8 (goal 7)", ratio, "<=", 14)
    target(targets, "MB beyond input and output, N=1e8", extra, "<=", 64)
    return {"seconds": times, "extra_mb": extra}


def run_krell(options, peers, targets) -> dict:
    """16 M sequences, a quarter of them at the maximum of 512 and the rest falling off, as BERT's Wikipedia set has."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5.2, 0.85, 16_279_552), 5, 512).astype(np.int32)
    lengths[rng.random(lengths.size) < 0.15] = 512
    histogram = np.bincount(lengths, minlength=513).astype(np.int64)
    ours = Lengths(lengths, 512, 1).histogram
    theirs = lpfhp(histogram, 512)
    used = np.zeros(513, np.int64)
    for content, packs in theirs.items():
        np.add.at(used, list(content), packs)
    assert np.array_equal(used, histogram), "LPFHP lost a sequence"
    plan = bfd(ours, lengths.size)
    packing = pack(lengths, 512, "best")
    check(lengths, 512, packing.bin_ids, packing.num_bins)
    times = alternate({"lpfhp": lambda: lpfhp(histogram, 512), "bfd": lambda: bfd(ours, lengths.size)}, options.repeats)
    times |= alternate({"bfd with ids": lambda: pack(lengths, 512, "bfd")}, 3)
    tokens = int(lengths.sum(dtype=np.int64))
    bins = {"lpfhp": sum(theirs.values()), "bfd": plan.num_bins, "best": packing.num_bins}
    fill = {k: tokens / (512 * b) for k, b in bins.items()}
    for k, b in bins.items():
        print(f"{k:6} {b} bins, fill {100 * fill[k]:.4f} %")
    print(f"plan: lpfhp {times['lpfhp'] * 1e3:.1f} ms, bfd {times['bfd'] * 1e3:.3f} ms")
    print(f"histogram, plan and ids of all sequences: {times['bfd with ids'] * 1e3:.0f} ms")
    target(targets, "fill of bfd less that of LPFHP, 16 M sequences", fill["bfd"] - fill["lpfhp"], ">=", 0)
    target(targets, "times faster than LPFHP, plan of 16 M sequences", times["lpfhp"] / times["bfd"], ">=", 50)
    return {"bins": bins, "fill": fill, "seconds": times}


def run_balance(options, peers, targets) -> list[dict]:
    rng, rows = np.random.default_rng(0), []
    chat = rng.lognormal(6, 1.0, 1_500_000)
    mixed = chat.copy()
    long = rng.random(mixed.size) < 0.05
    mixed[long] = rng.lognormal(9.2, 1.0, int(long.sum()))
    cost = Model.from_config(LLAMA_8B).pack_cost()
    cases = ("chat", chat, 32768, 1.02), ("mixed", mixed, 32768, 1.02), ("mixed", mixed, 131072, 1.05)
    for name, values, capacity, limit in cases:
        lengths = np.clip(values, 8, capacity).astype(np.int32)
        for algo in ("bfd", "level"):
            p = pack(lengths, capacity, algo)
            sum_sq = np.zeros(p.num_bins, np.int64)
            np.add.at(sum_sq, p.bin_ids, lengths.astype(np.int64) ** 2)
            docs, tokens = np.bincount(p.bin_ids), np.bincount(p.bin_ids, lengths)
            sources = np.stack([np.bincount(p.bin_ids, lengths * (long == s)) for s in (False, True)], axis=1)
            order, block = cost_order(sum_sq, 0)
            r = balance_report(
                sum_sq, docs, tokens, order, cost, capacity, seed=0, widths=(2, 8, 48, 64), source_tokens=sources
            )
            print(f"{name}@{capacity} {algo}: {p.num_bins} packs, block {block}")
            print(f"    spread of the step's mean document length {np.round(r.length_spread, 3)} (random, ours)")
            print(f"    spread of the step's source mix {np.round(r.mix_spread, 3)}")
            for width, before, after in zip(r.widths, r.before, r.after, strict=True):
                print(f"    {width:3} ranks: straggler {before:.4f} -> {after:.4f}")
                rows.append(
                    {"case": f"{name}@{capacity}", "algo": algo, "packs": p.num_bins, "width": width, "before": before,
                     "after": after, "length_spread": r.length_spread, "mix_spread": r.mix_spread}
                )  # fmt: skip
            target(targets, f"straggler at 64 ranks, {name}@{capacity}, {algo}", r.after[-1], "<=", limit)
    return rows


def run_start(options, peers, targets) -> dict:
    code = (
        "import numpy as np, numba, time; l = np.arange(1, 2049, dtype=np.int32); t = time.perf_counter();"
        "from prep.packing import pack; u = time.perf_counter(); pack(l, 2048); v = time.perf_counter();"
        "print(u - t, v - u)"
    )
    runs = []
    for _ in range(6):  # the first fills numba's cache
        out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
        runs.append([float(x) for x in out.split()])
    loading, first = np.median(np.array(runs[1:]), axis=0)
    print(f"import prep.packing {loading * 1e3:.0f} ms after numba, first call {first * 1e3:.0f} ms")
    target(targets, "seconds from `import numba` to the first result, warm cache", loading + first, "<=", 0.5)
    return {"import": loading, "first_call": first}


if __name__ == "__main__":
    main()
