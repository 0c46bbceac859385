"""Speed and memory of the trainer: on CPU against TRL's SFTTrainer on the same packs, on a GPU by itself.

    python tools/bench_train.py --model MODEL [--capacity 4096] [--processes 1] [--json bench_train.json]
    python tools/bench_train.py --shapes qwen3-0.6b --device cuda --capacity 16384 [--flags 'compile recompute=full']

CPU: real chats of the demo are packed, one pack a process and step, and converted by `prep convert --to hf`; both
trainers take the same packs, precision (float32), optimizer and threads, neither recomputes. Checked in the same run:
both losses are those of the documents one at a time, and not that of documents which see each other. A rate is of
target tokens over the median step. Compare ratios, never rates of another day. The JSON holds one entry for every
case that was measured.

GPU: packs of random ids with chat-like lengths and random weights of the shapes, in bfloat16; tokens/s, MFU from the
real lengths, peak memory. A graph is compiled for every power of two up to which a row's longest document reaches, so
the median of many steps is one without compiling.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)
sys.path.insert(1, str(ROOT / "tests" / "support"))

import torch  # noqa: E402

from formats.dataset import PackedDataset  # noqa: E402
from formats.layout import cu_seqlens  # noqa: E402
from make_shards import make_shards  # noqa: E402
from prep.cli import main as prep  # noqa: E402
from prep.encode.options import EncodeOptions  # noqa: E402
from prep.encode.run import encode  # noqa: E402
from prep.packing import pack  # noqa: E402
from tools.demo_chats import write_chats  # noqa: E402
from train.combinations import as_arguments  # noqa: E402
from train.config import Model  # noqa: E402
from train.precision import compute_dtype  # noqa: E402

LEARNING_RATE = 1e-5
CHATS_A_PACK = 400  # more than fit
WARM_UP = 2  # steps without a rate: kernels are chosen, memory is taken, blocks compiled
TOLERANCE = 1e-3  # of TRL's float32 cross-entropy; documents that see each other are ten times further off

SHAPES = {
    "tiny": {"hidden": 64, "intermediate": 128, "layers": 2, "heads": 4, "kv_heads": 2, "vocab": 512, "head": 16},
    "qwen3-0.6b": {
        **{"hidden": 1024, "intermediate": 3072, "layers": 28, "heads": 16, "kv_heads": 8, "vocab": 151936},
        **{"head": 128, "tied": True, "type": "qwen3"},
    },
    "llama3-8b": {
        **{"hidden": 4096, "intermediate": 14336, "layers": 32, "heads": 32, "kv_heads": 8, "vocab": 128256},
        "head": 128,
    },
}


def pack_chats(folder: Path, model: Path, capacity: int, packs: int) -> tuple[Path, Path]:
    """Exactly so many packs of the demo's chats: (packed folder, the same for TRL)."""
    write_chats(folder / "all.jsonl")
    lines = (folder / "all.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[: CHATS_A_PACK * packs]
    some = folder / "some.jsonl"
    some.write_text("".join(lines), encoding="utf-8")
    lengths = encode([some], folder / "store", EncodeOptions(str(model)), workers=1).lengths
    assert len(lengths) == len(lines)
    fitting = lengths <= capacity
    low, high = 1, len(lines)
    while low < high:  # the longest beginning of the file that fills no more packs
        middle = (low + high + 1) // 2
        if pack(lengths[:middle][fitting[:middle]], capacity=capacity, algo="ffd").num_bins <= packs:
            low = middle
        else:
            high = middle - 1
    some.write_text("".join(lines[:low]), encoding="utf-8")
    flags = ["--tokenizer", str(model), "--seq-len", str(capacity), "--overlong", "drop", "--no-page", "--quiet"]
    prep(["pack", str(some), "--out", str(folder / "packed"), *flags], standalone_mode=False)
    prep(["convert", str(folder / "packed"), "--to", "hf", "--out", str(folder / "hf")], standalone_mode=False)
    assert len(PackedDataset(folder / "packed")) == packs
    return folder / "packed", folder / "hf"


def torchrun(processes: int, script: str, arguments: list[str], log: Path) -> None:
    """Run a script of the checkout on so many processes, the cores divided among them."""
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), script, *arguments]
    with open(log, "w", encoding="utf-8") as file:
        code = subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=file, check=False).returncode
    if code:
        raise SystemExit(f"{script} failed:\n{log.read_text(encoding='utf-8')[-3000:]}")


