"""Experts shared out over threads give what one thread gives, and the same bits every time."""

import threading

import pytest
import torch

from train.model.config import MoeConfig
from train.model.experts import Experts
from train.model.rows import Rows
from train.model.side_by_side import _pool, side_by_side

EXPERTS, TOKENS, CHOICES = 12, 96, 3


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    _pool.cache_clear()  # threads are made anew
    yield
    torch.set_num_threads(before)


def mixture(*, bias, weighted):
    """(leaves, function of nothing: output and gradients of all leaves)."""
    options = {"expert_bias": True, "swiglu_limit": 1.5, "swiglu_alpha": 1.7} if bias else {}
    config = MoeConfig(num_experts=EXPERTS, top_k=CHOICES, intermediate_size=24, **options)
    torch.manual_seed(0)
    experts = Experts(16, config, "silu").double()
    for parameter in experts.parameters():
        parameter.data = torch.randn_like(parameter) / 3
    chosen = torch.rand(TOKENS, EXPERTS - 1).topk(CHOICES).indices  # the last expert is chosen by none
    chosen[7] = EXPERTS  # padding
    rows = Rows.sort(chosen, EXPERTS)
    x = torch.randn(TOKENS, 16, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(TOKENS, CHOICES, dtype=torch.float64).requires_grad_() if weighted else None
    direction = torch.randn(TOKENS, 16, dtype=torch.float64)
    leaves = [x, *experts.parameters(), *([weights] if weighted else [])]

    def both():
        out = experts(x, weights, rows)
        return out, *torch.autograd.grad((out * direction).sum(), leaves)

    return experts, (x, weights, rows), both


@pytest.mark.parametrize(("bias", "weighted"), [(False, True), (True, True), (True, False)])
def test_threads_change_neither_sums_nor_gradients(bias, weighted, three_threads):
    _, _, both = mixture(bias=bias, weighted=weighted)
    shared, again = both(), both()
    torch.set_num_threads(1)
    for value, repeated, alone in zip(shared, again, both(), strict=True):
        assert torch.equal(value, repeated)
        torch.testing.assert_close(value, alone, rtol=1e-12, atol=1e-12)


def who_ran(rows_E):
    return side_by_side(rows_E, lambda experts: (experts, threading.current_thread().name, torch.get_num_threads()))


def test_every_expert_runs_once_in_even_shares_of_one_thread_each(three_threads):
    shares = who_ran([9, 1, 5, 5, 0, 10, 3, 7, 2])
    assert sorted(e for experts, *_ in shares for e in experts) == list(range(9))
    assert all(experts == sorted(experts) for experts, *_ in shares)
    assert [sum([9, 1, 5, 5, 0, 10, 3, 7, 2][e] for e in experts) for experts, *_ in shares] == [14, 14, 14]
    assert all(name.startswith("experts") and threads == 1 for _, name, threads in shares)
    assert torch.get_num_threads() == 3
    seen = []
    other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert seen == [3], "threads that start later have all of torch's threads"


@pytest.mark.parametrize("rows_E", [[90, 1, 1, 1, 1, 1], [5, 5], [0, 0, 0, 0]])
def test_all_threads_work_on_one_expert_where_shares_were_uneven(rows_E, three_threads):
    [(experts, name, threads)] = who_ran(rows_E)
    assert (experts, name, threads) == (list(range(len(rows_E))), threading.current_thread().name, 3)


def test_evaluations_share_out_too(three_threads):
    experts, inputs, both = mixture(bias=False, weighted=True)
    expected = both()[0]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(experts(*inputs), expected)
