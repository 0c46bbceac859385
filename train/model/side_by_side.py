"""Experts side by side on a CPU: each thread takes whole experts, instead of all threads sharing every small product.

What an expert reads and makes then stays in the cache of one core, and no thread waits for another after every
operator. Which thread takes which expert depends on the rows alone, so a run that is repeated gives the same bits.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

Result = TypeVar("Result")
UNEVEN = 1.25  # the rows of the busiest thread over the mean from where all threads had better work on one expert


def side_by_side(rows_E: Sequence[int], run: Callable[[list[int]], Result]) -> list[Result]:
    """`run` for a share of the experts (their numbers, rising) on every thread of torch's; one result a share.

    `rows_E`: the rows of each expert. One share, in the calling thread, where threads could not be kept busy.
    """
    threads = torch.get_num_threads()
    shares: list[list[int]] = [[] for _ in range(threads)]
    load = [0] * threads
    for expert in sorted(range(len(rows_E)), key=lambda e: -rows_E[e]):
        least = load.index(min(load))
        shares[least].append(expert)
        load[least] += rows_E[expert]
    if threads == 1 or max(load) * threads >= UNEVEN * sum(load):
        return [run(list(range(len(rows_E))))]
    inference = torch.is_inference_mode_enabled()

    def run_alone(share: list[int]) -> Result:
        with torch.inference_mode(inference), torch.no_grad():
            return run(sorted(share))

    return list(_pool(threads).map(run_alone, shares))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads in which torch uses one thread."""
    started = threading.Barrier(threads)

    def alone() -> None:
        torch.get_num_threads()  # a thread's first look at the number sets it: not after this
        torch.set_num_threads(1)
        started.wait()

    pool = ThreadPoolExecutor(threads, "experts", initializer=alone)
    list(pool.map(lambda _: None, range(threads)))
    torch.set_num_threads(threads)  # what a thread sets is also what threads to come begin with
    return pool
