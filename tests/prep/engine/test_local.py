"""The pool of processes: order, failure, death."""

import os
import signal
import time

import pytest

from prep.engine.local import run_units


def double(unit):
    time.sleep(0.01 * (unit % 3))
    return unit * 2, os.getpid()


def fail_at_three(unit):
    if unit == 3:
        raise ValueError("unit 3 is bad")
    return unit


def break_at_three(unit):
    return [1, 2][unit]


def die_at_three(unit):
    if unit == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return unit


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_the_order_of_the_units(workers):
    done = []
    results = run_units(double, list(range(20)), workers, lambda unit, result: done.append((unit, result[0])))
    assert [value for value, _ in results] == [2 * unit for unit in range(20)]
    assert sorted(done) == [(unit, 2 * unit) for unit in range(20)]
    processes = {process for _, process in results}
    assert (processes == {os.getpid()}) if workers == 1 else (os.getpid() not in processes and len(processes) > 1)


def test_nothing_to_do():
    assert run_units(double, [], 4) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_a_unit_comes_back_as_it_is(workers):
    with pytest.raises(ValueError, match="unit 3 is bad"):
        run_units(fail_at_three, list(range(50)), workers)


def test_a_bug_comes_back_with_its_trace():
    with pytest.raises(RuntimeError, match=r"IndexError.*list index") as caught:
        run_units(break_at_three, list(range(50)), 2)
    assert "break_at_three" in str(caught.value)


def test_a_killed_worker_is_named():
    with pytest.raises(ChildProcessError, match="killed by SIGKILL"):
        run_units(die_at_three, list(range(50)), 2)


def test_an_error_of_the_callback_stops_the_work():
    def stop(unit, result):
        raise ValueError("enough")

    with pytest.raises(ValueError, match="enough"):
        run_units(double, list(range(50)), 2, stop)


def test_no_workers_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        run_units(double, [1], 0)