def train_ours(folder: Path, name: str, processes: int, flags: dict[str, object]) -> list[dict]:
    """The metrics of a run, step by step."""
    out = folder / name
    arguments = [*as_arguments(flags), "--out", str(out), "--no-export", "--no-save-last"]
    torchrun(processes, "train/main.py", arguments, folder / f"{name}.log")
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def against_trl(options: argparse.Namespace) -> dict:
    processes, steps = options.processes, options.steps
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        packed, converted = pack_chats(folder, options.model, options.capacity, processes)
        packs = PackedDataset(packed)
        targets, documents = int(packs.index.target_tokens.sum()), int(packs.index.documents.sum())
        flags = {"shards": packed, "model": options.model, "device": "cpu", "dtype": "float32"}
        flags |= {"steps": steps, "epochs": steps, "batch-packs": processes, "lr": LEARNING_RATE, "min-lr-ratio": 1.0}
        ours = train_ours(folder, "ours", processes, flags)
        arguments = [str(options.model), str(converted), str(steps), str(LEARNING_RATE), str(folder / "trl.json")]
        torchrun(processes, "tools/bench_train_trl.py", arguments, folder / "trl.log")
        theirs = json.loads((folder / "trl.json").read_text(encoding="utf-8"))

    alone, joined = theirs["loss_alone"], theirs["loss_joined"]
    for name, loss in (("meshpack", ours[0]["loss"]), ("TRL", theirs["losses"][0])):
        off = abs(loss / alone - 1)
        assert off < TOLERANCE < abs(joined / alone - 1), f"{name} does not isolate documents: {loss}, alone {alone}"
    drift = max(abs(a["loss"] / b - 1) for a, b in zip(ours, theirs["losses"], strict=True))
    assert drift < TOLERANCE, f"the losses part: {[line['loss'] for line in ours]} and {theirs['losses']}"
    rates = {
        "meshpack": targets / statistics.median(line["step_seconds"] for line in ours[1:]),
        "trl": targets / statistics.median(theirs["seconds"][1:]),
    }
    memory = {"meshpack": ours[-1]["memory_bytes"], "trl": theirs["memory_bytes"]}
    return {
        "capacity": options.capacity,
        "processes": processes,
        "documents": documents,
        "targets_a_step": targets,
        "target_tokens_per_second": rates,
        "speed_over_trl": rates["meshpack"] / rates["trl"],
        "peak_memory_bytes": memory,
        "memory_over_trl": memory["meshpack"] / memory["trl"],
        "losses": {"meshpack": [line["loss"] for line in ours], "trl": theirs["losses"]},
        "loss_of_documents_alone": alone,
        "loss_of_documents_joined": joined,
        "largest_loss_difference": drift,
    }


