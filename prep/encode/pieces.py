"""Where a long text may be cut without changing one of its tokens.

Hugging Face tokenizers need a hundred bytes of memory a token while they work, and slow down on long texts, so these
are encoded piece by piece.
Only cuts that provably change nothing are made: before a single space between two ASCII letters, `a| b`, and only for
tokenizers of which all of this holds:

- no entry of the vocabulary has a letter before a space, so no merge of BPE joins the two sides, whatever is there;
- no match of the pre-tokenizer's patterns holds a letter before a space or looks past the end of a run of letters, so
  the search for matches stands at the cut in the whole text as it does at the begin of the piece, and none looks back;
- no added token holds a letter before a space or asks what stands beside it;
- the normaliser does nothing, joins characters (NFC; a space never joins), or writes ▁ for a space.

A text without such a place (one word of megabytes, Chinese without spaces) is encoded as a whole.
"""

import json
import re
from collections.abc import Iterable

PIECE_CHARACTERS = 1 << 12
"""Length that pieces aim at; shorter texts are never cut. The library is half as fast again on these as on 20,000."""

_CUT = re.compile(r"(?<=[A-Za-z])(?= [A-Za-z])")

_KNOWN_ALTERNATIVES = frozenset(
    {
        # GPT-2
        *("'s", "'t", "'re", "'ve", "'m", "'ll", "'d"),
        *(r" ?\p{L}+", r" ?\p{N}+", r" ?[^\s\p{L}\p{N}]+", r"\s+(?!\S)", r"\s+"),
        # GPT-4, Llama-3, Qwen
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        *(r"[^\r\n\p{L}\p{N}]?\p{L}+", r"\p{N}{1,3}", r"\p{N}", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r"\s*[\r\n]+"),
        # DeepSeek-V3
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+""",
        "[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+",
        " ?[\\p{P}\\p{S}]+[\r\n]*",
        "\\s*[\r\n]+",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    }
)
"""Alternatives of patterns of which the condition above is known: each was read, none is guessed."""


def can_be_cut(content: dict, vocabulary: Iterable[str]) -> bool:
    """Whether cuts before a space between letters leave all tokens as they are.

    Args:
        content: tokenizer.json (its model without vocabulary and merges will do).
        vocabulary: the entries of the model's vocabulary.
    """
    model = content["model"]
    if model["type"] != "BPE" or model.get("dropout") or model.get("end_of_word_suffix"):
        return False
    if model.get("continuing_subword_prefix"):
        return False
    # A space as it stands, as the byte alphabet writes it, and as a normaliser may.
    spaces = " \u0120" + ("▁" if "▁" in json.dumps(content.get("normalizer"), ensure_ascii=False) else "")
    letter_space = re.compile(f"[A-Za-z][{spaces}]")
    for token in content.get("added_tokens") or ():
        if token.get("single_word") or token.get("lstrip") or token.get("rstrip"):
            return False
        if letter_space.search(token["content"]):
            return False
    if not _local_normalizer(content.get("normalizer")) or not _local_pre_tokenizer(content.get("pre_tokenizer")):
        return False
    return letter_space.search("\n".join(vocabulary)) is None


def _local_normalizer(normalizer: dict | None) -> bool:
    if normalizer is None or normalizer["type"] == "NFC":
        return True
    if normalizer["type"] == "Sequence":
        return all(map(_local_normalizer, normalizer["normalizers"]))
    return normalizer["type"] == "Replace" and (normalizer["pattern"], normalizer["content"]) == ({"String": " "}, "▁")


def _local_pre_tokenizer(pre_tokenizer: dict | None) -> bool:
    if pre_tokenizer is None or pre_tokenizer["type"] == "Digits":
        return True
    if pre_tokenizer["type"] == "Sequence":
        return all(map(_local_pre_tokenizer, pre_tokenizer["pretokenizers"]))
    if pre_tokenizer["type"] == "ByteLevel":  # its own pattern is GPT-2's
        return not pre_tokenizer["add_prefix_space"]
    if pre_tokenizer["type"] != "Split" or pre_tokenizer.get("invert"):
        return False
    if pre_tokenizer["pattern"] == {"String": " "}:
        return True  # one piece or two: no merge crosses the cut
    pattern = pre_tokenizer["pattern"].get("Regex")
    if pattern is None or pre_tokenizer["behavior"] != "Isolated":
        return False
    return _KNOWN_ALTERNATIVES.issuperset(_alternatives(pattern))


def _alternatives(pattern: str) -> list[str]:
    """The alternatives of a regular expression: cut at every `|` outside brackets."""
    found, start, depth, bracket, k = [], 0, 0, False, 0
    while k < len(pattern):
        character = pattern[k]
        if character == "\\":
            k += 1
        elif bracket:
            bracket = character != "]"
        elif character == "[":
            bracket = True
        elif character in "()":
            depth += 1 if character == "(" else -1
        elif character == "|" and depth == 0:
            found.append(pattern[start:k])
            start = k + 1
        k += 1
    return [*found, pattern[start:]]


def cut_text(text: str) -> list[str]:
    """A text in pieces of about `PIECE_CHARACTERS`, cut only where `can_be_cut` speaks of."""
    pieces, start = [], 0
    while len(text) - start > PIECE_CHARACTERS and (match := _CUT.search(text, start + PIECE_CHARACTERS)):
        pieces.append(text[start : match.start()])
        start = match.start()
    return [*pieces, text[start:]]
