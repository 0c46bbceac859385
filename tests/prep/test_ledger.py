"""The ledger's sums."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prep.ledger import Ledger

COUNT = st.tuples(st.integers(0, 50), st.integers(0, 5000))


def filled():
    ledger = Ledger()
    ledger.read("a", 10, 100)
    ledger.keep("a", 7, 70)
    ledger.drop("a", "empty", 3, 20)
    ledger.truncate("a", "overlong", 10)
    return ledger


def test_sums_agree_or_the_source_is_named():
    ledger = filled()
    ledger.check()
    ledger.keep("a", 1, 0)
    with pytest.raises(ValueError, match="source a does not agree: 10 documents came in, 11"):
        ledger.check()
    ledger = filled()
    ledger.truncate("a", "overlong", 1)
    with pytest.raises(ValueError, match="100 tokens came in, 101"):
        ledger.check()


def test_a_later_stage_moves_what_was_kept():
    ledger = filled()
    ledger.drop_kept("a", "overlong", 2, 40)
    ledger.truncate_kept("a", "overlong", 5)
    ledger.check()
    assert ledger.total()["kept"] == {"documents": 5, "tokens": 25}
    ledger.repeat("a", 4, 16)
    ledger.check()
    assert ledger.total()["kept"] == {"documents": 9, "tokens": 41}
    assert ledger.total()["repeated"] == {"documents": 4, "tokens": 16}


def test_json_goes_there_and_back():
    ledger = filled()
    ledger.note("a", "seen", 3)
    ledger.open("b")
    copy = Ledger.from_json(ledger.to_json())
    assert copy == ledger
    assert copy.sources == ("a", "b")
    copy.read("a", 1, 1)
    assert copy != ledger
    assert ledger.total()["read"]["documents"] == 10


@given(st.lists(st.tuples(st.sampled_from("ab"), COUNT, st.sampled_from(["x", "y"]), st.booleans()), max_size=12))
def test_merging_is_adding_in_any_order(entries):
    whole, parts = Ledger(), []
    for source, (documents, tokens), reason, kept in entries:
        part = Ledger()
        for ledger in (whole, part):
            ledger.read(source, documents, tokens)
            if kept:
                ledger.keep(source, documents, tokens)
            else:
                ledger.drop(source, reason, documents, tokens)
            ledger.note(source, reason, documents)
        parts.append(part)
    for order in (parts, parts[::-1]):
        merged = Ledger()
        for part in order:
            merged.merge(part)
        merged.check()
        assert merged == whole
