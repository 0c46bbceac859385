"""Run work units on the processes of one machine.

A unit is a pure function of its description, so who runs it and when makes no difference to what comes out. The pool
is a pipe per worker and nothing else: a worker whose parent dies reads the end of its pipe and goes, and a worker that
dies is noticed by the end of its own.
"""

import ctypes
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TypeVar

Unit = TypeVar("Unit")
Result = TypeVar("Result")


def run_units(
    function: Callable[[Unit], Result],
    units: Sequence[Unit],
    workers: int,
    on_done: Callable[[Unit, Result], None] | None = None,
) -> list[Result]:
    """Apply `function` to every unit; returns the results in the order of the units.

    Args:
        function: picklable, like its arguments and results. What is costly to set up it caches in its process.
        units: descriptions of the work, started in this order.
        workers: number of processes; with 1 (or a single unit) the work runs in this process.
        on_done: called in this process as each unit ends, in the order of ending.

    Raises:
        ValueError: as the function raised it (the first to arrive); other units are stopped.
        ChildProcessError: a worker was killed or ended.
        RuntimeError: a worker failed in another way, with the trace of the worker in the message.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}; at least one process is needed")
    workers = min(workers, len(units))
    if workers <= 1:
        results = []
        for unit in units:
            results.append(function(unit))
            if on_done:
                on_done(unit, results[-1])
        return results
    return _run_pool(function, units, workers, on_done)


def _run_pool(function, units, workers, on_done):
    # spawn: a forked copy of a process with threads (pyarrow, tokenizers) may hang.
    context = multiprocessing.get_context("spawn")
    results: list = [None] * len(units)
    todo = iter(range(len(units)))
    pipes: dict[multiprocessing.connection.Connection, multiprocessing.Process] = {}
    working: dict[multiprocessing.connection.Connection, int] = {}
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, function, os.getpid()), daemon=True)
            process.start()
            theirs.close()
            pipes[ours] = process
            working[ours] = next(todo)
            ours.send((working[ours], units[working[ours]]))
        while working:
            for pipe in multiprocessing.connection.wait(list(working)):
                index = working.pop(pipe)
                try:
                    ok, value = pipe.recv()
                except EOFError:
                    pipes[pipe].join()
                    raise ChildProcessError(_death(pipes[pipe].exitcode)) from None
                if not ok:
                    raise value
                results[index] = value
                following = next(todo, None)
                if following is not None:
                    working[pipe] = following
                    pipe.send((following, units[following]))
                if on_done:
                    on_done(units[index], value)
    finally:
        for pipe, process in pipes.items():
            if pipe in working:
                process.terminate()
            pipe.close()
        for process in pipes.values():
            process.join()
    return results


def _death(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        cause = f"was killed by {signal.Signals(-exitcode).name}"
        if -exitcode == signal.SIGKILL:
            cause += " (the machine may have run out of memory: use fewer workers)"
    else:
        cause = f"ended with exit code {exitcode}"
    return f"a worker process {cause}; what is finished is kept, run again with --resume to go on"


_PR_SET_PDEATHSIG = 1  # from linux/prctl.h


def _die_with(parent: int) -> None:
    """End this process as soon as its parent is killed: a run that resumes must be alone with the files."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def _serve(pipe, function, parent: int) -> None:
    _die_with(parent)
    # Ctrl-C goes to the whole group: the parent alone decides and ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The parent's word to end is an exception here, so that files that are being written are taken away.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    while True:
        try:
            _, unit = pipe.recv()
        except EOFError:
            return
        try:
            answer = (True, function(unit))
        except (ValueError, OSError) as error:
            answer = (False, _plain(error))
        except Exception:  # anything else is a bug: its trace must reach the user
            answer = (False, RuntimeError(f"a work unit failed:\n{traceback.format_exc()}"))
        try:
            pipe.send(answer)
        except BrokenPipeError:
            return


def _plain(error: Exception) -> Exception:
    """The error as one that surely survives pickling."""
    if isinstance(error, OSError):
        return OSError(error.errno, error.strerror, error.filename) if error.errno else OSError(str(error))
    return ValueError(str(error))
