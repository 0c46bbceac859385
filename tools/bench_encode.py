"""Speed and memory of `prep encode` against what people use, in one run, every result checked.

    python tools/bench_encode.py --tokenizer MODEL [--megabytes 256] [--slow-megabytes 64] [--json FILE]

Input: the real conversations of the demo packages, once as chats and once as plain texts, repeated in shuffled order
up to the size (or `--chats` / `--texts` files of your own). Everything runs with 2 processes; the peers are
`datasets.map` (batched tokenizer call; `apply_chat_template` an example, as TRL does it) and two floors, which take the
same records from JSON to Arrow without any tokenizer:

- "floor": as anybody writes it, the standard library's `json` a line and the records as they are to pyarrow. It is the
  floor that the targets for encoding were set by (105 MB/s on real chats there).
- "floor, our reader": stricter, and of our own making: prep's reader and workers, orjson, and only the words written
  (roles and the like thrown away). What prep does on top of it is its own work alone; nobody else has such a floor.

Rates are of text, medians of `--rounds` that alternate between all contenders. The slow ones, `datasets.map` and engine
hf, run `--slow-rounds` on the first `--slow-megabytes` of the same records. Every contender's start (processes,
imports, tokenizer) counts, but for `datasets.map`: what it takes on two records is taken from its time, or its rate
would suffer from the smaller file. (The first floor has no start at all: its processes are forks of this one.)
Compare ratios, never rates of another day. The JSON holds one entry for every tokenizer and size of input that was
measured: the start is a constant, so the shares of the floors grow with the input.
"""

import argparse
import functools
import json
import multiprocessing
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

# Each process that is started imports this file first, so what contenders need is imported where they need it.

PROCESSES = 2
SLOW = ("prep hf", "datasets.map")
FLOORS = {"floor": "share_of_floor", "floor, our reader": "share_of_floor_with_our_reader"}
"""Name of each floor, and of the shares of it in the JSON."""
_FLOOR_ROWS = 1000


def write_inputs(folder: Path, megabytes: float) -> tuple[Path, Path]:
    """(chats, texts) as JSON lines of about so many megabytes each."""
    from tools.demo_chats import write_chats

    write_chats(folder / "demo.jsonl")
    records = [json.loads(line) for line in (folder / "demo.jsonl").read_text(encoding="utf-8").splitlines()]
    draw = random.Random(0)
    chats, texts = folder / "chats.jsonl", folder / "texts.jsonl"
    for path in (chats, texts):
        size = 0
        with open(path, "w", encoding="utf-8") as file:
            while size < megabytes * 1e6:
                draw.shuffle(records)
                for record in records:
                    value = {"messages": record["messages"]}
                    if path == texts:
                        value = {"text": "\n".join(message["content"] for message in record["messages"])}
                    line = json.dumps(value, ensure_ascii=False) + "\n"
                    file.write(line)
                    size += len(line.encode())
                    if size >= megabytes * 1e6:
                        break
    return chats, texts


def text_bytes(path: Path) -> int:
    """Bytes of text in a file of records: what the rates count."""
    import orjson

    total = 0
    for line in path.read_bytes().splitlines():
        record = orjson.loads(line)
        words = [record["text"]] if "text" in record else [m["content"] for m in record["messages"]]
        total += sum(len(word.encode()) for word in words)
    return total


def ours(path: Path, tokenizer: str, out: Path, engine: str, workers: int = PROCESSES):
    """`prep encode`, from the file to the finished store."""
    from prep.encode.options import EncodeOptions
    from prep.encode.run import encode

    return encode([path], out, EncodeOptions(tokenizer, engine=engine), workers=workers)


def _plain_part(path: Path, begin: int, stop: int, out: Path) -> None:
    """The lines that begin in a range of bytes, as an Arrow file."""
    import pyarrow as pa

    schema, writer, rows = None, None, []
    with open(path, "rb") as file:
        if begin:
            file.seek(begin - 1)
            file.readline()
        while True:
            line = file.readline() if file.tell() < stop else b""
            if line:
                rows.append(json.loads(line))
            if rows and (not line or len(rows) == _FLOOR_ROWS):
                batch = pa.RecordBatch.from_pylist(rows, schema=schema)
                if writer is None:
                    schema = batch.schema
                    writer = pa.ipc.new_file(out, schema)
                writer.write_batch(batch)
                rows = []
            if not line:
                break
    if writer is not None:
        writer.close()


