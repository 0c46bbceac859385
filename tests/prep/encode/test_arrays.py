"""JSON arrays: every element arrives whole wherever the blocks end, and nothing beside them is passed over."""

import io
import json

import pytest
from encoding_runs import documents, run, write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from prep.encode import arrays
from prep.encode.arrays import array_elements

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


class Slow(io.BytesIO):
    """A file that gives no more than a few bytes at a time, as a decompressor may."""

    def __init__(self, data, most):
        super().__init__(data)
        self._most = most

    def read(self, size=-1):
        return super().read(self._most)


@given(st.lists(VALUES, max_size=6), st.integers(1, 12), st.sampled_from([None, 1]), st.booleans())
def test_elements_are_those_of_the_standard_library(values, block, indent, ascii_only):
    data = json.dumps(values, indent=indent, ensure_ascii=ascii_only).encode()
    for text in (data, b"\xef\xbb\xbf \n" + data + b"\r\n\t"):
        found = [json.loads(e) for e in array_elements(Slow(text, max(block, 3)), "a.json")]
        assert found == values


def test_an_element_that_ends_where_a_block_ends_is_read(tmp_path, byte_level):
    """The first element fills the first block to the byte; the others begin in the second."""
    first = {"text": "a" * (arrays._BLOCK - len('[{"text":""}'))}
    records = [first, {"text": "second"}, {"text": "third"}]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(records, separators=(",", ":")))
    assert path.read_bytes()[arrays._BLOCK - 1 : arrays._BLOCK + 1] == b"},"
    lines = write_jsonl(tmp_path / "a.jsonl", records)
    assert documents(run(path, tmp_path / "s", byte_level)) == documents(run(lines, tmp_path / "t", byte_level))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('[{"text":"aa"}]\n[{"text":"bb"}]', "something follows the JSON array of 1 elements, from '\\['"),
        ('[{"text":"aa"}] junk', "something follows the JSON array of 1 elements, from 'j'"),
        ('[{"text":"a"} {"text":"b"}]', "a comma or \\] must follow element 1"),
        ('[{"text":"a"},,{"text":"b"}]', "element 2 of the JSON array is missing before ,"),
        ('[{"text":"a"},]', "element 2 of the JSON array is missing before \\]"),
        ('[,{"text":"a"}]', "element 1 of the JSON array is missing before ,"),
        ('[{"text":"a"}', "a comma or \\] must follow element 1 of the JSON array, not the end: it is cut off"),
        ('[{"text":"a"},', "cut off after element 1"),
        ('[{"text":"a"},{"te', "cut off in element 2"),
        ('["a', "cut off in element 1"),
        ("[", "cut off after element 0"),
    ],
)
def test_what_is_no_array_is_refused(text, reason, tmp_path, byte_level):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=reason) as caught:
        run(path, tmp_path / "s", byte_level, on_error="skip")
    assert "a.json" in str(caught.value)
    assert not (tmp_path / "s").exists()


def test_bad_elements_are_bad_records(tmp_path, byte_level):
    bad = [
        '{"text": "aa\\ud800b"}',
        '{"messages": ' + "[" * 200_000 + "]" * 200_000 + "}",
        '{"text": ' + "9" * 5000 + "}",
        '{"text": "a"} '.replace("a", "\udcff"),
        "{text: 1}",
        "17",
        '"a string"',
    ]
    path = tmp_path / "a.json"
    elements = ['{"text": "one"}', *bad, '{"text": "two"}']
    path.write_bytes(("[" + ",\n".join(elements) + "]").encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"a\.json, row 2: not readable as JSON"):
        run(path, tmp_path / "s", byte_level)
    store = run(path, tmp_path / "s", byte_level, on_error="skip")
    assert len(store) == 2
    assert store.ledger.total()["dropped"]["error"]["documents"] == len(bad)
    rejects = [json.loads(line) for line in (tmp_path / "s" / "rejects.jsonl").read_text().splitlines()]
    assert [r["where"] for r in rejects] == [f"a.json, row {k + 2}" for k in range(len(bad))]
