"""The table of supported combinations: it refuses what it says, and the README shows it."""

from pathlib import Path

import pytest

from train.combinations import COMBINATIONS, as_arguments, matrix
from train.config import flatten
from train.flags import parse

NEEDED = ["--shards", "s", "--model", "m", "--out", "o"]
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("row", COMBINATIONS, ids=lambda row: row.name)
def test_the_table_refuses_and_allows_what_it_says(row):
    argv = [*NEEDED, *as_arguments(row.example)]
    if row.refused is None:
        assert flatten(parse(argv)).items() >= row.example.items()
        assert (ROOT / row.note).is_file(), "a supported row names the test that proves it"
    else:
        with pytest.raises(ValueError, match=r".") as error:
            parse(argv)
        assert str(error.value) == row.note.format(**row.example)
    assert row.name in matrix()


def test_the_readme_shows_the_table():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = text.split("<!-- matrix -->\n")[1].split("\n<!-- /matrix -->")[0]
    assert shown == matrix(), "paste what `python -c 'from train.combinations import matrix; print(matrix())'` prints"
