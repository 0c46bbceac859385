"""How fast plan + store become shards, against plain write() of the same bytes by as many workers to the same disk.

    python tools/bench_materialize.py [--tokens 200e6] [--seq-len 4096] [--workers 2] [--format thd] [--folder DIR]

Both sides run in the same process pool, in turns, and only the jobs are timed, so the start of the processes (and the
loading of the compiled kernels) counts for neither. `write` is write() of 4 MiB at a time from memory; `+ fsync` waits
for the disk as the shard writer does. The store is written anew, so it is page-cached as after an encode. Every round
is printed when it ends; the ratios are medians over the rounds.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import threading
import time
from functools import cache, partial
from pathlib import Path
from tempfile import mkdtemp

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

from formats.shard import write_json
from prep.encode.store import STORE_VERSION, DocumentStore, UnitWriter, source_ranges, store_content
from prep.engine.local import run_units
from prep.ledger import Ledger
from prep.materialize import Layout, materialize, write_shard
from prep.pipeline import shard_packs
from prep.plan import PackOptions, make_plan
from prep.rows import gather, locate, sequence_rows

UNIT_TOKENS = 1 << 20
CHUNK = 4 << 20
VOCABULARY = 49152


def make_store(path: Path, tokens: int, seq_len: int) -> DocumentStore:
    """A store of random documents, lengths log-normal as in chats (median 250 tokens), up to the capacity."""
    rng = np.random.default_rng(0)
    (path / "units").mkdir(parents=True)
    ledger, results = Ledger(), []
    for number in range(-(-tokens // UNIT_TOKENS)):
        lengths = np.clip(rng.lognormal(5.5, 1.0, UNIT_TOKENS // 300), 2, seq_len).astype(np.int64)
        offsets = np.append(0, np.cumsum(lengths))
        ids = rng.integers(0, VOCABULARY, offsets[-1], np.int32)
        mask = rng.integers(0, 2, offsets[-1], np.uint8)
        mask[offsets[:-1]] = 0
        part = Ledger()
        part.read("random", len(lengths), len(ids))
        part.keep("random", len(lengths), len(ids))
        with UnitWriter(path, number, "random") as writer:
            writer.write(ids, mask, offsets)
        results.append(writer.finish(part))
        ledger.merge(part)
    plan = dict(store_version=STORE_VERSION, inputs=[], options={}, packages={}, engine="hf", pad_id=0, bos_id=None)
    plan |= dict(tokenizer_hash="", template_hash="", vocab_size=VOCABULARY, eos_id=None)
    sources = source_ranges(["random"], [sum(r.rows for r in results)])
    write_json(path / "store.json", store_content(plan, results, ledger, sources))
    return DocumentStore.open(path)


def timed(function, job):
    """(begin, end, result); CLOCK_MONOTONIC is one clock for all processes."""
    begin = time.monotonic()
    result = function(job)
    return begin, time.monotonic(), result


def plain_write(sync: bool, job):
    """write() of a file's bytes, read into memory beforehand (which is not timed)."""
    source, target = job
    data = memoryview(source.read_bytes())
    begin = time.monotonic()
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for at in range(0, len(data), CHUNK):
        os.write(descriptor, data[at : at + CHUNK])
    if sync:
        os.fsync(descriptor)
    os.close(descriptor)
    return begin, time.monotonic(), None


def shard(sync: bool, job):
    load_kernels()
    if not sync:
        os.fsync = lambda descriptor: None
    return timed(write_shard, job)


@cache
def load_kernels() -> None:
    """Load the compiled kernels into this process, as its first shard would do."""
    none, one = np.empty(0, np.uint64), np.zeros(1, np.int64)
    locate(none, none, none, one, one[:0], one[:0], np.empty(0, np.int32))
    ids, mask = np.empty(0, np.int32), np.empty(0, np.uint8)
    gather(none, none, ids, one, one, 0, ids, mask, ids)
    sequence_rows(ids, mask, ids, one, one, 0, 1, ids, ids, ids, ids)


