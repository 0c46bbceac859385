"""What a Hugging Face tokenizer folder says: the tokenizer, its special tokens, its chat template."""

import ctypes
import functools
import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import orjson
import tokenizers
import xxhash

from prep.encode.files import filesystem, is_remote
from prep.encode.pieces import can_be_cut
from prep.encode.preload import FastTokenizer, fast_tokenizer
from prep.scratch import ScratchFolder

# Parallelism is by processes, one work unit each; threads inside them would only fight for the same cores.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

_UNKNOWN_LENGTH = 1 << 24
"""Stands for a token whose bytes are not known: every sum over it misses the length of a text."""

_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_TOKEN_FIELDS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
_CONTROL_SHAPE = re.compile(r"[<\[][|｜].*[|｜][>\]]", re.DOTALL)


@dataclass(frozen=True)
class TokenizerFolder:
    """What a tokenizer folder holds, read once. `read_tokenizer` makes it."""

    path: Path
    json_text: str = field(repr=False)
    config: dict
    special_tokens: dict[str, str]
    """Named special tokens (`bos_token`, `eos_token` …) as templates see them."""
    chat_template: str | None

    @cached_property
    def hash(self) -> str:
        """xxh3-128 of all that decides ids: tokenizer.json, the named tokens and what is added around a text."""
        around = [self.prefix_ids, sorted(self.special_tokens.items())]
        return xxhash.xxh3_128((self.json_text + json.dumps(around)).encode()).hexdigest()

    @cached_property
    def _content(self) -> dict:
        """tokenizer.json without its vocabulary (which `tokenizers` holds already, and more compactly)."""
        return self._parsed()[0]

    def _parsed(self) -> tuple[dict, object]:
        """(tokenizer.json without its vocabulary, that vocabulary as it stands there)."""
        content = orjson.loads(self.json_text)
        content["model"].pop("merges", None)
        return content, content["model"].pop("vocab", None)

    @cached_property
    def tokenizer(self) -> tokenizers.Tokenizer:
        """`new_tokenizer`, kept."""
        return self.new_tokenizer()

    @cached_property
    def fast_tokenizer(self) -> FastTokenizer | None:
        """The same for fastokens; None where that is not installed or does not read this tokenizer."""
        return fast_tokenizer(self.json_text)

    @cached_property
    def added_tokens(self) -> tuple[dict, ...]:
        return tuple(self._content.get("added_tokens") or ())

    @cached_property
    def control_tokens(self) -> dict[str, int]:
        """Added tokens that are marked special, have a name (`eos_token`), or look like `<|user|>`: text → id.

        By the mark alone DeepSeek-V3's `<｜User｜>` and `<｜Assistant｜>` would be none. Tags (`<think>`) are no
        control tokens: an answer may hold them.
        """
        names = {t["content"] for t in self.added_tokens if t["special"]} | set(self.special_tokens.values())
        found = [t["content"] for t in self.added_tokens if t["content"]]
        found = [name for name in found if name in names or _CONTROL_SHAPE.fullmatch(name)]
        # The ids are asked of the tokenizer: where a vocabulary has gaps, those in the file are not the ones it gives.
        return {name: self.tokenizer.token_to_id(name) for name in found}

    @cached_property
    def control_pattern(self) -> re.Pattern | None:
        """Matches control tokens in text as the tokenizer does: leftmost, longest. None without any."""
        if not self.control_tokens:
            return None
        longest_first = sorted(self.control_tokens, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)))

    @cached_property
    def is_control(self) -> np.ndarray:
        """Which ids are control tokens, bool[V]."""
        table = np.zeros(self.vocab_size, bool)
        table[list(self.control_tokens.values())] = True
        return table

    @cached_property
    def control_range(self) -> tuple[int, int]:
        """Smallest and largest id of the control tokens; an empty range without any."""
        ids = self.control_tokens.values()
        return (min(ids), max(ids)) if ids else (0, -1)

    @cached_property
    def prefix_ids(self) -> tuple[int, ...]:
        """Ids before a plain text (usually bos, or nothing): those of the post-processor, else the bos for which
        `add_bos_token` asks, as transformers 4 has it (5 leaves it out where tokenizer.json says nothing of it)."""
        pieces = _template_pieces(self._content.get("post_processor"))
        prefix: tuple[int, ...] = ()
        for piece in pieces:
            if "Sequence" in piece:
                break
            prefix += (self.tokenizer.token_to_id(piece["SpecialToken"]["id"]),)
        if not prefix and self.config.get("add_bos_token") is True and self.bos_id is not None:
            prefix = (self.bos_id,)
        return prefix

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return self._largest_id + 1

    @cached_property
    def _largest_id(self) -> int:
        ids = [self.tokenizer.token_to_id(token["content"]) for token in self.added_tokens]
        return max(max(self._vocabulary.values(), default=-1), *ids, -1)

    @property
    def _vocabulary(self) -> dict[str, int]:
        """The model's vocabulary, without added tokens."""
        return self.__dict__.get("_at_hand") or self.tokenizer.get_vocab(with_added_tokens=False)

    @contextmanager
    def vocabulary_at_hand(self) -> Iterator[None]:
        """Inside, the vocabulary is read once: it is slow to get, and too large to keep."""
        self.__dict__["_content"], vocabulary = self._parsed()
        # Unigram's is a list of another kind.
        self.__dict__["_at_hand"] = vocabulary if isinstance(vocabulary, dict) else self._vocabulary
        try:
            yield
        finally:
            del self.__dict__["_at_hand"]

    def _named_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.tokenizer.token_to_id(token)

    @cached_property
    def bos_id(self) -> int | None:
        return self._named_id("bos_token")

    @cached_property
    def eos_id(self) -> int | None:
        return self._named_id("eos_token")

    @cached_property
    def pad_id(self) -> int | None:
        return self._named_id("pad_token")

    @cached_property
    def byte_lengths(self) -> np.ndarray | None:
        """Bytes of text each id stands for, int32[V]; None where the kind of tokenizer gives no such number."""
        rule = _byte_rule(self._content)
        if rule is None:
            return None
        vocabulary = self._vocabulary
        lengths = np.full(self.vocab_size, _UNKNOWN_LENGTH, np.int32)
        lengths[list(vocabulary.values())] = rule(list(vocabulary))
        for token in self.added_tokens:
            # Gemma has runs of marked spaces among its added tokens; what holds a ▁ of its own is not counted at all.
            text = token["content"].replace("▁", " ") if self.marks_spaces else token["content"]
            lengths[self.tokenizer.token_to_id(token["content"])] = len(text.encode())
        return lengths

    @cached_property
    def marks_spaces(self) -> bool:
        """Whether the normaliser writes ▁ for a space."""
        return "Replace" in _normalizer_kinds(self._content.get("normalizer"))

    @cached_property
    def can_be_cut(self) -> bool:
        """Whether long texts may be encoded piece by piece, see `prep.encode.pieces`."""
        return can_be_cut(self._content, self._vocabulary)

    @cached_property
    def changes_text(self) -> Callable[[str], bool] | None:
        """Tells whether the normaliser changes a text, so that the lengths of its tokens say nothing; None if never."""
        if "NFC" in _normalizer_kinds(self._content.get("normalizer")):
            return lambda text: not (text.isascii() or unicodedata.is_normalized("NFC", text))
        if self.marks_spaces:
            return lambda text: "▁" in text
        return None

    def new_tokenizer(self) -> tokenizers.Tokenizer:
        """A new instance without post-processor, padding and truncation: it adds nothing and trims no offsets."""
        tokenizer = tokenizers.Tokenizer.from_str(self.json_text)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.post_processor = None
        return tokenizer