def plain_floor(path: Path, out: Path) -> None:
    """Parse and write Arrow, no tokenizer, as anybody writes it: each process takes an equal part of the file."""
    out.mkdir()
    bounds = [path.stat().st_size * k // PROCESSES for k in range(PROCESSES + 1)]
    parts = [(path, bounds[k], bounds[k + 1], out / f"{k}.arrow") for k in range(PROCESSES)]
    with multiprocessing.get_context("fork").Pool(PROCESSES) as pool:
        pool.starmap(_plain_part, parts)


def _floor_unit(out: str, source, unit) -> int:
    import orjson
    import pyarrow as pa

    from prep.encode.readers import read_unit

    schema = pa.schema([("text", pa.large_string())])
    words = []
    for _, line in read_unit(unit, source):
        record = orjson.loads(line)
        words += [record["text"]] if "text" in record else [m["content"] for m in record["messages"]]
    batch = pa.record_batch([pa.array(words, pa.large_string())], schema=schema)
    with pa.ipc.new_file(f"{out}/{unit.index}.arrow", schema) as writer:
        writer.write_batch(batch)
    return len(words)


def strict_floor(path: Path, out: Path) -> None:
    """The same with prep's own reader and workers and orjson, and only the words: what prep cannot beat."""
    from prep.encode.cuts import cut_units
    from prep.encode.sources import as_sources, find_inputs
    from prep.engine.local import run_units

    out.mkdir()
    sources = as_sources([path])
    units = cut_units(find_inputs(sources)[0], sources, 4 << 20)
    run_units(functools.partial(_floor_unit, str(out), sources[0]), units, PROCESSES)


PEER = """
import os, sys
os.environ["TOKENIZERS_PARALLELISM"] = "false"
import datasets
from transformers import AutoTokenizer
kind, path, tokenizer, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(tokenizer)
data = datasets.load_dataset("json", data_files=path, split="train", cache_dir=out)
def texts(batch):
    return {"input_ids": tokenizer(batch["text"])["input_ids"]}
def chat(row):
    return {"input_ids": tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=False)}
if kind == "texts":
    data = data.map(texts, batched=True, num_proc=2, remove_columns=data.column_names)
else:
    data = data.map(chat, num_proc=2, remove_columns=data.column_names)
print(sum(map(len, data["input_ids"])))
"""


def datasets_map(kind: str, path: Path, tokenizer: str, out: Path) -> None:
    """`datasets.map` with 2 processes, in a process of its own."""
    command = [sys.executable, "-c", PEER, kind, str(path), tokenizer, str(out)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)


def peak_memory(path: Path, tokenizer: str, out: Path, engine: str) -> float:
    """Largest sum of PSS, in MB, over `prep encode` with 2 workers and all its processes."""
    command = [sys.executable, "-m", "prep.cli", "encode", path, "--out", out, "--tokenizer", tokenizer, "--quiet"]
    process = subprocess.Popen([*command, "--workers", str(PROCESSES), "--tokenizer-engine", engine], cwd=ROOT)
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(map(_pss, _family(process.pid))))
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"prep encode failed on {path.name}")
    return peak / 1e3


def _family(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(member for child in children for member in _family(int(child)))]


