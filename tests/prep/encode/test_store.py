"""A document store as its readers see it."""

import numpy as np
import pytest
from click.testing import CliRunner
from encoding_runs import run, texts, write_jsonl

from prep.cli import main
from prep.encode.storage import FolderStorage


def test_an_output_inside_its_input_is_refused(tmp_path, byte_level):
    """What a run writes there, the run that resumes it would read."""
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in" / "a.jsonl", texts(3))
    for place in ("in/s", "in/deep/s", "in"):
        with pytest.raises(ValueError, match=r"lies inside the input .*/in, which would then hold it"):
            run(tmp_path / "in", tmp_path / place, byte_level)
    command = ["pack", tmp_path / "in", "--out", tmp_path / "in" / "p", "--tokenizer", byte_level, "--seq-len", "64"]
    assert "lies inside the input" in CliRunner().invoke(main, list(map(str, command))).output
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["a.jsonl"]
    assert len(run(tmp_path / "in", tmp_path / "in.store", byte_level)) == 3


@pytest.mark.parametrize(
    ("glob", "inside", "outside"),
    [
        ("in/**/*", "in/deep/s", "s"),
        ("in/**/*.jsonl", "in/s", "s"),
        ("in/*/*.jsonl", "in/s", "in/b/s"),
        ("in/?/a.jsonl", "in/s", "in/st"),
        ("in/*/*/*", "in/s", "in.s"),
    ],
)
def test_an_output_that_a_glob_of_the_input_leads_to_is_refused(tmp_path, byte_level, glob, inside, outside):
    (tmp_path / "in" / "b" / "c").mkdir(parents=True)
    for folder in ("in", "in/b", "in/b/c"):
        write_jsonl(tmp_path / folder / "a.jsonl", texts(3))
    with pytest.raises(ValueError, match=r"lies inside the input .*, which would then hold it; name another"):
        run(tmp_path / glob, tmp_path / inside, byte_level)
    assert not (tmp_path / inside).exists()
    assert len(run(tmp_path / glob, tmp_path / outside, byte_level)) >= 3


def test_bad_input_takes_away_nothing_of_others(tmp_path, byte_level):
    path = tmp_path / "a.jsonl"
    path.write_text("{\n")
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "thesis.tmp").write_text("precious")
    with pytest.raises(ValueError, match="already holds something"):
        run(path, tmp_path / "s", byte_level)
    assert (tmp_path / "s" / "thesis.tmp").read_text() == "precious"
    # What a kill leaves of the very first write is ours.
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "plan.json.tmp").write_text("{")
    write_jsonl(path, texts(3))
    assert len(run(path, tmp_path / "t", byte_level)) == 3


def test_a_unit_is_finished_by_its_bytes_and_not_by_their_number(tmp_path, byte_level):
    run(write_jsonl(tmp_path / "a.jsonl", texts(5)), tmp_path / "s", byte_level)
    storage = FolderStorage(tmp_path / "s")
    assert storage.finished_unit(0).rows == 5
    data = bytearray((tmp_path / "s" / "units" / "00000.arrow").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "s" / "units" / "00000.arrow").write_bytes(data)
    assert storage.finished_unit(0) is None


def test_a_store_is_read_only_views(tmp_path, byte_level):
    store = run(write_jsonl(tmp_path / "a.jsonl", texts(5)), tmp_path / "s", byte_level)
    ids, mask = store.document(3)
    assert not ids.flags.writeable
    assert not mask.flags.writeable
    assert ids.dtype == np.int32
    assert mask.dtype == np.uint8
    assert [len(store.document(i)[0]) for i in range(5)] == store.lengths.tolist()
    assert [int(store.document(i)[1].sum()) for i in range(5)] == store.target_tokens.tolist()
