"""What a run says when it ends over an error."""

import torch

from train.ending import fail


def test_a_full_gpu_is_a_sentence_with_the_ways_out(capsys):
    said = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has 79.11 GiB.\nSee documentation."
    assert fail(torch.OutOfMemoryError(said)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train: error: CUDA out of memory. Tried to allocate 20.00 GiB.")
    assert line.endswith("; prep plan --model says beforehand what fits")


def test_a_defect_shows_where(capsys):
    code = 0
    try:
        raise KeyError("layers")
    except KeyError as error:
        code = fail(error)
    assert code == 1
    assert "test_ending.py" in capsys.readouterr().err
