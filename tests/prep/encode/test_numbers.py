"""Whole numbers of any size reach a document as they stand."""

import csv
import json

import pytest
from encoding_runs import run, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from prep.encode.numbers import parse_exactly

TOOLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
)
NUMBERS = [123456789012345678901234567890, 2**64, 2**63, -(2**63) - 1, 2**64 - 1, 1234567890123456789]


def call(arguments):
    calls = [{"type": "function", "function": {"name": "f", "arguments": arguments}}]
    return [{"role": "user", "content": "q"}, {"role": "assistant", "content": "calling", "tool_calls": calls}]


def decoded(store, folder):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [tokenizer.decode(store.document(i)[0].tolist()) for i in range(len(store))]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_numbers_over_64_bits_stay_whole(kind, tmp_path, byte_level):
    (tmp_path / "t.jinja").write_text(TOOLS)
    messages = [call({"id": number, "share": 0.25}) for number in NUMBERS]
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        write_jsonl(path, [{"messages": m} for m in messages])
    elif kind == "json":
        path.write_text(json.dumps([{"messages": m} for m in messages]))
    else:
        with open(path, "w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["messages"])
            rows.writerows([json.dumps(m)] for m in messages)
    store = run(path, tmp_path / "s", byte_level, chat_template=str(tmp_path / "t.jinja"))
    for text, number in zip(decoded(store, byte_level), NUMBERS, strict=True):
        assert f'{{"id": {number}, "share": 0.25}}' in text


def test_what_is_nested_too_deeply_is_a_bad_record(tmp_path, byte_level):
    (tmp_path / "t.jinja").write_text(TOOLS)
    deep = "[" * 900 + "]" * 900
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"messages": call({"x": 1})}), json.dumps({"messages": call("DEEP")}).replace('"DEEP"', deep)]
    path.write_text("\n".join([*lines, lines[1].replace("[]", "[" + "9" * 30 + "]"), lines[0]]) + "\n")
    store = run(path, tmp_path / "s", byte_level, chat_template=str(tmp_path / "t.jinja"), on_error="skip")
    assert len(store) == 2
    assert store.ledger.total()["dropped"]["error"]["documents"] == 2


@given(st.recursive(st.integers(-(10**30), 10**30) | st.floats(allow_nan=False, allow_infinity=False), st.lists))
def test_parsing_exactly_is_what_the_standard_library_does(value):
    text = json.dumps(value)
    assert parse_exactly(text) == parse_exactly(text.encode()) == json.loads(text)
