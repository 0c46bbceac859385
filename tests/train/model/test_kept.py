"""Memory that is handed out again: never while anybody still reads it, and no more of it than was said."""

import pytest
import torch
from torch import nn

from train.model.config import MoeConfig
from train.model.experts import Experts
from train.model.kept import ALIGNMENT, Kept
from train.model.rows import Rows

LIKE = torch.empty(0)


def test_memory_is_handed_out_again_when_no_tensor_stands_on_it():
    kept = Kept(2)
    first, second = (kept.empty(LIKE, (3, 5)).fill_(value) for value in (1.0, 2.0))
    where = first.data_ptr()
    row = first[1]
    del first
    assert kept.empty(LIKE, (3, 5)).data_ptr() not in (where, second.data_ptr()), "a view still reads it"
    assert row.tolist() == [1.0] * 5
    del row
    assert kept.empty(LIKE, (3, 5)).data_ptr() == where
    assert second.unique().tolist() == [2.0]


def test_no_more_is_kept_than_was_said():
    kept = Kept(2)
    at_once = [kept.empty(LIKE, (size,)).fill_(size) for size in (10, 20, 30, 40)]
    assert [tensor.unique().tolist() for tensor in at_once] == [[10], [20], [30], [40]]
    assert sorted(buffer.nbytes for buffer, _ in kept._buffers) == [40, 80]
    del at_once
    large = kept.empty(LIKE, (50,))  # takes the place of one that is free and too small
    assert sorted(buffer.nbytes for buffer, _ in kept._buffers) in ([40, 200], [80, 200])
    del large
    small = kept.empty(LIKE, (5,))
    assert small.untyped_storage().nbytes() == 20
    assert max(buffer.nbytes for buffer, _ in kept._buffers) == 200, "the smallest that fits is taken"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_kept_memory_has_the_type_and_the_place_that_torch_would_give_it(dtype):
    tensor = Kept(1).empty(torch.empty(0, dtype=dtype), (2, 3, 7))
    assert (tensor.dtype, tensor.shape, tensor.is_contiguous()) == (dtype, (2, 3, 7), True)
    assert tensor.data_ptr() % ALIGNMENT == 0
    assert Kept(1).empty(LIKE, (0, 4)).shape == (0, 4)
    assert Kept(1).empty(torch.empty(0, device="meta"), (2, 3)).device.type == "meta"


def test_gradients_that_are_still_read_stay_as_they_are():
    torch.manual_seed(0)
    experts = Experts(16, MoeConfig(num_experts=4, top_k=2, intermediate_size=24), "silu")
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    rows = Rows.sort(torch.tensor([(0, 2), (3, 1), (2, 0), (1, 3)] * 5), 4)

    def gradients(x):
        return torch.autograd.grad(experts(x, None, rows).sum(), list(experts.parameters()))

    inputs = [torch.randn(20, 16) for _ in range(4)]
    held = [gradients(x) for x in inputs]
    copies = [[gradient.clone() for gradient in of_x] for of_x in held]
    for x, of_x, copied in zip(inputs, held, copies, strict=True):
        for again, gradient, copy in zip(gradients(x), of_x, copied, strict=True):
            assert torch.equal(gradient, copy)
            assert torch.equal(again, copy)
    experts(inputs[0], None, rows).sum().backward()
    experts(inputs[1], None, rows).sum().backward()
    for parameter, *of_x in zip(experts.parameters(), *copies[:2], strict=True):
        torch.testing.assert_close(parameter.grad, sum(of_x))
