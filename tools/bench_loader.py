"""Speed of the trainer's loader against what others read with, in one run, every row checked.

    python tools/bench_loader.py --json bench_loader.json

A row is one pack of `--capacity` tokens; every contender hands out `input_ids`, shifted `labels`, `position_ids` and
`cu_seqlens`, made from the same packs. The peers store and read the packs; what they do not make themselves, numpy
makes after them. Peers that do not import are named (`pip install datasets litdata mosaicml-streaming`). Figures are
medians of rounds that alternate between all contenders, opening and closing the loader included; compare ratios, never
figures of another day. `cpu` counts the processor time of all threads, so it says what a whole core could do; `wall` is
what a training step sees.
`--verify full` is one reading of all files at start: its rate, and its time as a share of one pass of the loader. What
the loader could reach at best is measured beside it: numpy's plain copies of the same bytes.
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)
sys.path.insert(1, str(ROOT / "tests" / "support"))

from formats.dataset import PackedDataset  # noqa: E402
from formats.layout import cu_seqlens, position_ids, shift_labels, tail_segments  # noqa: E402
from make_shards import make_shards  # noqa: E402
from train.data import PackedLoader, Schedule, open_shards  # noqa: E402
from train.row import TAIL_SEGMENT  # noqa: E402

Row = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
BATCH_PACKS = 8


def chat_packs(count: int, capacity: int) -> list[tuple[np.ndarray, ...]]:
    """THD rows of chat-like lengths (log-normal around 200 tokens), 40 % of the tokens targets."""
    rng, rows = np.random.default_rng(0), []
    for _ in range(count):
        lengths: list[int] = []
        while (room := capacity - sum(lengths)) > 0:
            lengths.append(min(room, 8 + int(rng.lognormal(5.3, 0.9))))
        seq_lens = np.array(lengths, np.int32)
        ids = rng.integers(1, 49_000, capacity).astype(np.int32)
        mask = (rng.random(capacity) < 0.4).astype(np.uint8)
        mask[cu_seqlens(seq_lens)[:-1]] = 0
        rows.append((ids, mask, seq_lens, seq_lens, np.arange(len(lengths)), np.zeros(len(lengths), np.int32)))
    return rows


def complete(ids: np.ndarray, mask: np.ndarray, slots: np.ndarray, capacity: int) -> Row:
    """What a peer's pack still lacks, by numpy: labels, positions, segments."""
    segments = np.concatenate([slots, tail_segments(capacity - len(ids), TAIL_SEGMENT)])
    return ids, shift_labels(ids, mask), position_ids(segments), cu_seqlens(segments)


def ours(folder: Path, verify: bool) -> Callable[[], Iterator[Row]]:
    dataset = open_shards(str(folder))
    schedule = Schedule(len(dataset), "input", 0, 0, BATCH_PACKS, 1)

    def rows() -> Iterator[Row]:
        loader = PackedLoader(dataset, schedule, dp_rank=0, dp_size=1, device=torch.device("cpu"), verify=verify)
        for _ in range(schedule.steps(1)):
            loader.next_step()
            for row in loader.rows():
                yield row.input_ids, row.labels, row.position_ids, row.segments.cu_seqlens
        loader.close()

    return rows


def hf_datasets(folder: Path, packs: list, scratch: Path, capacity: int) -> Callable[[], Iterator[Row]]:
    from datasets import load_dataset

    files = sorted(str(path) for path in (folder / "shards").glob("*.arrow"))
    dataset = load_dataset("arrow", data_files=files, split="train", cache_dir=str(scratch / "hf")).with_format("numpy")

    def rows() -> Iterator[Row]:
        for row in dataset.iter(batch_size=1):
            mask = row["loss_mask"][0].astype(np.uint8)  # the numpy format makes every integer an int64
            yield complete(row["input_ids"][0], mask, row["seq_lens_padded"][0], capacity)

    return rows


def mosaicml_streaming(folder: Path, packs: list, scratch: Path, capacity: int) -> Callable[[], Iterator[Row]]:
    from streaming import MDSWriter, StreamingDataset

    columns = {"ids": "ndarray:int32", "mask": "ndarray:uint8", "slots": "ndarray:int32"}
    with MDSWriter(out=str(scratch / "mds"), columns=columns) as writer:
        for ids, mask, _, slots, *_ in packs:
            writer.write({"ids": ids, "mask": mask, "slots": slots})
    dataset = StreamingDataset(local=str(scratch / "mds"), shuffle=False, batch_size=1)
    return lambda: (complete(row["ids"], row["mask"], row["slots"], capacity) for row in dataset)


def litdata(folder: Path, packs: list, scratch: Path, capacity: int) -> Callable[[], Iterator[Row]]:
    from litdata import StreamingDataset
    from litdata.streaming.writer import BinaryWriter

    (scratch / "lit").mkdir()
    writer = BinaryWriter(str(scratch / "lit"), chunk_bytes="64MB")
    for i, (ids, mask, _, slots, *_) in enumerate(packs):
        writer[i] = {"ids": ids, "mask": mask, "slots": slots}
    writer.done()
    writer.merge()
    dataset = StreamingDataset(str(scratch / "lit"))
    return lambda: (complete(row["ids"], row["mask"], row["slots"], capacity) for row in dataset)


PEERS = {"datasets": hf_datasets, "mosaicml-streaming": mosaicml_streaming, "litdata": litdata}


def checksum(row: Row) -> tuple[int, ...]:
    ids, labels, positions, ends = (np.asarray(part) for part in row)
    return int(ids.sum()), int(labels.sum()), int(positions.sum()), int(np.unique(ends).sum())