class PeakMemory(threading.Thread):
    """Largest anonymous memory (what is not a mapped file) of any child process."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak, self._done = 0, threading.Event()

    def run(self):
        while not self._done.wait(0.02):
            for child in multiprocessing.active_children():
                try:
                    status = Path(f"/proc/{child.pid}/status").read_text()
                except OSError:
                    continue
                anonymous = int(status.split("RssAnon:")[1].split()[0]) << 10 if "RssAnon:" in status else 0
                self.peak = max(self.peak, anonymous)

    def stop(self) -> int:
        self._done.set()
        self.join()
        return self.peak


def rate(function, jobs, workers, total) -> tuple[float, float]:
    """(bytes per second while the workers work, the same with the start of the processes)."""
    began = time.monotonic()
    spans = run_units(function, jobs, workers)
    whole = time.monotonic() - began
    busy = sum(end - begin for begin, end, _ in spans) / workers
    return total / busy, total / whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=float, default=2e8)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--format", choices=["thd", "seqid"], default="thd")
    parser.add_argument("--shard-size", type=int, default=256 << 20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to work, in a fresh folder; default: the temporary one")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()

    folder = Path(mkdtemp(prefix="bench-", dir=arguments.folder))
    try:
        figures = bench(arguments, folder)
    finally:
        shutil.rmtree(folder)
    if arguments.json:
        write_json(arguments.json, figures)
    print(json.dumps(figures, indent=2))


def bench(arguments, folder: Path) -> dict:
    options = PackOptions(arguments.seq_len, format=arguments.format)
    print(f"writing a store of about {1.33 * arguments.tokens:,.0f} tokens", flush=True)
    store = make_store(folder / "store", int(arguments.tokens), arguments.seq_len)
    plan = make_plan(store.lengths, np.arange(len(store)), options)
    layout = Layout(options.format, options.seq_len, options.align, 0, VOCABULARY)
    packs = shard_packs(options, arguments.shard_size)
    jobs = []
    materialize(
        *(plan, store, folder / "kept", layout),
        **dict(essentials={}, shard_packs=packs, workers=arguments.workers, on_done=lambda job, _: jobs.append(job)),
    )
    files = sorted((folder / "kept" / "shards").iterdir())
    total = sum(f.stat().st_size for f in files)
    target = folder / "target"
    target.mkdir()
    kept = folder / "kept" / "shards"
    ours = [type(j)(**{**vars(j), "path": target / j.path.name}) for j in sorted(jobs, key=lambda j: j.path)]
    theirs = [(kept / j.path.name, target / j.path.name) for j in ours]
    rates: dict[str, list] = {}
    memory = 0
    for turn in range(arguments.repeats):
        for name, function, work in (
            ("write", partial(plain_write, False), theirs),
            ("shards, not synced", partial(shard, False), ours),
            ("write + fsync", partial(plain_write, True), theirs),
            ("shards", partial(shard, True), ours),
        ):
            os.sync()
            sampler = PeakMemory()
            sampler.start()
            rates.setdefault(name, []).append(rate(function, work, arguments.workers, total))
            peak = sampler.stop()
            if work is ours:
                memory = max(memory, peak)
                assert all((target / f.name).stat().st_size == f.stat().st_size for f in files)
            for file in target.iterdir():
                file.unlink()
        latest = {name: f"{both[-1][0] / 1e6:,.0f} MB/s" for name, both in rates.items()}
        print(f"round {turn + 1}: " + ", ".join(f"{name} {rate}" for name, rate in latest.items()), flush=True)
    busy = {name: statistics.median(r[0] for r in both) for name, both in rates.items()}
    tokens = int(plan.length.sum(dtype=np.int64))
    return {
        "tokens": tokens,
        "bytes": total,
        "shards": len(files),
        "shard_bytes": files[0].stat().st_size,
        "documents": len(store),
        "workers": arguments.workers,
        "bytes_per_second": busy,
        "tokens_per_second_per_worker": {n: r / total * tokens / arguments.workers for n, r in busy.items()},
        "shards_over_write_not_synced": busy["shards, not synced"] / busy["write"],
        "shards_over_write_synced": busy["shards"] / busy["write + fsync"],
        "peak_anonymous_bytes_of_a_worker": memory,
        "peak_over_shard": memory / files[0].stat().st_size,
    }


if __name__ == "__main__":
    main()
