"""Texts → token ids with the byte range of every token.

Ids are those of Hugging Face `tokenizers` on the whole text: long texts go through it in pieces, which are cut only
where no token can change (`prep.encode.pieces`).
The byte range of a token comes from its own length where that is proven to add up to the text (byte-level and
byte-fallback BPE on text that the normaliser leaves alone), and from the library's offset tracking, which is several
times slower, elsewhere. `fastokens`, which tracks no offsets at all, is many times faster than either.
"""

from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass
from functools import cached_property

import numpy as np
import tokenizers
import xxhash

from prep.encode.pieces import PIECE_CHARACTERS, cut_text
from prep.encode.segments import bounds_of, flatten, segment_sums
from prep.encode.tokenizer import TokenizerFolder

_TWIN = 0x10F000  # private-use characters from here on stand for control tokens in `encode_guarded`
_LONG_FOR_FAST = 1 << 18  # to fastokens a text's length makes no difference but for its memory
_PIECES_A_CALL = 256  # about a megabyte: no more is in the library's own form at a time
_SAMPLE_CHARACTERS = 1000
_SAMPLE_LEAST = 100  # a shorter piece says little
_SAMPLE_AT_ONCE = 1 << 14  # characters: little memory, and the libraries' tables are in the caches for a while
SAMPLE_FRACTION = 0.001
"""Share of the text that is compared with Hugging Face, which is so slow that 1 % would cost a quarter of the time. A
work unit has one piece of `_SAMPLE_LEAST` characters more, which takes less than the writing of its file."""


class EngineDiffersError(Exception):
    """fastokens gave other ids than Hugging Face tokenizers."""


@dataclass
class Encoded:
    """Tokens of a batch of texts, flat; text i has tokens `offsets[i]:offsets[i+1]`.

    ids int32[T]; offsets int64[N+1]; bytes int64[N+1] (text i has bytes `bytes[i]:bytes[i+1]`); lengths int32[T], the
    bytes of each token, where each begins behind the one before and nothing of any text is left out, else None.
    """

    ids: np.ndarray
    offsets: np.ndarray
    bytes: np.ndarray
    lengths: np.ndarray | None = None
    ranges: InitVar[tuple[np.ndarray, np.ndarray] | None] = None

    def __post_init__(self, ranges):
        if ranges is not None:
            self._ranges = ranges

    @cached_property
    def _ranges(self) -> tuple[np.ndarray, np.ndarray]:
        # int32 where it will do: half the memory to fill, and nothing to convert.
        bounds = np.zeros(len(self.lengths) + 1, np.int32 if self.bytes[-1] < 1 << 31 else np.int64)
        np.cumsum(self.lengths, out=bounds[1:])
        return bounds[:-1], bounds[1:]

    @property
    def starts(self) -> np.ndarray:
        """First byte of each token in all texts of the batch one after the other, int32 or int64[T], ascending."""
        return self._ranges[0]

    @property
    def ends(self) -> np.ndarray:
        """One past the last byte of each token, int32 or int64[T], ascending."""
        return self._ranges[1]


