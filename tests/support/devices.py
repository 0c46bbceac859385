"""Tests that run on every device of the machine: the same code on CPU and, where there is one, on a GPU."""

import pytest
import torch

ON_CUDA = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT TESTED: no CUDA device"))
DEVICES = ("cpu", pytest.param("cuda", marks=ON_CUDA))
