"""Memory and time of loading a sharded model, both ways of `--load` and the usual one.

    python tools/bench_load.py --ranks 4 --json bench_load.json

Writes a random Llama of at least 1 GB (float32) in several safetensors files, then every rank builds it on the meta
device, parallelizes it as the trainer does, allocates and loads. Memory is anonymous memory (`RssAnon`, the files'
pages are not in it), sampled every 2 ms, above what the rank had before allocating. The bound is the rank's shard plus
one tensor. `whole` is the usual way, each rank reading every file whole and keeping its part. The files lie in the page
cache, so the seconds are those of copying and sending, not of a disk.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch.distributed.tensor import distribute_tensor  # noqa: E402

from train import hf  # noqa: E402
from train.config import Config, Layout  # noqa: E402
from train.mesh import build_mesh  # noqa: E402
from train.model.decoder import Decoder  # noqa: E402
from train.model.families import model_config  # noqa: E402
from train.model.sources import weight_sources  # noqa: E402
from train.parallel.apply import parallelize  # noqa: E402

MIB = 1 << 20
METHODS = ("direct", "broadcast", "whole")
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}


def write_model(folder: Path) -> int:
    """A random model in one file per two layers or so; returns its bytes. One file's tensors are held at a time."""
    config = model_config(CONFIG)
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in Decoder(config).named_parameters()}
    groups: dict[str, dict[str, tuple[int, ...]]] = {}
    for ours, source in weight_sources(config).items():
        group = ours.split(".")[1] if ours.startswith("layers.") else "rest"
        groups.setdefault(f"model-{group}.safetensors", {})[source.name] = shapes[ours]
    where, total = {}, 0
    for file, tensors in groups.items():
        values = {name: torch.randn(shape) for name, shape in tensors.items()}
        save_file(values, folder / file)
        where |= dict.fromkeys(tensors, file)
        total += sum(value.nbytes for value in values.values())
    (folder / hf.INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return total


class AnonymousMemory:
    """Highest `RssAnon` of this process inside the `with` block, above its value at the start, in bytes."""

    def __enter__(self) -> "AnonymousMemory":
        self.start = self.highest = _rss_anon()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        self._done.set()
        self._thread.join()
        self.peak = max(self.highest, _rss_anon()) - self.start

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.highest = max(self.highest, _rss_anon())


def _rss_anon() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise OSError("This system does not report RssAnon: run the benchmark on Linux.")


def load_whole(model: Decoder, folder: Path) -> None:
    """Every rank reads each file whole, as `load_state_dict` of a full state would."""
    sources = weight_sources(model.config)
    stored = {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
    for name, parameter in model.named_parameters():
        full = stored[sources[name].name].clone()
        part = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.to_local().detach().copy_(part.to_local())


def run_rank(rank: int, ranks: int, tp: int, folder: str, method: str, results: multiprocessing.Queue) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{method}", rank=rank, world_size=ranks)
    with torch.device("meta"):
        model = Decoder(hf.read_config(Path(folder)))
    config = Config(layout=Layout(device="cpu", tp=tp))
    model = parallelize(model, build_mesh(config.layout, torch.device("cpu")), config)
    dist.barrier()
    with AnonymousMemory() as memory:
        begin = time.perf_counter()
        model.to_empty(device="cpu")
        if method == "whole":
            load_whole(model, Path(folder))
        else:
            hf.load_weights(model, Path(folder), method)
        seconds = time.perf_counter() - begin
    parameters = list(model.parameters())
    shard = sum(p.to_local().nbytes for p in parameters)
    largest = max(p.numel() * p.element_size() for p in parameters)
    results.put({"peak": memory.peak, "shard": shard, "largest_tensor": largest, "seconds": seconds})
    dist.barrier()
    dist.destroy_process_group()


def measure(folder: Path, ranks: int, tp: int, method: str) -> dict[str, float]:
    """The rank with the highest peak, in MiB, and the slowest one's seconds."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [
        context.Process(target=run_rank, args=(rank, ranks, tp, str(folder), method, results)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    facts = [results.get(timeout=600) for _ in processes]
    for process in processes:
        process.join()
    worst = max(facts, key=lambda fact: fact["peak"] - fact["shard"])
    return {
        "peak_mib": worst["peak"] / MIB,
        "shard_mib": worst["shard"] / MIB,
        "largest_tensor_mib": worst["largest_tensor"] / MIB,
        "within_bound": worst["peak"] <= worst["shard"] + worst["largest_tensor"],
        "seconds": max(fact["seconds"] for fact in facts),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--tp", type=int, default=1, help="of the ranks, how many split every layer")
    parser.add_argument("--json", type=Path, help="write the result here too")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as name:
        size = write_model(Path(name))
        report = {"model_mib": size / MIB, "ranks": options.ranks, "tp": options.tp}
        for method in METHODS:
            report[method] = measure(Path(name), options.ranks, options.tp, method)
    print(json.dumps(report, indent=2))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    for method in METHODS[:2]:
        if not report[method]["within_bound"]:
            sys.exit(f"--load {method} needed more than the shard and one tensor.")


if __name__ == "__main__":
    main()
