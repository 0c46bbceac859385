"""The harness itself: results by rank, and a failure anywhere ends everything with its reason."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from ranks import run_ranks


def add_ranks(offset):
    value = torch.tensor([dist.get_rank() + offset])
    dist.all_reduce(value)
    return dist.get_rank(), value.item()


def fail_on_rank_1():
    if dist.get_rank() == 1:
        raise KeyError("rank one is broken")
    dist.barrier()


def die_on_rank_0():
    if dist.get_rank() == 0:
        os._exit(7)
    dist.barrier()


def hang():
    time.sleep(60)


def test_results_come_back_in_the_order_of_ranks():
    assert run_ranks(add_ranks, 3, 10) == [(0, 33), (1, 33), (2, 33)]


def test_the_traceback_of_a_failing_rank_becomes_the_tests():
    with pytest.raises(AssertionError, match="rank one is broken"):
        run_ranks(fail_on_rank_1, 2)


def test_a_dead_rank_is_named_with_its_exit_code():
    with pytest.raises(AssertionError, match="rank 0: died with exit code 7"):
        run_ranks(die_on_rank_0, 2)


def test_a_hanging_rank_ends_after_the_timeout():
    began = time.monotonic()
    with pytest.raises(AssertionError, match="did not finish"):
        run_ranks(hang, 2, timeout=4)
    assert time.monotonic() - began < 30