def _template_pieces(processor: dict | None) -> list[dict]:
    """What a post-processor puts around a single text: [{"SpecialToken": …} or {"Sequence": …}]."""
    if processor is None:
        return []
    if processor["type"] == "Sequence":
        return [piece for inner in processor["processors"] for piece in _template_pieces(inner)]
    if processor["type"] == "TemplateProcessing":
        return processor["single"]
    if processor["type"] in ("BertProcessing", "RobertaProcessing"):
        return [{"SpecialToken": {"id": processor["cls"][0]}}]
    return []


def _normalizer_kinds(normalizer: dict | None) -> set[str]:
    if normalizer is None:
        return set()
    if normalizer["type"] == "Sequence":
        return set().union(*map(_normalizer_kinds, normalizer["normalizers"]))
    if normalizer["type"] == "Replace" and (normalizer["pattern"], normalizer["content"]) != ({"String": " "}, "▁"):
        return {"Other"}
    return {normalizer["type"]}


def _byte_rule(content: dict):
    """A function from vocabulary entries to the numbers of bytes they stand for, or None."""
    pre_tokenizer = json.dumps(content.get("pre_tokenizer"))
    normalizers = _normalizer_kinds(content.get("normalizer"))
    model = content["model"]
    if model["type"] != "BPE" or any(t.get("lstrip") or t.get("rstrip") for t in content.get("added_tokens") or ()):
        return None
    if '"ByteLevel"' in pre_tokenizer and '"add_prefix_space": true' not in pre_tokenizer and normalizers <= {"NFC"}:
        return _lengths_in_byte_alphabet
    if "Metaspace" not in pre_tokenizer and "ByteLevel" not in pre_tokenizer and normalizers == {"Replace"}:
        return _lengths_with_byte_fallback
    return None


def _lengths_in_byte_alphabet(tokens: list[str]) -> list[int]:
    # One character of the byte alphabet is one byte (the alphabet ends below U+0144).
    if max("".join(tokens), default="") < "\u0144":
        return list(map(len, tokens))
    return [len(token) if max(token, default="") < "\u0144" else _UNKNOWN_LENGTH for token in tokens]


