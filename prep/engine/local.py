"""Run work units on the processes of one machine.

A unit is a pure function of its description, so who runs it and when makes no difference to what comes out. The workers
come from one process, the *nursery*, which sets up what is costly (a tokenizer takes seconds and hundreds of MB) and
then forks into them: it is paid for once, whatever their number, and they share its memory. The nursery itself is a
fresh process with no threads at work, so forking it is safe where forking the caller would not be.

A pipe per worker and nothing else: a worker whose parent dies reads the end of its pipe and goes, and a worker that
dies is noticed by the end of its own.
"""

import atexit
import ctypes
import gc
import multiprocessing
import multiprocessing.connection
import os
import pickle
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
    """`Workers.run` with nothing to set up."""
    if workers < 1:
        raise ValueError(f"workers is {workers}; at least one process is needed")
    with Workers(min(workers, len(units))) as pool:
        return pool.run(function, units, on_done)


class Workers:
    """Processes of this machine; a context manager. With at most one, all work is done in this process.

    Args:
        count: processes.
        setup: picklable; called once, in the nursery, while this process goes on. What it caches in its process all
            workers have.
        early: picklable; called first of all, before the modules that `setup` needs are imported. It begins what can
            go on beside that, and comes from a module that imports little.
    """

    def __init__(self, count: int, setup: Callable[[], Result] | None = None, early: Callable[[], None] | None = None):
        self._setup = setup
        self._early = early
        self._count = count
        self._process: multiprocessing.Process | None = None
        self._pipes: list[multiprocessing.connection.Connection] = []

    def __enter__(self) -> "Workers":
        if self._count > 1:
            # spawn: a forked copy of a process with threads (pyarrow, tokenizers) may hang.
            context = multiprocessing.get_context("spawn")
            self._control, control = context.Pipe()
            pairs = [context.Pipe() for _ in range(self._count)]
            theirs = [pair[1] for pair in pairs]
            setup = None if self._setup is None else pickle.dumps(self._setup)
            self._process = context.Process(
                target=_nursery, args=(control, theirs, self._early, setup, os.getpid()), daemon=True
            )
            # Ctrl-C goes to the whole group, but a process that still imports would answer with a trace: until it can
            # decide, the signal waits (a new process inherits that).
            before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
            self._process.start()
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            self._pipes = [pair[0] for pair in pairs]
            for pipe in (control, *theirs):
                pipe.close()
        elif self._early is not None:
            self._early()
        return self

    def __exit__(self, *exception) -> None:
        if self._process is None:
            return
        if exception[0] is not None:
            self._process.terminate()  # and its workers with it
        for pipe in (*self._pipes, self._control):
            pipe.close()
        self._process.join()

    def setup_result(self) -> Result:
        """What `setup` returned; waits for it.

        Raises:
            ValueError, OSError: as `setup` raised it.
        """
        if self._process is None:
            return self._setup()
        try:
            return _value(self._control.recv())
        except EOFError:
            self._process.join()
            raise ChildProcessError(_death(self._process.exitcode)) from None

    def run(
        self,
        function: Callable[[Unit], Result],
        units: Sequence[Unit],
        on_done: Callable[[Unit, Result], None] | None = None,
    ) -> list[Result]:
        """Apply `function` to every unit; returns the results in the order of the units. Once only.

        Args:
            function: picklable, like its arguments and results. What is costly to set up it caches in its process.
            units: descriptions of the work, started in this order.
            on_done: called in this process as each unit ends, in the order of ending.

        Raises:
            ValueError: as the function raised it (the first to arrive); other units are stopped.
            ChildProcessError: a worker was killed or ended.
            RuntimeError: a worker failed in another way, with the trace of the worker in the message.
        """
        if self._process is not None:
            return self._run(function, units, on_done)
        results = []
        for unit in units:
            results.append(function(unit))
            if on_done:
                on_done(unit, results[-1])
        return results

    def _run(self, function, units, on_done):
        results: list = [None] * len(units)
        todo = iter(range(len(units)))
        working: dict[multiprocessing.connection.Connection, int] = {}
        pipes = self._pipes[: len(units)]
        self._control.send((function, len(pipes)))
        for pipe in pipes:
            working[pipe] = next(todo)
            pipe.send(units[working[pipe]])
        while working:
            for pipe in multiprocessing.connection.wait(list(working)):
                index = working.pop(pipe)
                try:
                    value = _value(pipe.recv())
                except EOFError:
                    raise ChildProcessError(_death(self._exit_code(pipes.index(pipe)))) from None
                results[index] = value
                following = next(todo, None)
                if following is not None:
                    working[pipe] = following
                    pipe.send(units[following])
                if on_done:
                    on_done(units[index], value)
        return results

    def _exit_code(self, number: int) -> int | None:
        """How the worker of this number ended, as the nursery saw it."""
        try:
            while True:
                who, code = self._control.recv()
                if who == number:
                    return code
        except EOFError:  # the nursery went too
            self._process.join()
            return self._process.exitcode


