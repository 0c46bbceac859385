"""fastokens reads its vocabulary in a thread, from the first moment of a process on.

It takes a second or two for large vocabularies and leaves Python alone meanwhile, so that imports and all else that is
loaded go on beside it. Nothing but the standard library is imported here: this must be at work before the rest.
"""

import os
import re
import threading
from pathlib import Path
from typing import NamedTuple

# Parallelism is by processes, one work unit each. fastokens would start a thread for every core in each of them, whose
# waiting for work takes a third of the time from those that have some.
os.environ.setdefault("FASTOKENS_BPE_THREADS", "1")


class FastTokenizer(NamedTuple):
    """fastokens' tokenizer. An id from `first_single` on stands for a character: `singles[id - first_single]`."""

    native: object
    singles: str
    first_single: int


class _Loading(threading.Thread):
    def __init__(self, json_text: str):
        super().__init__()  # no daemon: torn off in native code at the end of a process, it would abort that
        self.json_text = json_text
        self.tokenizer = None
        self.start()

    def run(self) -> None:
        self.tokenizer = _read(self.json_text)


_loading: list[_Loading] = []

_BLOCKS_WITH_DIGITS = ((0, 0x3400), (0xA000, 0xAC00), (0xF900, 0x20000))
"""Code points, but for blocks of letters and private ones."""


def begin_fast(path: str) -> None:
    """Begin to load the tokenizer of this folder; `fast_tokenizer` gives it. A file that is not there is no concern."""
    file = Path(path) / "tokenizer.json"
    try:
        text = file.read_bytes().decode()  # a third of the time of read_text
    except (OSError, ValueError):  # who reads the folder next says what is wrong with it
        return
    _loading[:] = [_Loading(text)]


def fast_tokenizer(json_text: str) -> FastTokenizer | None:
    """fastokens' tokenizer of a tokenizer.json; None where it is not installed or does not read this one."""
    if _loading and _loading[0].json_text == json_text:
        loading = _loading.pop()
        loading.join()
        return loading.tokenizer
    return _read(json_text)


def _read(json_text: str) -> FastTokenizer | None:
    try:
        import fastokens  # an extra: not everyone has it

        json_text, singles, first_single = _with_single_digits(json_text)
        return FastTokenizer(fastokens.Tokenizer.from_json_str(json_text), singles, first_single)
    except (ImportError, KeyError, ValueError, RuntimeError):
        return None


def _with_single_digits(json_text: str) -> tuple[str, str, int]:
    """(tokenizer.json in a form that fastokens is ten times as fast on, and the rest of `FastTokenizer`).

    That is for GPT-2's cut after `Digits`, or in a sequence: fastokens has code for it where nothing stands beside it.
    Digits are added tokens instead, which are cut out first too. A digit that has no token of its own gets an id behind
    the vocabulary: it always gives the same tokens, whatever stands around it.
    """
    if re.search(r'"type"\s*:\s*"Split"', json_text):
        return json_text, "", 0  # not GPT-2's, which is known without parsing the file
    import orjson

    content = orjson.loads(json_text)
    steps = (content["pre_tokenizer"] or {}).get("pretokenizers") or [{"type": None}]
    if steps[:-1] not in ([], [{"type": "Digits", "individual_digits": True}]) or steps[-1]["type"] != "ByteLevel":
        return json_text, "", 0
    singles, first = "", 0
    if len(steps) == 2:
        added, vocabulary = content["added_tokens"], content["model"]["vocab"]
        first = 1 + max(*vocabulary.values(), *(token["id"] for token in added))
        digits = sorted(set(_digits()) - {token["content"] for token in added})
        # Behind ASCII, an entry of the vocabulary stands for bytes, not for the character that it is.
        ids = {digit: vocabulary[digit] for digit in digits if digit.isascii() and digit in vocabulary}
        singles = "".join(digit for digit in digits if digit not in ids)
        ids |= {digit: first + number for number, digit in enumerate(singles)}
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        added += [{"id": number, "content": digit, **flags} for digit, number in ids.items()]
    content["pre_tokenizer"] = steps[-1]
    return orjson.dumps(content).decode(), singles, first


def _digits() -> str:
    """The characters that `Digits` cuts out, by the library at hand: there are more in every version of Unicode."""
    from tokenizers import pre_tokenizers

    characters = (chr(code) for first, stop in _BLOCKS_WITH_DIGITS for code in range(first, stop))
    pieces = pre_tokenizers.Digits().pre_tokenize_str("a" + "".join(characters))
    return "".join(piece for piece, _ in pieces[1::2])  # runs of others and of digits alternate