def anonymous_bytes() -> int:
    """Memory of this process that is not mapped from files."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def latencies(folder: Path) -> dict[str, float]:
    """First row after opening, first row of a resume in the middle of a later epoch, and memory over the maps."""
    before, began = anonymous_bytes(), time.perf_counter()
    dataset = open_shards(str(folder))
    schedule = Schedule(len(dataset), "shuffle", 0, 0, BATCH_PACKS, 1)
    figures = {}
    for name, consumed in (("first_row_ms", 0), ("resume_ms", 7 * len(dataset) + len(dataset) // 2)):
        began = time.perf_counter() if consumed else began
        options = {"dp_rank": 0, "dp_size": 1, "device": torch.device("cpu"), "consumed": consumed}
        loader = PackedLoader(dataset, schedule, **options)
        loader.next_step()
        next(loader.rows())
        figures[name] = (time.perf_counter() - began) * 1e3
        figures["memory_over_maps_mb"] = (anonymous_bytes() - before) / 1e6
        loader.close()
    return figures


def copies(dataset: PackedDataset, buffers: int = 32) -> None:
    """The least that numpy does for these packs in one thread: ids moved once, labels and positions written from what
    is in the cache already, the mask read."""
    capacity = dataset.manifest.capacity
    rows = [[np.empty(capacity, np.int32) for _ in range(3)] for _ in range(buffers)]
    for n in range(len(dataset)):
        pack, (ids, labels, positions) = dataset[n], rows[n % buffers]
        ids[:] = pack.input_ids
        labels[:] = ids
        positions[:] = ids
        pack.loss_mask.any()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--capacity", type=int, default=8192)
    parser.add_argument("--packs", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)

    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        packs = chat_packs(-(-options.packs // BATCH_PACKS) * BATCH_PACKS, options.capacity)
        folder = make_shards(scratch / "packed", packs, capacity=options.capacity, shard_packs=256, batch_packs=64)
        contenders = {"meshpack": ours(folder, verify=False), "meshpack, verified": ours(folder, verify=True)}
        for peer, build in PEERS.items():
            try:
                contenders[peer] = build(folder, packs, scratch, options.capacity)
            except ImportError as error:
                print(f"{peer}: NOT MEASURED, {error}", file=sys.stderr)
        expected = [checksum(row) for row in contenders["meshpack"]()]
        assert len(expected) == len(PackedDataset(folder))
        for peer, rows in contenders.items():
            assert sorted(map(checksum, rows())) == sorted(expected), f"{peer} hands out other rows"
        figures = latencies(folder)

        seconds: dict[str, dict[str, list[float]]] = {peer: {"wall": [], "cpu": []} for peer in contenders}
        for _ in range(options.rounds):
            for peer, rows in contenders.items():
                gc.collect()
                wall, cpu = time.perf_counter(), time.process_time()
                for _ in rows():
                    pass
                seconds[peer]["wall"].append(time.perf_counter() - wall)
                seconds[peer]["cpu"].append(time.process_time() - cpu)

        checks: dict[str, list[float]] = {"wall": [], "cpu": []}
        floors: dict[str, list[float]] = {"wall": [], "cpu": []}
        dataset = PackedDataset(folder)
        stored = sum(entry.bytes for entry in dataset.manifest.files)
        for _ in range(options.rounds):
            for work, into in ((dataset.check_files, checks), (lambda: copies(dataset), floors)):
                wall, cpu = time.perf_counter(), time.process_time()
                work()
                into["wall"].append(time.perf_counter() - wall)
                into["cpu"].append(time.process_time() - cpu)

    tokens = len(packs) * options.capacity
    best = {peer: {k: statistics.median(v) for k, v in of.items()} for peer, of in seconds.items()}
    print(f"{'contender':<22}{'M tokens/s, cpu':>18}{'wall':>10}{'time, ours = 1':>18}")
    for peer, of in best.items():
        ratio = of["cpu"] / best["meshpack"]["cpu"]
        print(f"{peer:<22}{tokens / of['cpu'] / 1e6:>18.1f}{tokens / of['wall'] / 1e6:>10.1f}{ratio:>17.1f}×")
    print("  ".join(f"{name} {value:.1f}" for name, value in figures.items()))
    full, alone = ({k: statistics.median(v) for k, v in of.items()} for of in (checks, floors))
    figures["verify_full_bytes_per_second"] = stored / full["cpu"]
    figures["verify_full_of_one_reading"] = full["cpu"] / best["meshpack"]["cpu"]
    figures["verify_pack_of_one_reading"] = best["meshpack, verified"]["cpu"] / best["meshpack"]["cpu"] - 1
    figures["copies_alone_tokens_per_second"] = tokens / alone["cpu"]
    figures["loader_of_copies_alone"] = alone["cpu"] / best["meshpack"]["cpu"]
    print(
        f"--verify full: {stored / full['cpu'] / 1e9:.1f} GB/s once at start, "
        f"{figures['verify_full_of_one_reading']:.0%} of reading the shards once; --verify pack: "
        f"{figures['verify_pack_of_one_reading']:+.0%} on every reading"
    )
    print(
        f"plain copies of the same bytes: {tokens / alone['cpu'] / 1e6:.0f} M tokens/s; the loader reaches "
        f"{figures['loader_of_copies_alone']:.0%} of that"
    )
    if options.json:
        rates = {peer: {k: tokens / v for k, v in of.items()} for peer, of in best.items()}
        options.json.write_text(json.dumps({"tokens_per_second": rates, **figures}, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