class TokenEncoder:
    """Encodes texts; one per process.

    Args:
        folder: the tokenizer folder.
        engine: `hf`, or `fast` (see `can_be_fast`).
    """

    def __init__(self, folder: TokenizerFolder, engine: str):
        self._folder = folder
        self._hf = folder.tokenizer
        self._fast = folder.fast_tokenizer if engine == "fast" else None
        self._budget = 0.0
        self._sample: list[str] = []
        self.compared = 0
        """Pieces of text that were compared with Hugging Face since `reset`."""

    def reset(self) -> None:
        """Begin a work unit: what is compared depends on the unit alone, and in the smallest something is."""
        self._budget = float(_SAMPLE_LEAST)
        self._sample = []
        self.compared = 0

    def encode(self, texts: Sequence[str], fast: bool = True) -> tuple[Encoded, dict[int, str]]:
        """Ids and byte ranges of texts in which control tokens are control tokens. Nothing is added around.

        Args:
            texts: N texts.
            fast: use the fast engine if this encoder has it.

        Returns:
            The tokens, and the reasons for texts that cannot be encoded: {index: reason}.

        Raises:
            EngineDiffersError: see `compare`, which must follow the last text of a unit.
        """
        texts = list(texts)
        if self._fast is not None and fast:
            self._budget += SAMPLE_FRACTION * sum(map(len, texts))
            sample, self._budget = select_sample(texts, self._budget)
            self._sample += sample
            if sum(map(len, self._sample)) >= _SAMPLE_AT_ONCE:
                self.compare()
            ids, offsets = self._in_pieces(self._encode_fast, texts, _LONG_FOR_FAST)
        elif self._folder.byte_lengths is not None:
            ids, offsets = self._in_pieces(self._encode_hf, texts, PIECE_CHARACTERS)
        else:
            return self._replace(None, {i: self._encode_slowly(self._hf, text) for i, text in enumerate(texts)}, texts)
        encoded, proven = self._with_lengths(ids, offsets, texts)
        if proven.all():
            return encoded, {}
        slow = {int(i): self._encode_slowly(self._hf, texts[i]) for i in np.flatnonzero(~proven)}
        return self._replace(encoded, slow, texts)

    def _replace(self, encoded: Encoded | None, slow: dict[int, Encoded], texts) -> tuple[Encoded, dict[int, str]]:
        """Put texts encoded one by one into a batch; a text that lost characters is none of ours to pass on."""
        bad = {}
        for i, one in slow.items():
            lost = _uncovered_text(one, texts[i])
            if lost and not self._adds_up(one, texts[i]):
                bad[i] = (
                    f"the tokenizer's vocabulary cannot express a character at or before {lost!r} and would drop it"
                )
        return replace_rows(encoded, slow, len(texts)), bad

    def _adds_up(self, encoded: Encoded, text: str) -> bool:
        """Whether the tokens make up the normalised text (offsets of joined characters leave gaps in the given one)."""
        if self._folder.byte_lengths is None or self._hf.normalizer is None:
            return False
        normalised = self._hf.normalizer.normalize_str(text)
        if self._folder.marks_spaces:  # the lengths of tokens count it as the space that it stands for
            normalised = normalised.replace("▁", " ")
        return int(self._folder.byte_lengths[encoded.ids].sum()) == len(normalised.encode())

    def encode_guarded(self, text: str, literals: Sequence[tuple[int, int]]) -> Encoded:
        """One text in which control tokens count only inside `literals` (character ranges); elsewhere they are text.

        The real ones are swapped for private characters that a second tokenizer knows as ordinary added tokens while it
        takes every control token for text, so that cuts, merges and offsets are the library's own.

        Raises:
            ValueError: the tokenizer makes control tokens out of plain text all the same.
        """
        if any(
            chr(_TWIN) <= character <= chr(_TWIN + len(self._twins)) for character in text if character > "\U00010000"
        ):
            raise ValueError("the record holds private-use characters from U+10F000 on, which mark control tokens here")
        pieces, swapped, last = [], [], 0
        for begin, stop in literals:
            for match in self._folder.control_pattern.finditer(text, begin, stop):
                pieces += [text[last : match.start()], self._twins[match.group()]]
                swapped.append((match.start(), len(match.group().encode())))
                last = match.end()
        encoded = self._encode_slowly(self._guard, "".join([*pieces, text[last:]]))
        # Back to the bytes of the real text: every swapped token before a position shifts it.
        width = len(chr(_TWIN).encode())
        real = np.array([len(text[:position].encode()) for position, _ in swapped], np.int64)
        shifts = np.concatenate([[0], np.cumsum([length - width for _, length in swapped])]).astype(np.int64)
        guarded = real - shifts[:-1]
        starts = encoded.starts + shifts[np.searchsorted(guarded, encoded.starts, side="left")]
        ends = encoded.ends + shifts[np.searchsorted(guarded, encoded.ends, side="left")]
        ids = encoded.ids
        is_twin = ids >= self._folder.vocab_size
        table = np.array(list(self._folder.control_tokens.values()), np.int32)
        ids[is_twin] = table[ids[is_twin] - self._folder.vocab_size]
        if int(self._folder.is_control[ids].sum()) != len(swapped):
            raise ValueError(
                "the tokenizer makes control tokens out of the record's own text; --allow-special permits it"
            )
        return Encoded(ids, encoded.offsets, bounds_of([len(text.encode())]), ranges=(starts, ends))

    def control_counts(self, encoded: Encoded) -> np.ndarray:
        """Control tokens of each text, int64[N]."""
        return np.diff(np.searchsorted(self._controls(encoded), encoded.offsets))

    def has_controls(self, encoded: Encoded) -> bool:
        """Whether any text has a control token."""
        return len(self._controls(encoded)) > 0

    def _controls(self, encoded: Encoded) -> np.ndarray:
        # Control tokens have neighbouring ids at one end of the vocabulary: one comparison leaves few to look up.
        first, last = self._folder.control_range
        at_the_end = first > self._folder.vocab_size - last
        found = np.flatnonzero(encoded.ids >= first if at_the_end else encoded.ids <= last)
        return found[self._folder.is_control[encoded.ids[found]]]

    @cached_property
    def _twins(self) -> dict[str, str]:
        return {token: chr(_TWIN + i) for i, token in enumerate(self._folder.control_tokens)}

    @cached_property
    def _guard(self) -> tokenizers.Tokenizer:
        guard = self._folder.new_tokenizer()
        flags = {token["content"]: token for token in self._folder.added_tokens}
        for number, (token, twin) in enumerate(self._twins.items()):
            kept = {name: flags[token][name] for name in ("single_word", "lstrip", "rstrip")}
            # Some are not marked special in the file, and only those that are can be text.
            normalized = flags[token]["normalized"]
            guard.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=normalized, **kept)])
            guard.add_tokens([tokenizers.AddedToken(twin, special=False, normalized=False, **kept)])
            if guard.token_to_id(twin) != self._folder.vocab_size + number:
                raise ValueError(
                    f"{self._folder.path}: the ids of this vocabulary have gaps, so control tokens inside texts cannot "
                    "be kept apart; --allow-special takes them for control tokens"
                )
        guard.encode_special_tokens = True
        return guard

    def _in_pieces(self, encode: Callable, texts: list[str], longest: int) -> tuple[np.ndarray, np.ndarray]:
        """What `encode` gives for texts, those of more than `longest` characters piece by piece."""
        if max(map(len, texts), default=0) <= longest or not self._folder.can_be_cut:
            return encode(texts)
        flat, rows = [], [0]
        for text in texts:
            if len(text) <= longest:
                flat.append(text)
            else:
                flat += cut_text(text)
            rows.append(len(flat))
        parts = [encode(flat[k : k + _PIECES_A_CALL]) for k in range(0, len(flat), _PIECES_A_CALL)]
        bounds = np.cumsum(np.concatenate([[0], *[np.diff(offsets) for _, offsets in parts]]))
        return np.concatenate([ids for ids, _ in parts]), bounds[rows]

    def _encode_slowly(self, tokenizer: tokenizers.Tokenizer, text: str) -> Encoded:
        """One text by the library's own offset tracking, a long one piece by piece."""
        pieces = cut_text(text) if self._folder.can_be_cut else [text]
        if len(pieces) == 1:
            return _encode_with_offsets(tokenizer, text)
        ids, starts, ends, base = [], [], [], 0
        for piece in pieces:
            encoded = _encode_with_offsets(tokenizer, piece)
            ids.append(encoded.ids)
            starts.append(encoded.starts + base)
            ends.append(encoded.ends + base)
            base += len(piece.encode())
        flat, offsets = flatten([np.concatenate(ids)])
        return Encoded(flat, offsets, bounds_of([base]), ranges=(np.concatenate(starts), np.concatenate(ends)))

    def _encode_hf(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        batch = self._hf.encode_batch_fast(texts, add_special_tokens=False)
        return flatten([np.array(encoding.ids, np.int32) for encoding in batch])

    def _encode_fast(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        try:
            ids, offsets = self._fast.native.encode_batch_flat(texts)
        except ValueError:
            # It refuses what it cannot express, without saying which text: close in on it.
            if len(texts) == 1:
                return self._encode_hf(texts)
            half = len(texts) // 2
            parts = [self._encode_fast(texts[:half]), self._encode_fast(texts[half:])]
            offsets = np.concatenate([parts[0][1], parts[1][1][1:] + parts[0][1][-1]])
            return np.concatenate([parts[0][0], parts[1][0]]), offsets
        return self._with_singles(np.frombuffer(ids, np.int32), np.frombuffer(offsets, np.int64))

    def _with_singles(self, ids: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of characters in the place of their ids (see `FastTokenizer`)."""
        if not self._fast.singles or ids.max(initial=0) < self._fast.first_single:
            return ids, offsets
        all_tokens, bounds = self._single_tokens
        places = np.flatnonzero(ids >= self._fast.first_single)
        begins = bounds[ids[places] - self._fast.first_single]
        lengths = bounds[1 + ids[places] - self._fast.first_single] - begins
        counts = np.ones(len(ids), np.int64)
        counts[places] = lengths
        grown = bounds_of(counts)
        out = np.repeat(ids, counts)
        within = np.arange(lengths.sum()) - np.repeat(bounds_of(lengths)[:-1], lengths)
        out[np.repeat(grown[places], lengths) + within] = all_tokens[np.repeat(begins, lengths) + within]
        return out, grown[offsets]

    @cached_property
    def _single_tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """(tokens of all `singles` one after the other, int64[N+1] where those of each begin)."""
        return self._encode_hf(list(self._fast.singles))

    def compare(self) -> None:
        """Compare both engines on the sample of the texts encoded so far: whole ones where short, else pieces.

        Raises:
            EngineDiffersError: the fast engine gave other ids than Hugging Face on a piece of the sample.
        """
        sample, self._sample = self._sample, []
        if not sample:
            return
        ids, offsets = self._encode_fast(sample)
        expected, expected_offsets = self._encode_hf(sample)
        self.compared += len(sample)
        if not (np.array_equal(ids, expected) and np.array_equal(offsets, expected_offsets)):
            raise EngineDiffersError

    def _with_lengths(self, ids: np.ndarray, offsets: np.ndarray, texts: list[str]) -> tuple[Encoded, np.ndarray]:
        """(tokens with their lengths, proven bool[N]); byte ranges are right where all texts before are proven.

        A text is proven when the lengths of its tokens add up to its own bytes and the normaliser leaves it alone:
        such a tokenizer only ever drops bytes (a vocabulary that lacks them), so a full sum means that none is missing.
        """
        lengths = self._folder.byte_lengths.take(ids)
        sizes = utf8_sizes(texts)
        proven = segment_sums(lengths, offsets) == sizes
        if self._folder.changes_text is not None:
            proven &= ~np.fromiter(map(self._folder.changes_text, texts), bool, len(texts))
        return Encoded(ids, offsets, bounds_of(sizes), lengths), proven


def can_be_fast(folder: TokenizerFolder) -> bool:
    """Whether fastokens is installed, reads this tokenizer, and its byte ranges can be computed."""
    return folder.byte_lengths is not None and folder.fast_tokenizer is not None


def select_sample(texts: Sequence[str], budget: float) -> tuple[list[str], float]:
    """Pieces of texts of `budget` characters together, the same for the same texts; and what is left of the budget."""
    sample = []
    # Spread over the texts by the golden ratio: no order of the input can hide a kind of text from it.
    for k in range(len(texts)):
        text = texts[int(k * 0.6180339887498949 * len(texts)) % len(texts)]
        size = min(_SAMPLE_CHARACTERS, int(budget))
        if size < _SAMPLE_LEAST:
            break
        if len(text) > size:
            start = xxhash.xxh3_64_intdigest(text[:64].encode()) % (len(text) - size)
            text = text[start : start + size]
        budget -= len(text)
        sample.append(text)
    return sample, budget


def utf8_sizes(texts: Sequence[str]) -> np.ndarray:
    """Bytes of each text, int64[N]."""
    return np.fromiter((len(t) if t.isascii() else len(t.encode()) for t in texts), np.int64, len(texts))


def replace_rows(encoded: Encoded | None, rows: dict[int, Encoded], count: int) -> Encoded:
    """A batch of `count` texts with some of them replaced by single encodings."""
    pieces = []
    for i in range(count):
        if i in rows:
            pieces.append(rows[i])
        else:
            part = slice(encoded.offsets[i], encoded.offsets[i + 1])
            # Token lengths that do not add up in one text shift those behind it: count from the text's own first byte.
            begin = encoded.starts[part][:1]
            size = encoded.bytes[i : i + 2] - encoded.bytes[i]
            ranges = (encoded.starts[part] - begin, encoded.ends[part] - begin)
            pieces.append(Encoded(encoded.ids[part], None, size, ranges=ranges))
    ids, offsets = flatten([piece.ids for piece in pieces])
    bases = bounds_of([int(piece.bytes[-1]) for piece in pieces])
    empty = [np.empty(0, np.int64)]
    starts = np.concatenate(empty + [piece.starts + base for piece, base in zip(pieces, bases, strict=False)])
    ends = np.concatenate(empty + [piece.ends + base for piece, base in zip(pieces, bases, strict=False)])
    return Encoded(ids, offsets, bases, ranges=(starts, ends))


def _encode_with_offsets(tokenizer: tokenizers.Tokenizer, text: str) -> Encoded:
    """One text by the library's own offset tracking (characters, turned into bytes here)."""
    encoding = tokenizer.encode(text, add_special_tokens=False)
    ranges = np.array(encoding.offsets, np.int64).reshape(-1, 2)
    if not text.isascii():
        code = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        widths = 1 + (code >= 0x80).astype(np.int64) + (code >= 0x800) + (code >= 0x10000)
        ranges = np.concatenate([[0], np.cumsum(widths)])[ranges]
    ids = np.array(encoding.ids, np.int32)
    bounds, size = bounds_of([len(ids)]), bounds_of([len(text.encode())])
    return Encoded(ids, bounds, size, ranges=(ranges[:, 0], ranges[:, 1]))


def _uncovered_text(encoded: Encoded, text: str) -> str:
    """The first text, but white space, that no token covers; empty when nothing is lost."""
    data = text.encode()
    covered = 0
    ends = np.maximum.accumulate(encoded.ends) if len(encoded.ends) else encoded.ends
    for gap in np.flatnonzero(encoded.starts[1:] > ends[:-1]).tolist() if len(ends) else []:
        lost = data[ends[gap] : encoded.starts[gap + 1]].decode(errors="replace")
        if lost.strip(" \t\r\n"):
            return lost[:40]
    covered = int(ends[-1]) if len(ends) else 0
    edges = data[: int(encoded.starts[0]) if len(ends) else 0] + data[covered:]
    lost = edges.decode(errors="replace")
    return lost[:40] if lost.strip(" \t\r\n") else ""
