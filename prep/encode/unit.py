"""One work unit: lines → documents → one file of the store. A pure function of the unit's bytes and the options."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson

from prep.encode.masks import Rendering, byte_spans, target_mask
from prep.encode.options import EncodeOptions
from prep.encode.records import RecordReader
from prep.encode.sources import Unit, line_number, read_lines
from prep.encode.store import UnitResult, UnitWriter, finished_unit
from prep.encode.templates import ChatTemplate
from prep.encode.tokenizer import Encoded, TokenizerFolder, read_tokenizer
from prep.ledger import Ledger

_BATCH_CHARACTERS = 1 << 20
"""Text that is tokenised in one call; what is larger is one call by itself."""


@dataclass(frozen=True)
class Job:
    """What all units of a run share."""

    store: str
    options: EncodeOptions


def encode_unit(job: Job, unit: Unit) -> UnitResult:
    """Encode a unit, unless the store holds it already.

    Raises:
        ValueError: a line that is not a record; the message names file and line.
    """
    store = Path(job.store)
    done = finished_unit(store, unit.index)
    if done is not None:
        return done
    encoder = _encoder(job.options)
    ledger = Ledger()
    with UnitWriter(store, unit.index, unit.name) as writer:
        batch: list[Rendering] = []
        characters = 0
        for offset, line in read_lines(unit.path, unit.start, unit.stop):
            if not line.strip():
                continue
            try:
                rendering = encoder.render(line)
            except ValueError as error:
                raise ValueError(f"{unit.path}, line {line_number(unit.path, offset)}: {error}") from None
            batch.append(rendering)
            characters += len(rendering.text)
            if characters >= _BATCH_CHARACTERS:
                writer.write(*encoder.encode(batch, unit.name, ledger))
                batch, characters = [], 0
        writer.write(*encoder.encode(batch, unit.name, ledger))
    return writer.finish(ledger)


@functools.lru_cache(1)
def _encoder(options: EncodeOptions) -> "_Encoder":
    return _Encoder(options)


class _Encoder:
    """The tokenizer and template of a run, loaded once a process."""

    def __init__(self, options: EncodeOptions):
        self._folder: TokenizerFolder = read_tokenizer(options.tokenizer)
        source = self._folder.chat_template
        template = ChatTemplate(source, self._folder.special_tokens, options.template_date) if source else None
        self._records = RecordReader(self._folder, template, options.mask)

    def render(self, line: bytes) -> Rendering:
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise ValueError(f"not readable as JSON ({error})") from None
        return self._records.read(record)

    def encode(self, batch: Sequence[Rendering], source: str, ledger: Ledger):
        """Renderings → (ids int32[T], mask uint8[T], offsets int64[N+1]) of the documents that are kept."""
        plain = [i for i, rendering in enumerate(batch) if not rendering.injected]
        encoded = self._folder.encode([batch[i].text for i in plain])
        rows: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for k, i in enumerate(plain):
            row = slice(encoded.offsets[k], encoded.offsets[k + 1])
            rows[i] = self._document(batch[i], encoded.ids[row], encoded.starts[row], encoded.ends[row])
        for i, rendering in enumerate(batch):
            if rendering.injected:
                one: Encoded = self._folder.encode_guarded(rendering.text, rendering.literals)
                rows[i] = self._document(rendering, one.ids, one.starts, one.ends)
        kept_ids, kept_masks, offsets, tokens = [], [], [0], 0
        for i in range(len(batch)):
            ids, mask = rows[i]
            tokens += len(ids)
            if len(ids) == 0:
                ledger.drop(source, "empty", 1, 0)
            elif not mask.any():
                ledger.drop(source, "no_targets", 1, len(ids))
            else:
                kept_ids.append(ids)
                kept_masks.append(mask)
                offsets.append(offsets[-1] + len(ids))
        if batch:
            ledger.read(source, len(batch), tokens)
            ledger.keep(source, len(kept_ids), offsets[-1])
        ids = np.concatenate(kept_ids) if kept_ids else np.empty(0, np.int32)
        mask = np.concatenate(kept_masks) if kept_masks else np.empty(0, np.uint8)
        return ids, mask, np.array(offsets, np.int64)

    def _document(self, rendering: Rendering, ids, starts, ends):
        mask = target_mask(starts, ends, byte_spans(rendering.text, rendering.spans))
        prefix = self._folder.prefix_ids if rendering.add_prefix and rendering.text else ()
        suffix = (self._folder.eos_id,) if rendering.add_eos and self._folder.eos_id is not None else ()
        if prefix or suffix:
            ids = np.concatenate([np.array(prefix, np.int32), ids, np.array(suffix, np.int32)])
            eos = [int(rendering.eos_is_target)] * len(suffix)
            mask = np.concatenate([np.zeros(len(prefix), np.uint8), mask, np.array(eos, np.uint8)])
        # Nothing precedes the first token, so nothing can predict it.
        mask[:1] = 0
        return ids, mask
