"""A Hugging Face tokenizer folder, and texts → token ids with the byte range of every token.

Ids are those of `tokenizers` on the whole text; a text is never cut where a merge could cross the cut. The byte range
of a token comes from its own length where that is proven to add up to the text (byte-level and byte-fallback BPE on
text that the normaliser leaves alone), and from the library's offset tracking, which is several times slower, elsewhere.
"""

import json
import os
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
import xxhash

# Parallelism is by processes, one work unit each; threads inside them would only fight for the same cores.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

_UNKNOWN_LENGTH = 1 << 24  # a token whose bytes are not known: makes every sum over it miss the text's length
_TOKEN_FIELDS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


class Encoded(NamedTuple):
    """Tokens of a batch of texts, flat; text i has tokens `offsets[i]:offsets[i+1]`.

    ids int32[T]; starts, ends int64[T] (byte range of each token within its own text); offsets int64[N+1].
    """

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    offsets: np.ndarray


@dataclass(frozen=True)
class TokenizerFolder:
    """What a tokenizer folder holds, read once. `read_tokenizer` makes it."""

    path: Path
    json_text: str
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
        content = json.loads(self.json_text)
        content["model"] = {k: v for k, v in content["model"].items() if k not in ("vocab", "merges")}
        return content

    @cached_property
    def tokenizer(self) -> tokenizers.Tokenizer:
        """The tokenizer without post-processor, padding and truncation: nothing is added, offsets are not trimmed."""
        tokenizer = tokenizers.Tokenizer.from_str(self.json_text)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.post_processor = None
        return tokenizer

    @cached_property
    def added_tokens(self) -> tuple[dict, ...]:
        return tuple(self._content.get("added_tokens") or ())

    @cached_property
    def control_tokens(self) -> dict[str, int]:
        """Added tokens marked special: text → id."""
        return {t["content"]: t["id"] for t in self.added_tokens if t["special"] and t["content"]}

    @cached_property
    def control_pattern(self) -> re.Pattern | None:
        """Matches control tokens in text as the tokenizer does: leftmost, longest. None without any."""
        if not self.control_tokens:
            return None
        longest_first = sorted(self.control_tokens, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)))

    @cached_property
    def prefix_ids(self) -> tuple[int, ...]:
        """Ids that transformers puts before a plain text (usually bos, or nothing)."""
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
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values())

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
        """Bytes of text each id stands for, int64[V]; None where the kind of tokenizer gives no such number."""
        rule = _byte_rule(self._content)
        if rule is None:
            return None
        lengths = np.full(self.vocab_size, _UNKNOWN_LENGTH, np.int64)
        for token, index in self.tokenizer.get_vocab(with_added_tokens=False).items():
            lengths[index] = rule(token)
        for token in self.added_tokens:
            lengths[token["id"]] = len(token["content"].encode())
        return lengths

    @cached_property
    def _changes_text(self):
        """A function: does the normaliser change this text's bytes (so that token lengths do not add up)?"""
        kinds = _normalizer_kinds(self._content.get("normalizer"))
        if "NFC" in kinds:
            return lambda text: not (text.isascii() or unicodedata.is_normalized("NFC", text))
        if "Replace" in kinds:
            return lambda text: "▁" in text
        return None

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Token ids and byte ranges of texts whose control tokens are control tokens. Nothing is added around."""
        return self._encode(self.tokenizer, texts)

    def encode_as_text(self, texts: Sequence[str]) -> Encoded:
        """The same with control tokens in the texts as plain text (`split_special_tokens` of transformers)."""
        self.tokenizer.encode_special_tokens = True
        try:
            return self._encode(self.tokenizer, texts)
        finally:
            self.tokenizer.encode_special_tokens = False

    def encode_guarded(self, text: str, literals: Sequence[tuple[int, int]]) -> Encoded:
        """One text in which control tokens count only inside `literals` (character ranges); elsewhere they are text.

        The real ones are swapped for private characters that a second tokenizer knows as ordinary added tokens while it
        takes every control token for text, so that cuts, merges and offsets are the library's own.
        """
        pieces, swapped, last = [], [], 0
        for begin, stop in literals:
            for match in self.control_pattern.finditer(text, begin, stop):
                pieces += [text[last : match.start()], self._twins[match.group()]]
                swapped.append((match.start(), len(match.group().encode())))
                last = match.end()
        guarded = "".join([*pieces, text[last:]])
        if any(character in text for character in self._twins.values()):
            raise ValueError("the record holds private-use characters from U+10F000 on, which mark control tokens here")
        ids, starts, ends, offsets = _encode_with_offsets(self._guard, guarded)
        # Back to the bytes of the real text: every swapped token before a position shifts it.
        width = len(next(iter(self._twins.values())).encode())
        real = np.array([len(text[:position].encode()) for position, _ in swapped], np.int64)
        growth = np.array([length - width for _, length in swapped], np.int64)
        shifts = np.concatenate([[0], np.cumsum(growth)])
        positions = real - shifts[:-1]  # in the guarded text
        starts = starts + shifts[np.searchsorted(positions, starts, side="left")]
        ends = ends + shifts[np.searchsorted(positions, ends, side="left")]
        is_twin = ids >= self.vocab_size
        ids[is_twin] = np.array(list(self.control_tokens.values()), np.int32)[ids[is_twin] - self.vocab_size]
        return Encoded(ids, starts, ends, offsets)

    @cached_property
    def _twins(self) -> dict[str, str]:
        """Control token → the private character that stands for it."""
        return {token: chr(0x10F000 + i) for i, token in enumerate(self.control_tokens)}

    @cached_property
    def _guard(self) -> tokenizers.Tokenizer:
        guard = tokenizers.Tokenizer.from_str(self.json_text)
        guard.no_padding()
        guard.no_truncation()
        guard.post_processor = None
        flags = {t["content"]: t for t in self.added_tokens}
        for number, (token, twin) in enumerate(self._twins.items()):
            kept = {name: flags[token][name] for name in ("single_word", "lstrip", "rstrip")}
            guard.add_tokens([tokenizers.AddedToken(twin, special=False, normalized=False, **kept)])
            if guard.token_to_id(twin) != self.vocab_size + number:
                raise ValueError(
                    f"{self.path}: the ids of the vocabulary have gaps; control tokens in texts cannot be guarded"
                )
        guard.encode_special_tokens = True
        return guard

    def _encode(self, tokenizer, texts: Sequence[str]) -> Encoded:
        if self.byte_lengths is None:
            return _concatenate([_encode_with_offsets(tokenizer, text) for text in texts])
        batch = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        rows = [np.array(encoding.ids, np.int32) for encoding in batch]
        flat, offsets = flatten(rows)
        starts, ends, proven = self.byte_ranges(flat, offsets, texts)
        if proven.all():
            return Encoded(flat, starts, ends, offsets)
        slow = {i: _encode_with_offsets(tokenizer, texts[i]) for i in np.flatnonzero(~proven)}
        pieces = []
        for i in range(len(texts)):
            row = slice(offsets[i], offsets[i + 1])
            pieces.append(slow.get(i) or Encoded(flat[row], starts[row], ends[row], offsets[i : i + 2] - offsets[i]))
        return _concatenate(pieces)

    def byte_ranges(self, flat: np.ndarray, offsets: np.ndarray, texts: Sequence[str]):
        """Byte ranges from token lengths: (starts int64[T], ends int64[T], proven bool[N]).

        A text is proven when the lengths of its tokens add up to its own bytes and the normaliser leaves it alone:
        such a tokenizer only ever drops bytes (a vocabulary that lacks them), so a full sum means that none is missing.
        """
        lengths = self.byte_lengths[flat]
        cumulated = np.concatenate([[0], np.cumsum(lengths)])
        base = cumulated[offsets[:-1]]
        totals = cumulated[offsets[1:]] - base
        sizes = np.fromiter((len(t) if t.isascii() else len(t.encode()) for t in texts), np.int64, len(texts))
        proven = totals == sizes
        if self._changes_text is not None:
            proven &= ~np.fromiter((self._changes_text(t) for t in texts), bool, len(texts))
        ends = cumulated[1:] - np.repeat(base, np.diff(offsets))
        return ends - lengths, ends, proven


def flatten(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids → (flat int32[T], offsets int64[N+1])."""
    offsets = np.zeros(len(rows) + 1, np.int64)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    return (np.concatenate(rows) if rows else np.empty(0, np.int32)), offsets


