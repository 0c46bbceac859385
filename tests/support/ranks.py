"""Run a function on several gloo ranks in one machine, as the tests of parallel code need it.

A forkserver imports torch once (importing it in each of 8 spawned processes takes 34 s, forking 0.9 s). Ranks meet
through a file. A rank that fails or hangs ends all of them, and its traceback becomes the test's.
"""

import importlib.util
import inspect
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PRELOAD = [
    "numpy",
    "torch",
    "torch.distributed",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.pipelining",
    "torch.distributed.tensor.parallel",
    "numba",
    "pyarrow",
    "pytest",
    "rich.progress",
    "safetensors",
    "yaml",
]
"""All that ranks import but the project itself: 0.8 s of each."""


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120, process_group: bool = True
) -> list[Any]:
    """Call `function(*args)` on ranks 0 … world_size−1 of a gloo process group; returns what each of them returned.

    Without `process_group` the processes only run beside each other, and the function may start a group of its own.

    `function` must stand at the top of its file (it is found by file and name in the child), `args` and results must
    pickle. Raises: AssertionError with the traceback of the first rank that failed, or after `timeout` seconds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    os.environ["OMP_NUM_THREADS"] = "1"  # before the forkserver starts: threads of ranks would fight for the cores
    where = (inspect.getsourcefile(function), function.__name__)
    with tempfile.TemporaryDirectory() as folder:
        pipes, ranks = [], []
        for rank in range(world_size):
            receive, send = context.Pipe(duplex=False)
            process = context.Process(
                target=_child,
                args=(where, rank, world_size, folder if process_group else None, timeout, send, args),
                daemon=True,
            )
            process.start()
            send.close()
            pipes.append(receive)
            ranks.append(process)
        try:
            return _collect(pipes, ranks, time.monotonic() + timeout)
        finally:
            for process in ranks:
                process.kill()
                process.join()


def _collect(pipes: list[Connection], ranks: list[Any], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    failed: list[str] = []
    while len(results) < len(ranks):
        missing = [rank for rank in range(len(ranks)) if rank not in results]
        ready = wait([pipes[rank] for rank in missing], timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            assert not failed, "\n".join(failed)
            raise AssertionError(f"ranks {missing} did not finish in time")
        for pipe in ready:
            rank = pipes.index(pipe)
            try:
                ok, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                ranks[rank].join(5)
                ok, value = False, f"died with exit code {ranks[rank].exitcode}"
            if not ok:
                failed.append(f"rank {rank}: {value}")
                # Peers fail with torn connections, perhaps sooner than the cause is seen: let all speak.
                deadline = min(deadline, time.monotonic() + 1)
            results[rank] = value
    assert not failed, "\n".join(failed)
    return [results[rank] for rank in range(len(ranks))]


def _child(
    where: tuple[str, str],
    rank: int,
    world_size: int,
    folder: str | None,
    timeout: float,
    send: Connection,
    args: tuple,
) -> None:
    import torch
    import torch.distributed as dist

    for path in (ROOT, ROOT / "tests" / "support"):
        if str(path) not in sys.path:
            sys.path.insert(0, str(path))
    torch.set_num_threads(1)
    try:
        if folder is not None:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder}/rendezvous",
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=timeout),
            )
        spec = importlib.util.spec_from_file_location("ranked_test", where[0])
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        # Plain pickle: multiprocessing's own would pass tensors through files that end with this process.
        send.send_bytes(pickle.dumps((True, getattr(module, where[1])(*args))))
        if folder is not None:
            dist.barrier()  # none leaves while another still talks to it
            dist.destroy_process_group()
    except BaseException:
        send.send_bytes(pickle.dumps((False, traceback.format_exc())))
