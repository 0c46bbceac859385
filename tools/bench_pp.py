"""The bubble of every pipeline schedule, measured, against its formula.

    python tools/bench_pp.py --pp 4 --rows 8 --json tools/baselines/pp.json

Real `Pipeline`, real schedules, real sends over gloo; only the computation is simulated: a block sleeps in its forward,
in the gradient of its input, and in the gradient of its weight, equally long in every stage, so the machine needs no
cores for it. The first stage has no input to send a gradient for: torch runs its whole backward where the gradient of
the weights is due, and so it does here.

The formulas are for p ranks, M rows, v stages a rank and the times F, I, W of a row in a *rank* (all its stages):

gpipe, 1f1b       M·(F+I+W) + (p−1)·(F+I+W)               Huang et al., arXiv 1811.06965; Narayanan et al., 2104.04473
interleaved       M·(F+I+W) + (p−1)·(F+I+W)/v             Narayanan et al., 2104.04473
interleaved-zb    the longest path through its actions, each with its time (Qi et al., 2401.10241, gives bounds)
zbv, dualpipev    the same; with F = I = W all that is left is the time until the last rank can begin, or nearly so

What a step takes without any sleep ("host": autograd, the schedule's own Python, sends over gloo, four processes on the
machine's cores) is measured, too, and stands beside; it is no part of the formula. A step of a split backward has many
actions (48 a rank with two stages and 8 rows, each with about a millisecond of the host) and waits little (a bubble
of 6 %, of which a tenth is 6 thousandths of the step), so its sleeps must be long: in 0.4 s the host's share alone is
that tenth. Exits with 1 when a bubble (as a part of the step) is more than 10 % away from the formula's.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import Tensor  # noqa: E402

from train.attention.interface import Segments  # noqa: E402
from train.config import Config, Data, Layout  # noqa: E402
from train.mesh import build_mesh  # noqa: E402
from train.model.config import LayerConfig, ModelConfig, Rope  # noqa: E402
from train.model.decoder import Decoder  # noqa: E402
from train.parallel.pipeline import Pipeline  # noqa: E402
from train.parallel.pp import SCHEDULES, cut_stages  # noqa: E402
from train.row import MicroBatch  # noqa: E402

HIDDEN, VOCABULARY, TOKENS = 8, 16, 4
TOLERANCE = 0.1


class Sleep(torch.autograd.Function):
    """`x` as it is, after a sleep in forward and another in backward (seconds). `slept` adds up how long they really
    were: a busy machine wakes late, and what it adds is work and no bubble. `off` is for steps without any sleep."""

    slept, off = 0.0, False

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: float, backward: float) -> Tensor:
        ctx.seconds = backward
        Sleep.of(forward)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        Sleep.of(ctx.seconds)
        return grad, None, None

    @staticmethod
    def of(seconds: float) -> None:
        if not Sleep.off:
            began = time.perf_counter()
            time.sleep(seconds)
            Sleep.slept += time.perf_counter() - began


class SleepingBlock(torch.nn.Module):
    """A block of one weight: F and I sleep on the way of the hidden states, W on the way of the weight."""

    rope = None

    def __init__(self, seconds: float):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1, HIDDEN))
        self.seconds = seconds

    def forward(self, x_TD: Tensor, rope: None, segments: Segments) -> Tensor:
        return Sleep.apply(x_TD, self.seconds, self.seconds) * Sleep.apply(self.weight, 0.0, self.seconds)


def measure_rank(
    rank: int, size: int, folder: str, name: str, rows: int, seconds: float, repeats: int, out: Any
) -> None:
    """From rank 0, medians of `repeats`: the seconds of a step of one schedule, those that a rank worked in it, and
    those of a step without sleeps; and the plan of the schedule."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/{name}", rank=rank, world_size=size, timeout=timedelta(seconds=120)
    )
    torch.set_num_threads(1)
    per_rank = SCHEDULES[name].stages or 2
    layout = Layout(device="cpu", pp=size, pp_schedule=name, pp_split=",".join(["1"] * (size * per_rank)))
    config = Config(layout=layout, data=Data(batch_packs=rows))
    mesh = build_mesh(layout, torch.device("cpu"))
    layers = (LayerConfig(window=None, rope=Rope(10_000.0, HIDDEN)),) * (size * per_rank)
    model = Decoder(
        ModelConfig("llama", VOCABULARY, HIDDEN, 8, 1, 1, HIDDEN, layers, 64, 1e-5, 1.0, tied_embeddings=False)
    )
    for parameter in model.parameters():
        torch.nn.init.ones_(parameter)
    for index in range(len(layers)):
        model.layers[index] = SleepingBlock(seconds / per_rank)
    pipeline = Pipeline(cut_stages(model, mesh, config), mesh, config)
    ids = torch.zeros(TOKENS, dtype=torch.int32)
    row = MicroBatch(ids, ids.long(), ids, Segments.of([TOKENS]))
    times = []
    for repeat in range(-3, repeats):  # of those below 0 the first makes the schedule and the connections
        Sleep.off = repeat < 0
        dist.barrier()
        Sleep.slept, began = 0.0, time.perf_counter()
        pipeline.accumulate_gradients([row] * rows, rows * TOKENS)
        dist.barrier()
        seconds_of_step = time.perf_counter() - began
        slept = torch.tensor(Sleep.slept)
        dist.all_reduce(slept)
        times.append((seconds_of_step, slept.item() / size))
    if rank == 0:
        host = min(seconds for seconds, _ in times[1:3])
        out.put((*map(statistics.median, zip(*times[3:], strict=True)), host, actions_of(pipeline)))
    dist.barrier()
    dist.destroy_process_group()


