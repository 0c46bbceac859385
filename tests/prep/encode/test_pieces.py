"""Long texts cut into pieces: the same tokens as in one piece, or no cut at all."""

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prep.encode import pieces, tokens
from prep.encode.pieces import can_be_cut, cut_text
from prep.encode.tokenizer import read_tokenizer
from prep.encode.tokens import TokenEncoder

FOLDERS = ["byte_level", "byte_level_nfc", "sentencepiece"]
FRAGMENTS = [
    "a b",
    " c",
    "  d",
    "\n",
    "\t",
    "Hello there",
    "e\u0301",
    "▁",
    "don't we'll ",
    "x1 2y",
    "。你好",
    "<tool_call>",
]
FRAGMENTS += ["<|im_end|>", "\x00", "\u00a0", "!?", "…", " \n e"]


@pytest.fixture
def short_pieces(monkeypatch):
    for module in (pieces, tokens):
        monkeypatch.setattr(module, "PIECE_CHARACTERS", 3)
    monkeypatch.setattr(tokens, "_PIECES_A_CALL", 2)


@pytest.mark.usefixtures("short_pieces")
@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join), min_size=1, max_size=4))
@pytest.mark.parametrize("name", FOLDERS)
def test_pieces_give_the_tokens_of_the_whole(name, texts, request):
    folder = read_tokenizer(request.getfixturevalue(name))
    assert folder.can_be_cut == (name != "sentencepiece"), "the small one of ours joins words across a space"
    encoder = TokenEncoder(folder, "hf")
    encoded, bad = encoder.encode(texts)
    assert not bad
    for i, text in enumerate(texts):
        row = slice(encoded.offsets[i], encoded.offsets[i + 1])
        assert encoded.ids[row].tolist() == folder.tokenizer.encode(text, add_special_tokens=False).ids
        whole = tokens._encode_with_offsets(folder.tokenizer, text)
        slow = encoder._encode_slowly(folder.tokenizer, text)
        for part in ("ids", "starts", "ends", "offsets", "bytes"):
            assert np.array_equal(getattr(slow, part), getattr(whole, part)), part


@pytest.mark.parametrize("name", ["llama3_1", "qwen3", "gemma3", "deepseek_v3"])
@pytest.mark.usefixtures("short_pieces")
def test_pieces_give_the_tokens_of_the_whole_for_real_tokenizers(name, npm_tokenizer):
    folder = read_tokenizer(npm_tokenizer(name))
    assert folder.can_be_cut
    text = "".join(FRAGMENTS[k * k % len(FRAGMENTS)] + FRAGMENTS[k % len(FRAGMENTS)] for k in range(400))
    assert len(cut_text(text)) > 100
    encoded, _ = TokenEncoder(folder, "hf").encode([text])
    assert encoded.ids.tolist() == folder.tokenizer.encode(text, add_special_tokens=False).ids


@given(st.text(alphabet="ab \n", max_size=60))
def test_cuts_lie_between_a_letter_and_a_space_before_a_letter(text):
    cut = cut_text(text)
    assert "".join(cut) == text
    for left, right in pairwise(cut):
        assert left[-1].isalpha()
        assert right[0] == " "
        assert right[1].isalpha()


@pytest.mark.usefixtures("short_pieces")
def test_text_without_such_a_place_stays_whole():
    assert cut_text("你好" * 50 + "  a\nb" * 20) == ["你好" * 50 + "  a\nb" * 20]
    assert cut_text("ab cd ef") == ["ab cd", " ef"]


def content_of(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    return content, content["model"]["vocab"]


def change_nothing(content, vocabulary):
    pass


def token_over_the_cut(content, vocabulary):
    vocabulary["a\u0120b"] = 10**6


def added_token_over_the_cut(content, vocabulary):
    content["added_tokens"].append({**content["added_tokens"][0], "content": "New York"})


def added_token_that_looks_aside(content, vocabulary):
    content["added_tokens"][0]["single_word"] = True


def unknown_pattern(content, vocabulary):
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] += r"|\w+ \w+"


def unknown_normalizer(content, vocabulary):
    content["normalizer"] = {"type": "Strip", "strip_left": True, "strip_right": True}


def dropout(content, vocabulary):
    content["model"]["dropout"] = 0.1


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (change_nothing, True),
        (token_over_the_cut, False),
        (added_token_over_the_cut, False),
        (added_token_that_looks_aside, False),
        (unknown_pattern, False),
        (unknown_normalizer, False),
        (dropout, False),
    ],
)
def test_a_tokenizer_that_could_look_across_is_not_cut(change, expected, byte_level):
    content, vocabulary = content_of(byte_level)
    change(content, vocabulary)
    assert can_be_cut(content, vocabulary) is expected
