"""The metrics file at a resume: nothing after the checkpoint stays, nothing before it is lost."""

import json

import pytest

from train.metrics import METRICS_NAME, Metrics, cut_back


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


START = {"step": 0, "eval_loss": 3.5}
ONE, TWO, EVAL, THREE = {"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.5}, {"step": 2, "eval_loss": 2.6}, {"step": 3}


@pytest.mark.parametrize(
    ("step", "left"), [(0, []), (1, [ONE]), (2, [ONE, TWO, EVAL]), (3, [ONE, TWO, EVAL, THREE]), (9, None)]
)
def test_steps_after_the_checkpoint_are_cut_off_with_their_evaluations(tmp_path, step, left):
    path = tmp_path / METRICS_NAME
    whole = lines(ONE, TWO, EVAL, THREE)
    path.write_text(whole)
    assert cut_back(path, step) == (THREE if left is None else (left or [{}])[-1])
    assert path.read_text() == (whole if left is None else lines(*left))
    assert [file.name for file in tmp_path.iterdir()] == [METRICS_NAME]


@pytest.mark.parametrize("torn", ['{"step": 2, "lo', '{"step": 2}', "{}\n", "null\n", '{"step": 2\n', b"\xff\0\n"])
def test_a_line_that_a_kill_left_unfinished_goes_too(tmp_path, torn):
    path = tmp_path / METRICS_NAME
    path.write_bytes(lines(ONE).encode() + (torn if isinstance(torn, bytes) else torn.encode()))
    cut_back(path, 5)
    assert path.read_text() == lines(ONE)


def test_a_resumed_run_writes_behind_its_checkpoint_and_a_new_one_from_the_start(tmp_path):
    path = tmp_path / METRICS_NAME
    path.write_text(lines(START, ONE, TWO, EVAL, THREE))
    for first, left in ((2, lines(START, ONE, TWO, EVAL)), (0, "")):
        Metrics(tmp_path, 9, first, enabled=False)
        before = path.read_text()
        Metrics(tmp_path, 9, first, enabled=True).close()
        assert before != left, "other ranks leave the file alone"
        assert path.read_text() == left