def write_model(folder: Path, shapes: dict) -> None:
    folder.mkdir()
    kind = shapes.get("type", "llama")
    config = {
        "model_type": kind,
        "architectures": [{"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}[kind]],
        "hidden_size": shapes["hidden"],
        "intermediate_size": shapes["intermediate"],
        "num_hidden_layers": shapes["layers"],
        "num_attention_heads": shapes["heads"],
        "num_key_value_heads": shapes["kv_heads"],
        "head_dim": shapes["head"],
        "vocab_size": shapes["vocab"],
        "tie_word_embeddings": shapes.get("tied", False),
        "rms_norm_eps": 1e-6,
        "rope_theta": 500000.0,
        "max_position_embeddings": 131072,
        "hidden_act": "silu",
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def random_rows(count: int, capacity: int, vocab: int) -> list[tuple[np.ndarray, ...]]:
    """THD rows of chat-like lengths (log-normal around 1000 tokens), half of the tokens targets."""
    rng, rows = np.random.default_rng(0), []
    for _ in range(count):
        lengths: list[int] = []
        while (room := capacity - sum(lengths)) > 0:
            lengths.append(min(room, 16 + int(rng.lognormal(6.5, 1.0))))
        seq_lens = np.array(lengths, np.int32)
        mask = (rng.random(capacity) < 0.5).astype(np.uint8)
        mask[cu_seqlens(seq_lens)[:-1]] = 0
        ids = rng.integers(1, vocab, capacity).astype(np.int32)
        rows.append((ids, mask, seq_lens, seq_lens, np.arange(len(lengths)), np.zeros(len(lengths), np.int32)))
    return rows


def by_itself(options: argparse.Namespace) -> dict:
    shapes = SHAPES[options.shapes]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_model(folder / "model", shapes)
        batch = options.processes
        rows = random_rows(options.steps * batch, options.capacity, shapes["vocab"])
        packed = make_shards(folder / "packed", rows, capacity=options.capacity, vocab_size=shapes["vocab"])
        flags = {"shards": packed, "model": folder / "model", "device": options.device, "steps": options.steps}
        flags |= {"batch-packs": batch, "lr": LEARNING_RATE, "init": True, "dtype": options.dtype}
        for extra in options.flags.split():
            name, is_valued, value = extra.partition("=")
            flags[name] = value if is_valued else True
        lines = train_ours(folder, "ours", options.processes, flags)[WARM_UP:]
    middle = {key: statistics.median(line[key] for line in lines) for key in ("tokens_per_second_per_device",)}
    return {
        "shapes": options.shapes,
        "capacity": options.capacity,
        "processes": options.processes,
        "dtype": str(compute_dtype(Model(dtype=options.dtype), options.device))[6:],
        "flags": options.flags,
        **middle,
        "flops_per_second_per_device": statistics.median(line["flops_per_second_per_device"] for line in lines),
        "mfu": None if lines[0]["mfu"] is None else statistics.median(line["mfu"] for line in lines),
        "peak_memory_bytes": lines[-1]["memory_bytes"],
        "data_stall_seconds": max(line["data_stall_seconds"] for line in lines),
        "losses": [line["loss"] for line in lines],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="Hugging Face folder (CPU comparison)")
    parser.add_argument("--shapes", choices=sorted(SHAPES), help="random weights of these shapes, without a peer")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="with --shapes")
    parser.add_argument(
        "--flags", default="", help="more flags of train/main.py, as 'compile recompute=full no-reshard' (--shapes)"
    )
    parser.add_argument("--capacity", type=int, default=4096)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--steps", type=int, help=f"default 3; with --shapes 12, the first {WARM_UP} not counted")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if (options.model is None) == (options.shapes is None):
        parser.error("give either --model (against TRL) or --shapes (by itself)")
    options.steps = options.steps or (12 if options.shapes else 3)
    least = (WARM_UP if options.shapes else 1) + 1
    if options.steps < least:
        parser.error(f"--steps must be at least {least}")
    result = against_trl(options) if options.model else by_itself(options)
    cuda = torch.cuda.get_device_name() if options.device == "cuda" else None
    result |= {"device": cuda or f"{os.cpu_count()} cores, {platform.machine()}", "torch": torch.__version__}
    result["command"] = " ".join(["python", "tools/bench_train.py", *sys.argv[1:]])
    print(json.dumps(result, indent=2, sort_keys=True))
    if options.json:
        known = json.loads(options.json.read_text(encoding="utf-8")) if options.json.exists() else {}
        known[f"{options.shapes or 'against TRL'}, {options.capacity} x {options.processes}"] = result
        options.json.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
