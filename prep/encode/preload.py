"""fastokens reads its vocabulary in a thread, from the first moment of a process on.

It takes a second or two for large vocabularies and leaves Python alone meanwhile, so that imports and all else that is
loaded go on beside it. Nothing but the standard library is imported here: this must be at work before the rest.
"""

import json
import os
import re
import threading
from pathlib import Path

# Parallelism is by processes, one work unit each. fastokens would start a thread for every core in each of them, whose
# waiting for work takes a third of the time from those that have some.
os.environ.setdefault("FASTOKENS_BPE_THREADS", "1")


class _Loading(threading.Thread):
    def __init__(self, json_text: str):
        super().__init__(daemon=True)
        self.json_text = json_text
        self.tokenizer = None
        self.start()

    def run(self) -> None:
        self.tokenizer = _read(self.json_text)


_loading: list[_Loading] = []


def begin_fast(path: str) -> None:
    """Begin to load the tokenizer of this folder; `fast_tokenizer` gives it. A file that is not there is no concern."""
    file = Path(path) / "tokenizer.json"
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError):  # who reads the folder next says what is wrong with it
        return
    _loading[:] = [_Loading(text)]


def fast_tokenizer(json_text: str):
    """fastokens' tokenizer of a tokenizer.json; None where it is not installed or does not read this one."""
    if _loading and _loading[0].json_text == json_text:
        loading = _loading.pop()
        loading.join()
        return loading.tokenizer
    return _read(json_text)


def _read(json_text: str):
    try:
        import fastokens  # an extra: not everyone has it

        return fastokens.Tokenizer.from_json_str(_in_one_pattern(json_text))
    except (ImportError, KeyError, ValueError, RuntimeError):
        return None


def _in_one_pattern(json_text: str) -> str:
    """tokenizer.json with GPT-2's cut written as one pattern, on which fastokens is three times as fast.

    `Digits` before it cuts out single digits, so that white space before one is at the end of its piece.
    """
    if re.search(r'"type"\s*:\s*"Split"', json_text):
        return json_text  # not GPT-2's, which is known without parsing the file
    content = json.loads(json_text)
    pre_tokenizer = content.get("pre_tokenizer")
    steps = (pre_tokenizer or {}).get("pretokenizers") or [pre_tokenizer]
    if steps[-1:] == [None] or steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return json_text
    if not steps[-1].get("use_regex", True) or steps[:-1] not in ([], [{"type": "Digits", "individual_digits": True}]):
        return json_text
    digits, before = (r"\p{N}", r"[^\s\p{N}]") if len(steps) == 2 else (r" ?\p{N}+", r"\S")
    pattern = rf"'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!{before})|\s+"
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, {**steps[-1], "use_regex": False}]}
    return json.dumps(content, ensure_ascii=False)