def _concatenate(pieces: Sequence[Encoded]) -> Encoded:
    ids, offsets = flatten([piece.ids for piece in pieces])
    empty = [np.empty(0, np.int64)]
    starts = np.concatenate(empty + [piece.starts for piece in pieces])
    ends = np.concatenate(empty + [piece.ends for piece in pieces])
    return Encoded(ids, starts, ends, offsets)


def _encode_with_offsets(tokenizer, text: str) -> Encoded:
    """One text by the library's own offset tracking (characters, turned into bytes here)."""
    encoding = tokenizer.encode(text, add_special_tokens=False)
    ranges = np.array(encoding.offsets, np.int64).reshape(-1, 2)
    if not text.isascii():
        widths = np.fromiter(map(_utf8_width, text), np.int64, len(text))
        ranges = np.concatenate([[0], np.cumsum(widths)])[ranges]
    ids = np.array(encoding.ids, np.int32)
    return Encoded(ids, ranges[:, 0], ranges[:, 1], np.array([0, len(ids)], np.int64))


def _utf8_width(character: str) -> int:
    code = ord(character)
    return 1 if code < 0x80 else 2 if code < 0x800 else 3 if code < 0x10000 else 4


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
    """A function from a vocabulary entry to the number of bytes it stands for, or None."""
    pre_tokenizer = json.dumps(content.get("pre_tokenizer"))
    normalizers = _normalizer_kinds(content.get("normalizer"))
    model = content["model"]
    if model["type"] != "BPE" or any(t.get("lstrip") or t.get("rstrip") for t in content.get("added_tokens") or ()):
        return None
    if '"ByteLevel"' in pre_tokenizer and '"add_prefix_space": true' not in pre_tokenizer and normalizers <= {"NFC"}:
        # One character of the byte alphabet is one byte (the alphabet ends below U+0144).
        return lambda token: len(token) if all(ord(c) < 0x144 for c in token) else _UNKNOWN_LENGTH
    if "Metaspace" not in pre_tokenizer and "ByteLevel" not in pre_tokenizer and normalizers == {"Replace"}:
        return lambda token: 1 if re.fullmatch(r"<0x[0-9A-F]{2}>", token) else len(token.replace("▁", " ").encode())
    return None


