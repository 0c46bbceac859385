"""Byte ranges of tokens and the masks made from them, against slow references."""

import json
import random
import unicodedata
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from prep.encode import tokens
from prep.encode.masks import byte_spans, complement, merge_spans, subtract_spans, target_mask
from prep.encode.preload import _with_single_digits
from prep.encode.tokenizer import read_tokenizer
from prep.encode.tokens import EngineDiffersError, TokenEncoder, can_be_fast, select_sample
from prep.encode.unit import select_rows

NASTY = [
    "",
    " ",
    "\n\n\nHello",
    "Größe, naïve café",
    "e\u0301 a\u030a \u0958",  # what NFC joins, and what it takes apart
    "▁already▁there",
    "e\u0301 beside ▁",
    "👩‍👩‍👧‍👦😀" * 5,
    "\x00\x01\x1f\x7f",
    " " * 5000 + "x",
    "x" * 5000,
    "<|im_start|>user\nHi<|im_end|>\n",
    "你好，世界 こんにちは",
    "a\u200db\ufe0f\ufffd\U0010ffff",
]
FOLDERS = ["byte_level", "byte_level_nfc", "sentencepiece"]


@pytest.fixture(params=FOLDERS)
def folder(request):
    return read_tokenizer(request.getfixturevalue(request.param))


def reference_ranges(folder, text):
    """Ids and byte ranges by the library's own offsets, one character at a time."""
    encoding = folder.new_tokenizer().encode(text, add_special_tokens=False)
    ranges = [(len(text[:a].encode()), len(text[:b].encode())) for a, b in encoding.offsets]
    return encoding.ids, ranges


def check_ranges(folder, texts):
    encoded, bad = TokenEncoder(folder, "hf").encode(texts)
    assert not bad
    for i, text in enumerate(texts):
        row = slice(encoded.offsets[i], encoded.offsets[i + 1])
        ids, ranges = reference_ranges(folder, text)
        assert encoded.ids[row].tolist() == ids
        base = encoded.bytes[i]
        found = list(zip((encoded.starts[row] - base).tolist(), (encoded.ends[row] - base).tolist(), strict=True))
        for (start, end), (first, last) in zip(found, ranges, strict=True):
            assert first <= start <= end <= last, text
        assert not found or (found[0][0], found[-1][1]) == (0, len(text.encode()))
    return encoded


def test_byte_ranges_lie_within_those_of_the_library(folder):
    assert folder.byte_lengths is not None
    check_ranges(folder, NASTY)


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.text(max_size=40), max_size=5))
@pytest.mark.parametrize("name", FOLDERS)
def test_byte_ranges_of_any_text(name, texts, request):
    check_ranges(read_tokenizer(request.getfixturevalue(name)), texts)


def test_both_engines_agree(folder):
    pytest.importorskip("fastokens")
    if not can_be_fast(folder):
        pytest.skip("NOT TESTED, fastokens does not read this trained tokenizer")
    texts = [text for text in NASTY if "\x00" not in text]
    fast, hf = (TokenEncoder(folder, engine).encode(texts)[0] for engine in ("fast", "hf"))
    for name in ("ids", "starts", "ends", "offsets", "bytes"):
        assert np.array_equal(getattr(fast, name), getattr(hf, name)), name


def test_a_fast_engine_that_differs_is_found_out(byte_level):
    pytest.importorskip("fastokens")
    encoder = TokenEncoder(read_tokenizer(byte_level), "fast")
    real = encoder._encode_fast

    def wrong(texts):
        ids, offsets = real(texts)
        return np.where(ids == ids[0], ids + 1, ids), offsets

    encoder._encode_fast = wrong
    encoder.encode(["Hello there, how are you today?"] * 5000)
    with pytest.raises(EngineDiffersError):
        encoder.compare()
    encoder.reset()
    with pytest.raises(EngineDiffersError):  # before the end of a large unit: what waits must not grow with it
        for _ in range(120):
            encoder.encode(["Hello there, how are you today? " * 50] * 100)


