"""In which types a run computes and reduces."""

import pytest
import torch

from train.config import Model
from train.precision import cast_dtypes, compute_dtype

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("dtype", "device", "expected"),
    [
        ("auto", "cuda", BF16),
        ("auto", "cpu", FP32),
        ("float32", "cuda", FP32),
        ("bfloat16", "cpu", BF16),
    ],
)
def test_auto_computes_in_bfloat16_where_there_is_a_gpu(dtype, device, expected):
    assert compute_dtype(Model(dtype=dtype), device) == expected


@pytest.mark.parametrize(
    ("dtype", "reduce_dtype", "expected"),
    [
        ("float32", "float32", (None, None)),
        ("float32", "bfloat16", (None, BF16)),
        ("bfloat16", "float32", (BF16, FP32)),
        ("bfloat16", "bfloat16", (BF16, BF16)),
    ],
)
def test_what_is_cast_and_in_what_gradients_are_summed(dtype, reduce_dtype, expected):
    assert cast_dtypes(Model(dtype=dtype, reduce_dtype=reduce_dtype), "cpu") == expected