def _pss(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has just ended
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def write_large(path: Path, document: Path, texts: Path) -> None:
    """Four records of 16 MB each, so that both workers hold one at a time; and one of about 300,000 tokens alone."""
    words = "\n\n".join(json.loads(line)["text"] for line in texts.read_text(encoding="utf-8").splitlines())
    words *= 1 + 16_000_000 // len(words.encode())
    large = words.encode()[:16_000_000].decode(errors="ignore")
    with open(path, "w", encoding="utf-8") as file:
        for text in (large,) * 4:
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    document.write_text(json.dumps({"text": words[:1_200_000]}, ensure_ascii=False) + "\n", encoding="utf-8")


def cpu_seconds() -> float:
    """CPU time of this process and all children that have ended: what a busy machine can still compare."""
    return sum(
        u.ru_utime + u.ru_stime for u in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def first_records(path: Path, out: Path, megabytes: float) -> Path:
    """The first records of a file, about so many megabytes; at least two, so that two processes have work."""
    size = 0
    with open(path, "rb") as file, open(out, "wb") as part:
        for number, line in enumerate(file):
            if number >= 2 and size >= megabytes * 1e6:
                break
            size += part.write(line)
    return out


def measure(contenders: dict, rounds: int, slow_rounds: int, work: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Median (seconds, CPU seconds) of each contender over alternating rounds."""
    seconds = {name: [] for name in contenders}
    cpu = {name: [] for name in contenders}
    for number in range(rounds):
        for name, function in contenders.items():
            if name in SLOW and number >= slow_rounds:
                continue
            out = work / f"{name.replace(', ', '-').replace(' ', '-')}-{number}"
            begin, begin_cpu = time.perf_counter(), cpu_seconds()
            function(out)
            seconds[name].append(time.perf_counter() - begin)
            cpu[name].append(cpu_seconds() - begin_cpu)
            shutil.rmtree(out, ignore_errors=True)
    return tuple({name: statistics.median(values) for name, values in times.items()} for times in (seconds, cpu))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--megabytes", type=float, default=256)
    parser.add_argument("--slow-megabytes", type=float, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--slow-rounds", type=int, default=1)
    parser.add_argument("--chats", type=Path)
    parser.add_argument("--texts", type=Path)
    parser.add_argument("--no-memory", action="store_true", help="leave out the peaks of memory")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    report = {"rounds": arguments.rounds, "slow_rounds": arguments.slow_rounds, "processes": PROCESSES}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        chats, texts = arguments.chats, arguments.texts
        if chats is None or texts is None:
            made = write_inputs(work, arguments.megabytes)
            chats, texts = chats or made[0], texts or made[1]
        for kind, path in (("texts", texts), ("chats", chats)):
            part = first_records(path, work / f"{kind}-part.jsonl", arguments.slow_megabytes)
            two = first_records(path, work / f"{kind}-two.jsonl", 0)
            contenders = {
                "prep auto": functools.partial(_ours, path, arguments.tokenizer, "auto"),
                "prep hf": functools.partial(_ours, part, arguments.tokenizer, "hf"),
                "datasets.map": functools.partial(_peer, kind, part, arguments.tokenizer),
                "floor": functools.partial(plain_floor, path),
                "floor, our reader": functools.partial(strict_floor, path),
            }
            seconds, cpu = measure(contenders, arguments.rounds, arguments.slow_rounds, work)
            start = {"datasets.map": functools.partial(_peer, kind, two, arguments.tokenizer)}
            seconds_to_start = measure(start, 1, 1, work)[0]["datasets.map"]
            whole, slow = text_bytes(path) / 1e6, text_bytes(part) / 1e6
            sizes = {name: slow if name in SLOW else whole for name in contenders}
            rates = {name: sizes[name] / value for name, value in seconds.items()}
            rates["datasets.map"] = slow / (seconds["datasets.map"] - seconds_to_start)
            print(f"\n{kind}: {whole:.1f} MB of text ({slow:.1f} MB for {' and '.join(SLOW)}), {PROCESSES} processes")
            for name, rate in rates.items():
                times = rate / rates["datasets.map"]
                shares = "   ".join(f"{100 * rate / rates[floor]:5.1f} % of the {floor}" for floor in FLOORS)
                figures = f"{rate:8.1f} MB/s   {times:6.2f} x datasets.map   {shares}"
                print(f"  {name:<17} {figures}   {cpu[name]:6.1f} CPU s", flush=True)
            report[kind] = {
                "megabytes": sizes,
                "seconds": seconds,
                "seconds_to_start": {"datasets.map": seconds_to_start},
                "cpu_seconds": cpu,
                "megabytes_per_second": rates,
                "times_datasets_map": {name: rate / rates["datasets.map"] for name, rate in rates.items()},
                **{key: {name: rate / rates[floor] for name, rate in rates.items()} for floor, key in FLOORS.items()},
            }
        size = f"{round(texts.stat().st_size / 1e6)} MB"
        if not arguments.no_memory:
            report["peak_pss_mb"] = measure_memory(chats, texts, arguments.tokenizer, work)
    if arguments.json:
        known = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
        known.setdefault(Path(arguments.tokenizer).name, {})[size] = report
        arguments.json.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")


def measure_memory(chats: Path, texts: Path, tokenizer: str, work: Path) -> dict[str, float]:
    """{what, engine: `peak_memory`} of the chats, of four times as many, and of large records."""
    large, document = work / "large.jsonl", work / "document.jsonl"
    write_large(large, document, texts)
    inputs = {"chats": chats, "chats x 4": work / "four.jsonl", "records of 16 MB": large}
    inputs["one document of 300,000 tokens"] = document
    inputs["chats x 4"].write_bytes(chats.read_bytes() * 4)
    peaks = {}
    for name, path in inputs.items():
        for engine in ("auto", "hf") if path in (large, document) else ("auto",):
            peak = peak_memory(path, tokenizer, work / "peak", engine)
            shutil.rmtree(work / "peak")
            print(f"peak of summed PSS, {PROCESSES} workers, {name}, engine {engine}: {peak:.0f} MB", flush=True)
            peaks[f"{name}, {engine}"] = peak
    return peaks


def _ours(path: Path, tokenizer: str, engine: str, out: Path) -> None:
    ours(path, tokenizer, out, engine)


def _peer(kind: str, path: Path, tokenizer: str, out: Path) -> None:
    datasets_map(kind, path, tokenizer, out)


if __name__ == "__main__":
    main()