def _lengths_with_byte_fallback(tokens: list[str]) -> list[int]:
    # A mark for a space has three bytes.
    lengths = [len(token.encode()) - 2 * token.count("▁") for token in tokens]
    for index, token in enumerate(tokens):
        if len(token) == 6 and re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            lengths[index] = 1
    return lengths


def load_tokenizer(path: str | Path, fast: bool) -> TokenizerFolder:
    """`read_tokenizer`, with all that encoding needs of it: a process that forks afterwards pays for it once.

    Args:
        fast: fastokens too, if it can be; `begin_fast` may have begun with it.
    """
    folder = _open_folder(path)
    _check(folder)
    with folder.vocabulary_at_hand():
        _ = folder.hash, folder.byte_lengths, folder.can_be_cut, folder.is_control, folder.control_pattern
    if fast:
        _ = folder.fast_tokenizer
    release_memory()
    return folder


def read_tokenizer(path: str | Path) -> TokenizerFolder:
    """Open a folder: `tokenizer.json`, and if there `tokenizer_config.json`, `special_tokens_map.json`, `*.jinja`.

    The folder behind an address (`s3://…`) is copied once a process, into a temporary folder that goes with it.

    Raises:
        ValueError: no such folder, no tokenizer.json in it, or a file that cannot be read; the message says which.
    """
    folder = _open_folder(path)
    _check(folder)
    return folder


def _check(folder: TokenizerFolder) -> None:
    try:
        _ = folder.tokenizer
    except Exception as error:
        file = folder.path / "tokenizer.json"
        raise ValueError(f"{file}: not a tokenizer that `tokenizers` can read ({error})") from None


def check_tokenizer_folder(path: str | Path) -> None:
    """Refuse at once what cannot be a tokenizer folder. (One behind an address is looked at when it is read.)

    Raises:
        ValueError: no such folder, or no tokenizer.json in it.
    """
    if is_remote(str(path)):
        return
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path}: no such tokenizer folder; give a folder that holds tokenizer.json")
    if not (path / "tokenizer.json").is_file():
        raise ValueError(
            f"{path}: no tokenizer.json in this folder; save it with transformers' save_pretrained of a fast tokenizer"
        )


def _open_folder(path: str | Path) -> TokenizerFolder:
    path = _copied(str(path)) if is_remote(str(path)) else Path(path)
    check_tokenizer_folder(path)
    stamps = tuple(
        (name, stat.st_mtime_ns, stat.st_size)
        for name in _FILES
        if (path / name).is_file() and (stat := (path / name).stat())
    )
    return _read_folder(path, stamps)


def _copied(address: str) -> Path:
    address = address.rstrip("/")
    folder = Path(_temporary_folder(address).name) / address.rpartition("/")[2]
    if not folder.exists():
        fs, inner = filesystem(address)
        present = [name for name in _FILES if fs.exists(f"{inner}/{name}")]
        if "tokenizer.json" not in present:
            raise ValueError(f"{address}: no tokenizer.json there; give the address of a tokenizer folder")
        folder.mkdir()
        for name in present:
            fs.get_file(f"{inner}/{name}", str(folder / name))
    return folder


@functools.lru_cache(2)
def _temporary_folder(address: str) -> ScratchFolder:
    return ScratchFolder()


def forget_tokenizers() -> None:
    """Free what `read_tokenizer` keeps: a process that only waits for others has no use for it."""
    _read_folder.cache_clear()
    release_memory()


def release_memory() -> None:
    """Give the memory of what is freed back to the system; glibc keeps it, after loading a vocabulary up to 250 MB."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it
    if trim is not None:
        trim(0)


@functools.lru_cache(2)
def _read_folder(path: Path, stamps: tuple) -> TokenizerFolder:
    """One instance a process as long as the files stay the same: loading takes seconds for large vocabularies."""
    text = (path / "tokenizer.json").read_bytes().decode()
    config = _read_json(path / "tokenizer_config.json")
    named = {**_read_json(path / "special_tokens_map.json"), **config}
    special_tokens = {}
    for name, value in named.items():
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str) and (name in _TOKEN_FIELDS or name in (config.get("extra_special_tokens") or ())):
            special_tokens[name] = value
    for name, value in _extra_tokens(config).items():
        special_tokens.setdefault(name, value)
    return TokenizerFolder(path, text, config, special_tokens, _chat_template(path, config))


def _extra_tokens(config: dict) -> dict[str, str]:
    extra = config.get("extra_special_tokens")
    if not isinstance(extra, dict):
        return {}
    contents = {name: value.get("content") if isinstance(value, dict) else value for name, value in extra.items()}
    return {name: value for name, value in contents.items() if isinstance(value, str)}


def _chat_template(path: Path, config: dict) -> str | None:
    """The default chat template: its own file goes before the entry of tokenizer_config.json, as in transformers."""
    file = path / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # [{"name": "default", "template": …}, {"name": "tool_use", …}]
        template = {entry["name"]: entry["template"] for entry in template}
    if isinstance(template, dict):
        template = template.get("default")
    return template


def _read_json(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return value