def _value(answer: tuple) -> object:
    ok, value = answer
    if not ok:
        raise value
    return value


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


def _nursery(control, pipes, early, setup: bytes | None, parent: int) -> None:
    _die_with(parent)
    # Ctrl-C goes to the whole group: the parent alone decides and ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    children: dict[int, int] = {}

    def end(*_):
        # Each is waited for: it takes away the files that it is writing.
        for pid in list(children):
            os.kill(pid, signal.SIGTERM)
        for pid in list(children):
            os.waitpid(pid, 0)
        os._exit(0)  # at once: a thread that loads a tokenizer would be torn off, which the C library reports as fatal

    signal.signal(signal.SIGTERM, end)
    if early is not None:
        early()
    try:
        if setup is not None:
            control.send(_answer(_unpickled, setup))
        function, count = control.recv()
    except (EOFError, BrokenPipeError):
        os._exit(0)  # as above
    nursery = os.getpid()
    gc.freeze()  # what all share will never be garbage: collections need not look at it, which would copy its pages
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # no end between a fork and its entry in `children`
    for number in range(count):
        pid = os.fork()
        if pid == 0:
            try:
                for other in (*pipes[:number], *pipes[number + 1 :], control):
                    other.close()
                _serve(pipes[number], function, nursery)
            finally:
                os._exit(0)
        children[pid] = number
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    for pipe in pipes:
        pipe.close()
    while children:
        # Seen here, taken away only after it is out of the list: no process of another gets its number meanwhile.
        pid = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT).si_pid
        number = children.pop(pid)
        _, status = os.waitpid(pid, 0)
        try:
            control.send((number, os.waitstatus_to_exitcode(status)))
        except BrokenPipeError:
            continue
    # Freeing a vocabulary piece by piece takes half a second; the system takes all at once.
    atexit._run_exitfuncs()
    os._exit(0)


def _unpickled(setup: bytes) -> object:
    return pickle.loads(setup)()


def _serve(pipe, function, parent: int) -> None:
    _die_with(parent)
    # The word to end is an exception here, so that files that are being written are taken away.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    while True:
        try:
            unit = pipe.recv()
            pipe.send(_answer(function, unit))
        except (EOFError, BrokenPipeError):
            return


def _answer(function, *arguments) -> tuple[bool, object]:
    try:
        return True, function(*arguments)
    except (ValueError, OSError) as error:
        return False, _plain(error)
    except Exception:  # anything else is a bug: its trace must reach the user
        return False, RuntimeError(f"a work unit failed:\n{traceback.format_exc()}")


def _plain(error: Exception) -> Exception:
    """The error as one that surely survives pickling."""
    if isinstance(error, OSError):
        return OSError(error.errno, error.strerror, error.filename) if error.errno else OSError(str(error))
    return ValueError(str(error))