Action = tuple[int, str, int]  # stage, F | I | W | B (I and W in one), row


def actions_of(pipeline: Pipeline) -> dict[int, list[list[Action]]]:
    """What each rank does in order, as torch planned it; the actions of a group send only when all are done."""
    planned = {}
    for rank, actions in pipeline._schedule.pipeline_order.items():
        groups = [action.sub_actions or (action,) for action in actions if action is not None]
        named = [[(a.stage_index, a.computation_type.value, a.microbatch_index) for a in group] for group in groups]
        planned[rank] = [group for group in named if group[0][1] in "FIWB"]
    return planned


def longest_path(planned: dict[int, list[list[Action]]], stages: int, seconds: float) -> float:
    """Seconds of a step when each action begins as soon as its rank is free and its input is there; `seconds` are those
    of F, of I and of W of one stage. Written without torch's own simulation."""
    holder = {stage: rank for rank, groups in planned.items() for group in groups for stage, _, _ in group}
    sent: dict[Action, float] = {}  # when other ranks have it
    ended: dict[Action, float] = {}  # when its own rank has it
    clock = dict.fromkeys(planned, 0.0)
    left = {rank: list(groups) for rank, groups in planned.items()}

    def needs(stage: int, kind: str, row: int) -> list[Action]:
        if kind == "F":
            return [(stage - 1, "F", row)] * (stage > 0)
        return [(stage, "F", row)] + [(stage + 1, "I", row)] * (kind in "IB" and stage < stages - 1)

    while any(left.values()):
        progress = False
        for rank, groups in left.items():
            while groups:
                # What a group makes for itself it need not wait for.
                made = {(stage, "I" if kind == "B" else kind, row) for stage, kind, row in groups[0]}
                wanted = {need for action in groups[0] for need in needs(*action)} - made
                known = [ended if holder[need[0]] == rank else sent for need in wanted]
                if any(need not in where for need, where in zip(wanted, known, strict=True)):
                    break
                clock[rank] = max([clock[rank], *(where[need] for need, where in zip(wanted, known, strict=True))])
                for stage, kind, row in groups.pop(0):
                    # The first stage's whole backward runs where its W stands.
                    clock[rank] += {"F": 1, "I": 1 if stage else 0, "W": 1 if stage else 2, "B": 2}[kind] * seconds
                    ended[stage, "I" if kind == "B" else kind, row] = clock[rank]
                sent |= dict.fromkeys(made, clock[rank])
                progress = True
        assert progress, "the plan waits for itself"
    return max(clock.values())


def measure(name: str, size: int, rows: int, seconds: float, repeats: int) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    out = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (size, folder, name, rows, seconds, repeats, out)
        ranks = [context.Process(target=measure_rank, args=(rank, *arguments)) for rank in range(size)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            sys.exit(f"{name}: a rank failed")
    measured, worked, host, planned = out.get()
    per_rank = SCHEDULES[name].stages or 2
    work = rows * 3 * seconds
    wait = {"gpipe": 3 * seconds, "1f1b": 3 * seconds, "interleaved": 3 * seconds / per_rank}.get(name)
    if wait is None:
        formula = longest_path(planned, size * per_rank, seconds / per_rank)
    else:
        formula = work + (size - 1) * wait
    return {
        "bubble_measured": 1 - worked / measured,
        "bubble_formula": 1 - work / formula,
        "action_seconds": seconds,
        "step_seconds": measured,
        "work_seconds": worked,
        "formula_seconds": formula,
        "host_seconds": host,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pp", type=int, default=4)
    parser.add_argument("--rows", type=int, default=8, help="rows (microbatches) a step")
    parser.add_argument("--seconds", type=float, default=0.8, help="of F, of I and of W of a row in a rank")
    parser.add_argument("--schedules", nargs="+", default=list(SCHEDULES), choices=list(SCHEDULES))
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the result here too")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    report = {"pp": options.pp, "rows": options.rows, "schedules": {}}
    print(f"{'schedule':<16}{'step s':>8}{'formula s':>11}{'host s':>8}{'bubble':>9}{'formula':>9}")
    far = []
    for name in options.schedules:
        r = measure(name, options.pp, options.rows, options.seconds, options.repeats)
        report["schedules"][name] = {key: round(value, 4) for key, value in r.items()}
        print(
            f"{name:<16}{r['step_seconds']:>8.3f}{r['formula_seconds']:>11.3f}{r['host_seconds']:>8.3f}"
            f"{r['bubble_measured']:>9.2%}{r['bubble_formula']:>9.2%}",
            flush=True,
        )
        if abs(r["bubble_measured"] - r["bubble_formula"]) > TOLERANCE * r["bubble_formula"]:
            far.append(name)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    if far:
        sys.exit(f"more than 10 % from the formula: {', '.join(far)}")


if __name__ == "__main__":
    main()
