"""One step: ranks agree on what is not finite, skips are counted, gradients are reduced once, waiting is measured."""

import itertools
import math
import threading
import time

import pytest
import torch.distributed as dist
from tiny_models import write_tiny_model
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.distributed.tensor import DTensor
from whole_runs import read_metrics, run

import train.data
import train.main
import train.step
from ranks import run_ranks
from train.balance import routers
from train.checkpoint import read_mark, step_folder


def spoiled(argv):
    """A run in which rank 1's share of the loss is infinite in step 2, and a gradient of rank 0 in step 4; which steps
    were applied here, and what was said."""
    accumulate, step, calls, applied = train.step.accumulate_gradients, train.main.train_step, itertools.count(1), []

    def spoiling(model, *args, **options):
        share, number = accumulate(model, *args, **options), next(calls)
        if (number, dist.get_rank()) == (2, 1):
            return share + math.inf
        if (number, dist.get_rank()) == (4, 0):
            gradient = next(p.grad for p in model.parameters())
            (gradient.to_local() if isinstance(gradient, DTensor) else gradient)[0] = math.nan
        return share

    def noting(*args, **options):
        result = step(*args, **options)
        applied.append(result.applied)
        return result

    train.step.accumulate_gradients, train.main.train_step = spoiling, noting
    return applied, run(argv)


@pytest.mark.parametrize("layout", [{}, {"pp": 2}], ids=["dp_shard", "pp"])
def test_what_is_not_finite_on_one_rank_is_skipped_by_all_and_counted(layout, flags, tmp_path):
    (first, said), (second, _) = run_ranks(spoiled, 2, flags(on_nonfinite="skip", **layout))
    assert first == second == [True, False, True, False, True, True]
    lines = read_metrics(tmp_path / "out")
    assert [line["skipped_steps"] for line in lines] == [0, 1, 1, 2, 2, 2]
    assert [line["loss"] is None for line in lines] == [False, True, False, False, False, False]
    assert [line["grad_norm"] is None for line in lines] == [False, False, False, True, False, False]
    assert "2 of 6 steps were skipped: loss or gradient was not finite" in said
    assert "  skipped 2" in said, "in the line of a step, too"
    assert read_mark(step_folder(tmp_path / "out", 3)).position.skipped == 1, "a resumed run counts on"


def biases_of_steps(argv):
    """The correction bias of the first layer as each step began; the loss of step 2 is infinite."""
    accumulate, step, calls, biases = train.step.accumulate_gradients, train.main.train_step, itertools.count(1), []

    def noting(model, *args, **options):
        biases.append(routers(model)[0].correction_bias.tolist())
        return step(model, *args, **options)

    train.step.accumulate_gradients = lambda *args, **options: (
        accumulate(*args, **options) + (math.inf if next(calls) == 2 else 0.0)
    )
    train.main.train_step = noting
    run(argv)
    return biases


def test_a_skipped_step_moves_no_bias_and_leaves_no_load_behind(flags, tmp_path):
    model = write_tiny_model(tmp_path / "model", "deepseek_v3", vocab_size=320)
    argv = flags(model=model, on_nonfinite="skip", router_bias_rate=0.01, steps=4)
    ((first, second, third, fourth),) = run_ranks(biases_of_steps, 1, argv)
    assert first != second == third != fourth
    lines = read_metrics(tmp_path / "out")
    assert [line["skipped_steps"] for line in lines] == [0, 1, 1, 1]
    assert [line["dropped_tokens"] for line in lines] == [0] * 4


def reductions(*runs):
    """How often the gradients of an FSDP group were reduced in each of several runs."""
    real, counts = _fsdp_param_group.foreach_reduce, []

    def counting(*args, **options):
        counts[-1] += 1
        return real(*args, **options)

    _fsdp_param_group.foreach_reduce = counting
    for argv in runs:
        counts.append(0)
        run(argv)
    return counts


def test_gradients_are_reduced_once_a_step_or_after_each_row(flags, tmp_path):
    deferred, each = flags(steps=1), [*flags(steps=1, out=tmp_path / "each"), "--no-defer-sync"]
    for once, often in run_ranks(reductions, 2, deferred, each):
        assert once > 0
        assert often == 2 * once, "two rows a step on each of two ranks"


def slow_reader(argv):
    """A run in which rank 1 gets each row 20 ms after it asked for it."""
    asked = threading.Semaphore(0)
    take, close, fill = train.data.PackedLoader._take_run, train.data.PackedLoader.close, train.data.Run.fill

    def asking(loader):
        asked.release()
        take(loader)

    def closing(loader):
        asked.release(100)
        close(loader)

    def filling(*args):
        asked.acquire()
        time.sleep(0.02)
        fill(*args)

    if dist.get_rank() == 1:
        train.data.RUN_ROWS = 1
        train.data.PackedLoader._take_run, train.data.PackedLoader.close = asking, closing
        train.data.Run.fill = filling
    run(argv)


def test_the_wait_for_data_of_the_slowest_rank_is_measured(flags, tmp_path):
    run_ranks(slow_reader, 2, flags(steps=3))
    assert [line["data_stall_seconds"] >= 0.04 for line in read_metrics(tmp_path / "out")] == 3 * [True]