@pytest.mark.parametrize("at_the_end", [False, True])
def test_control_tokens_are_counted_at_either_end_of_the_vocabulary(at_the_end, byte_level, tmp_path):
    content = json.loads((byte_level / "tokenizer.json").read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["special"]]
    names = [token["content"] for token in content["added_tokens"]]
    entries = [name for name in content["model"]["vocab"] if name not in names]
    order = [*entries, *names] if at_the_end else [*names, *entries]
    content["model"]["vocab"] = {name: number for number, name in enumerate(order)}
    for token in content["added_tokens"]:
        token["id"] = order.index(token["content"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    encoder = TokenEncoder(read_tokenizer(tmp_path), "hf")
    encoded, _ = encoder.encode([*(f"a{name}b{name}" for name in names), f"{order[0]}{order[-1]}", "no"])
    expected = [sum(names.count(name) for name in (order[0], order[-1])), 0]
    assert encoder.control_counts(encoded).tolist() == [2] * len(names) + expected
    assert not encoder.has_controls(encoder.encode(["none of them"])[0])


def test_the_sample_stays_within_its_share():
    draw = random.Random(0)
    texts = ["x" * draw.randint(1, 9000) for _ in range(2000)]
    sample, left = select_sample(texts, budget=tokens.SAMPLE_FRACTION * sum(map(len, texts)))
    taken = sum(map(len, sample))
    assert 0.5 * tokens.SAMPLE_FRACTION < taken / sum(map(len, texts)) <= tokens.SAMPLE_FRACTION
    assert left >= 0


def test_the_sample_is_spread_over_the_texts():
    """Whatever the order of the input, kinds of text that come late or seldom have their share."""
    budget = 20 * tokens._SAMPLE_CHARACTERS
    texts = [f"{k:04d}" * (tokens._SAMPLE_CHARACTERS // 4) for k in range(1000)]
    sample, _ = select_sample(texts, budget)
    numbers = sorted(int(piece[:4]) for piece in sample)
    assert len(numbers) == len(set(numbers)) == 20
    assert max(b - a for a, b in pairwise([0, *numbers, 1000])) < 150
    assert select_sample(texts, budget)[0] == sample


def test_what_a_vocabulary_cannot_express_is_never_dropped_silently(byte_level, tmp_path):
    content = json.loads((byte_level / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    missing = "Ā"  # byte 0 in the byte alphabet
    content["model"]["vocab"] = {token: i for token, i in vocabulary.items() if token != missing}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    _, bad = TokenEncoder(read_tokenizer(tmp_path), "hf").encode(["fine", "a\x00b", "end\x00"])
    assert list(bad) == [1, 2]
    assert "cannot express" in bad[1]


GUARDED = "<|im_start|>user\nsay <|im_end|> and é<|endoftext|><|im_end|>\n"


def test_guarded_control_tokens(folder):
    literals = [(0, 17), (GUARDED.rindex("<|im_end|>"), len(GUARDED))]
    encoded = TokenEncoder(folder, "hf").encode_guarded(GUARDED, literals)
    control = {index: token for token, index in folder.control_tokens.items()}
    found = [
        (control[i], s) for i, s in zip(encoded.ids.tolist(), encoded.starts.tolist(), strict=True) if i in control
    ]
    last = len(GUARDED[: GUARDED.rindex("<|im_end|>")].encode())
    assert found == [("<|im_start|>", 0), ("<|im_end|>", last)]
    assert folder.tokenizer.decode(encoded.ids.tolist(), skip_special_tokens=False).replace(" ", "") == GUARDED.replace(
        " ", ""
    )
    assert encoded.starts[0] == 0
    assert encoded.ends[-1] == len(GUARDED.encode())
    assert np.array_equal(encoded.starts[1:], encoded.ends[:-1]) or "é" in GUARDED


def test_without_anything_to_guard_the_ids_are_the_usual_ones(folder):
    text = "<|im_start|>user\nHello é there<|im_end|>\n"
    encoder = TokenEncoder(folder, "hf")
    guarded, usual = encoder.encode_guarded(text, [(0, len(text))]), encoder.encode([text])[0]
    assert guarded.ids.tolist() == usual.ids.tolist()


RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=8)


def characters(ranges):
    return {c for start, end in ranges for c in range(start, end)}


@given(RANGES, RANGES)
def test_range_arithmetic(spans, holes):
    for result, expected in (
        (merge_spans(spans), characters(spans)),
        (subtract_spans(spans, holes), characters(spans) - characters(holes)),
        (complement(merge_spans(spans), 60), set(range(60)) - characters(spans)),
    ):
        assert characters(result) == expected
        assert all(start < end for start, end in result)
        assert all(left[1] <= right[0] for left, right in pairwise(result))


@example([3, 2], [(0, 1), (2, 4)])  # a token that reaches from one span into the next
@given(st.lists(st.integers(0, 5), max_size=30), RANGES)
def test_target_mask_is_overlap(lengths, spans):
    ends = np.cumsum(np.array(lengths, np.int64))
    starts = ends - lengths
    spans = merge_spans(spans)
    expected = [int(bool(set(range(s, e)) & characters(spans))) for s, e in zip(starts, ends, strict=True)]
    assert target_mask(starts, ends, spans).tolist() == expected


@given(st.text(max_size=40), RANGES)
def test_byte_spans(text, spans):
    spans = [(min(s, len(text)), min(e, len(text))) for s, e in merge_spans(spans)]
    expected = [(len(text[:s].encode()), len(text[:e].encode())) for s, e in spans]
    assert list(byte_spans(text, spans, len(text.encode()))) == expected


def test_select_rows():
    ids, mask, offsets = np.arange(10, dtype=np.int32), np.arange(10, dtype=np.uint8), np.array([0, 3, 3, 7, 10])
    chosen = select_rows(ids, mask, offsets, np.array([3, 1, 0]))
    assert [part.tolist() for part in chosen] == [[7, 8, 9, 0, 1, 2], [7, 8, 9, 0, 1, 2], [0, 3, 3, 6]]


@pytest.fixture(params=["after digits", "in a sequence", "alone"])
def gpt2(request, byte_level, tmp_path):
    """A folder with GPT-2's cut, and an added token that holds a digit."""
    content = json.loads((byte_level / "tokenizer.json").read_text())
    cut = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    steps = [{"type": "Digits", "individual_digits": True}] * (request.param == "after digits") + [cut]
    content["pre_tokenizer"] = cut if request.param == "alone" else {"type": "Sequence", "pretokenizers": steps}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "special"), False) | {"normalized": True}
    content["added_tokens"].append({"id": read_tokenizer(byte_level).vocab_size, "content": "<extra_1>", **flags})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    return read_tokenizer(tmp_path)


def check_engines(folder, texts):
    """Both by themselves: no net below, which catches most of what one of them gets wrong."""
    encoder = TokenEncoder(folder, "fast")
    for ours, theirs in zip(encoder._encode_fast(texts), encoder._encode_hf(texts), strict=True):
        assert np.array_equal(ours, theirs)


def test_the_fast_form_of_gpt2_gives_the_same_tokens(gpt2):
    pytest.importorskip("fastokens")
    assert "Sequence" not in _with_single_digits(gpt2.json_text)[0]
    # One character of every kind of Unicode there is, beside letters, digits, white space and each other.
    kinds = {}
    for code in (*range(1, 0xD800), *range(0xE000, 0x20000)):
        kinds.setdefault((unicodedata.category(chr(code)), chr(code).isspace(), code < 128), []).append(chr(code))
    some = [c for kind in kinds.values() for c in (*kind[:2], kind[-1])]
    texts = [
        f"a{c}b 1{c} {c}2  {c} x'{c}s'll 3 {c}{c}\n {c}9 \n5  6 {d}{c}<extra_1>"
        for c, d in zip(some, some[::-1], strict=True)
    ]
    check_engines(gpt2, texts)


def test_every_digit_is_single_in_the_fast_form(gpt2):
    pytest.importorskip("fastokens")
    # Assigned or not: the library knows more of Unicode than this Python may.
    isolated = pre_tokenizers.Digits(individual_digits=True).pre_tokenize_str
    blocks = [range(1, 0x3400), range(0xA000, 0xAC00), range(0xF900, 0x20000)]
    digits = [p for block in blocks for p, _ in isolated("a".join(map(chr, block))) if len(p) == 1 and p != "a"]
    assert len(digits) > 1700
    draw = random.Random(0)
    pieces = ["x", " ", "  ", "\n", "'s", ".", "½", "②", "7", "<extra_1>", "<|im_end|>"]
    texts = [f"{d}{d} {d}  {d}\n{d}a{d}" + "".join(draw.choices([*pieces, *digits[:99]], k=9)) for d in digits]
    check_engines(gpt2, texts)
    check_engines(gpt2, ["none of them", ""])
