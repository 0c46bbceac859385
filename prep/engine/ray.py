"""Run work units on a Ray cluster: the same units, the same results, in the same order.

Inputs, tokenizer and store must lie where every node sees them: on a shared file system, or behind addresses (`s3://…`).
A task that dies with its node is run again elsewhere; it costs its unit and nothing else.
"""

import socket
from collections.abc import Callable, Sequence
from typing import TypeVar

Unit = TypeVar("Unit")
Result = TypeVar("Result")

_RETRIES = 5
_SECONDS = 10  # that the head of a cluster has to answer
_AHEAD = 2  # units submitted per core: enough to keep it busy, few enough that an error stops the rest soon


def run_units(
    function: Callable[[Unit], Result],
    units: Sequence[Unit],
    on_done: Callable[[Unit, Result], None] | None = None,
    *,
    address: str | None = None,
) -> list[Result]:
    """As `prep.engine.local.run_units`, on the cluster at `address` (a new one on this machine without it).

    Raises:
        ValueError: as the function raised it; units not yet begun are not run. Or ray is not installed, or no cluster
            is at the address.
        ChildProcessError: a task died more often than it is tried again.
    """
    try:
        import ray  # an extra: not everyone has a cluster
    except ImportError:
        raise ValueError("engine ray needs the package ray; pip install ray or take engine local") from None
    started = not ray.is_initialized()
    if started:
        _knock(address)
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        return _run(ray, function, units, on_done)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        raise (cause if isinstance(cause, (ValueError, OSError)) else RuntimeError(str(error))) from None
    except ray.exceptions.RayError as error:
        raise ChildProcessError(f"a Ray task died {_RETRIES + 1} times ({error}); go on with --resume") from None
    finally:
        if started:
            ray.shutdown()


def _knock(address: str | None) -> None:
    """ValueError where nobody listens; Ray itself would try for minutes and then say little."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # a new cluster, or `auto`
    try:
        socket.create_connection((host, int(port)), _SECONDS).close()
    except OSError as error:
        raise ValueError(
            f"--ray-address {address}: no Ray cluster answers there ({error}); start one with ray start --head"
        ) from None


def _run(ray, function, units, on_done):
    task = ray.remote(max_retries=_RETRIES)(_call)
    shared = ray.put(function)
    results: list = [None] * len(units)
    todo = iter(range(len(units)))
    width = max(1, int(ray.cluster_resources().get("CPU", 1))) * _AHEAD
    running = {}
    while True:
        while len(running) < width and (index := next(todo, None)) is not None:
            running[task.remote(shared, units[index])] = index
        if not running:
            return results
        done, _ = ray.wait(list(running), num_returns=1)
        for reference in done:
            index = running.pop(reference)
            results[index] = ray.get(reference)
            if on_done:
                on_done(units[index], results[index])


def _call(function, unit):
    return function(unit)