def read_tokenizer(path: str | Path) -> TokenizerFolder:
    """Open a folder with `tokenizer.json` (and `tokenizer_config.json`, `special_tokens_map.json`, `chat_template.jinja`).

    Raises:
        ValueError: no such folder, no tokenizer.json in it, or a file that cannot be read; the message says which.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path}: no such tokenizer folder; give a folder that holds tokenizer.json")
    if not (path / "tokenizer.json").is_file():
        raise ValueError(
            f"{path}: no tokenizer.json in this folder; save it with transformers' save_pretrained of a fast tokenizer"
        )
    text = (path / "tokenizer.json").read_text(encoding="utf-8")
    config = _read_json(path / "tokenizer_config.json")
    named = {**_read_json(path / "special_tokens_map.json"), **config}
    special_tokens = {}
    for name, value in named.items():
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str) and (name in _TOKEN_FIELDS or name in (config.get("extra_special_tokens") or ())):
            special_tokens[name] = value
    for name, value in _extra_tokens(config).items():
        special_tokens.setdefault(name, value)
    folder = TokenizerFolder(path, text, config, special_tokens, _chat_template(path, config))
    try:
        _ = folder.tokenizer
    except Exception as error:
        raise ValueError(f"{path / 'tokenizer.json'}: not a tokenizer that `tokenizers` can read ({error})") from None
    return folder


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
