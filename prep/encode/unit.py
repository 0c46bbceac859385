"""One work unit: records → documents → one file of the store. A pure function of the unit's bytes and the options."""

import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prep.encode.builtin import load_template
from prep.encode.chats import ChatRenderer
from prep.encode.direct import Framed, framed_spans
from prep.encode.masks import Rendering, byte_spans, target_mask
from prep.encode.numbers import holds_long_number, parse_exactly, parse_json
from prep.encode.options import EncodeOptions
from prep.encode.readers import Unreadable, locate, read_unit
from prep.encode.records import RecordReader, Tokens
from prep.encode.segments import bounds_of, segment_any
from prep.encode.sources import SourceSpec, Unit, stamp_of
from prep.encode.storage import storage_at
from prep.encode.store import UnitResult, UnitWriter
from prep.encode.templates import ChatTemplate
from prep.encode.tokenizer import TokenizerFolder, read_tokenizer, release_memory
from prep.encode.tokens import Encoded, EngineDiffersError, TokenEncoder, replace_rows
from prep.ledger import Ledger

_BATCH_CHARACTERS = 1 << 20
"""Text that is tokenised in one call; what is larger is one call by itself."""

_REJECT_CHARACTERS = 2000
"""Of a rejected record this much is kept for the eye."""


@dataclass(frozen=True)
class Job:
    """What all units of a run share. `store` is a path or an address; `engine` is decided once: `hf` or `fast`.

    `sync`: workers make each unit durable; False where the run does (see `FolderStorage.syncing`).
    """

    store: str
    options: EncodeOptions
    sources: tuple[SourceSpec, ...]
    engine: str
    sync: bool = True


class DirectDiffersError(Exception):
    """A chat rendered directly is not what its template writes."""


class _Batch:
    """Records on their way: where each stands, as it was read, and the document it became."""

    __slots__ = ("documents", "positions", "records")

    def __init__(self):
        self.positions: list[int] = []
        self.records: list[object] = []
        self.documents: list[Rendering | str | Framed | Tokens] = []

    def clear(self) -> None:
        """Forget all."""
        for column in (self.positions, self.records, self.documents):
            column.clear()


def encode_unit(job: Job, unit: Unit) -> UnitResult:
    """Encode a unit, unless the store holds it already.

    Raises:
        ValueError: a record that is none, if the options stop there; the message names file and line or row.
        OSError: the file changed since it was hashed. The unit is not done then: a unit that is holds what was hashed.
    """
    storage = storage_at(job.store)
    done = storage.finished_unit(unit.index) if unit.begun else None
    if done is not None:
        return done
    with storage.unit_folder() as folder:
        return _encode_into(folder, job, unit)


def _encode_into(folder: Path, job: Job, unit: Unit) -> UnitResult:
    encoder = _encoder(job)
    differences = []
    # Every unit is judged by itself, whichever process it falls to and whatever came before.
    encoder.fast = True
    if (chats := encoder.chats(unit.source)) is not None:
        chats.enable_direct()
    while True:
        try:
            run = _UnitRun(job, unit, encoder)
            ledger = run.run(folder)
            break
        except EngineDiffersError:
            differences.append("engine_differed_units")
            encoder.fast = False
        except DirectDiffersError:
            differences.append("direct_rendering_differed_units")
            chats.disable_direct()
    if stamp_of(unit.path) != unit.stamp:
        raise OSError(f"{unit.path}: changed while it was read")
    for name in differences:
        ledger.note(job.sources[unit.source].name, name, 1)
    return run.writer.finish(ledger, run.rejected)


@functools.lru_cache(1)
def _encoder(job: Job) -> "_Encoder":
    return _Encoder(job)


class _Encoder:
    """What a process loads once: the tokenizer, and a reader of records for every source."""

    def __init__(self, job: Job):
        self._job = job
        self.folder: TokenizerFolder = read_tokenizer(job.options.tokenizer)
        self.tokens = TokenEncoder(self.folder, job.engine)
        _ = self.folder.byte_lengths  # the last large thing that a vocabulary needs
        release_memory()
        self.fast = True
        self._chats: dict[int, ChatRenderer | None] = {}
        self._records: dict[int, RecordReader] = {}

    def chats(self, source: int) -> ChatRenderer | None:
        """The renderer of a source's chats; None where there is no template."""
        if source not in self._chats:
            options = self._job.options
            text = load_template(self._job.sources[source].template or options.chat_template, self.folder)
            template = ChatTemplate(text, self.folder.special_tokens, options.template_date) if text else None
            control = self.folder.control_pattern
            self._chats[source] = ChatRenderer(template, control, options.mask) if template else None
        return self._chats[source]

    def records(self, source: int) -> RecordReader:
        """The reader of a source's records."""
        if source not in self._records:
            options, columns = self._job.options, dict(self._job.sources[source].columns)
            chats = self.chats(source)
            self._records[source] = RecordReader(self.folder, chats, options.mask, columns, options.allow_special)
        return self._records[source]


class _UnitRun:
    """One attempt at a unit."""

    def __init__(self, job: Job, unit: Unit, encoder: _Encoder):
        self._options = job.options
        self._sync = job.sync
        self._unit = unit
        self._spec = job.sources[unit.source]
        self._encoder = encoder
        self._records = encoder.records(unit.source)
        self._ledger = Ledger()
        self._chat_number = 0
        self.rejected: list[str] = []
        encoder.tokens.reset()

    def run(self, store: Path) -> Ledger:
        """Read, encode and write the whole unit."""
        self.writer = UnitWriter(store, self._unit.index, self._spec.name, self._sync)
        with self.writer:
            for batch in self._batches():
                self.writer.write(*self._encode(batch))
                batch.clear()  # before the next records are read: two of many megabytes need not be in memory at once
            self._encoder.tokens.compare()
        if self._encoder.tokens.compared:
            self._ledger.note(self._spec.name, "compared_with_hf", self._encoder.tokens.compared)
        return self._ledger

    def _batches(self) -> Iterator[_Batch]:
        batch = _Batch()
        size = 0
        read = self._records.read
        for position, record in read_unit(self._unit, self._spec):
            # There may be thousands of records a megabyte: this loop calls no function that it can do without.
            try:
                if type(record) is not bytes:
                    if type(record) is Unreadable:
                        raise ValueError(record.reason)
                    document = read(record)
                elif record and not record.isspace():
                    document = read(parse_json(record))
                    if type(document) is Rendering and document.literals and holds_long_number(record):
                        document = read(parse_exactly(record))
                else:
                    continue
                if type(document) is Framed:
                    self._prove_direct(record, document)
            except RecursionError:
                self._reject(position, record, ValueError("the record is nested too deeply"))
                continue
            except ValueError as error:
                self._reject(position, record, error)
                continue
            batch.positions.append(position)
            batch.records.append(record)
            batch.documents.append(document)
            if type(document) is str:
                size += len(document)
            elif type(document) is Tokens:
                size += 4 * len(document.ids)
            else:
                size += len(document.text)
            if size >= _BATCH_CHARACTERS:
                record = document = None  # `batch` alone holds them, see `run`
                yield batch
                size = 0
        yield batch

    def _prove_direct(self, record: object, document: Framed) -> None:
        """The first directly rendered chats of a unit and a few of the others go through Jinja as well."""
        self._chat_number += 1
        if self._chat_number > 2 and self._chat_number % 512:
            return
        full = self._render_fully(record)
        if full.text != document.text or list(full.spans) != list(document.spans):
            raise DirectDiffersError

    def _render_fully(self, record: object) -> Rendering:
        chats = self._encoder.chats(self._unit.source)
        with chats.indirectly():
            return self._records.read(parse_json(record) if type(record) is bytes else record)

    def _reject(self, position: int, record: object, error: ValueError) -> None:
        if self._options.on_error == "stop":
            raise ValueError(f"{locate(self._unit, position)}: {error}") from None
        self._ledger.read(self._spec.name, 1, 0)
        self._ledger.drop(self._spec.name, "error", 1, 0)
        if type(record) is bytes:
            text = record.decode(errors="backslashreplace")
        else:
            text = record.content if type(record) is Unreadable else repr(record)
        where = locate(self._unit, position).replace(self._unit.path, self._unit.name, 1)
        self.rejected.append(
            json.dumps({"where": where, "reason": str(error), "record": text[:_REJECT_CHARACTERS]}, ensure_ascii=True)
        )

    def _encode(self, batch: _Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Records → (ids int32[T], mask uint8[T], offsets int64[N+1]) of the documents that are kept."""
        texts = [i for i, document in enumerate(batch.documents) if type(document) is not Tokens]
        ids, mask, offsets, good = self._encode_texts(batch, texts) if texts else (None, None, None, [])
        if not texts or len(good) < len(batch.documents):
            ids, mask, offsets = self._interleave(batch, ids, mask, offsets, good)
        # Nothing precedes the first token, so nothing can predict it.
        lengths = np.diff(offsets)
        mask[offsets[:-1][lengths > 0]] = 0
        return self._keep(ids, mask, offsets)

    def _encode_texts(self, batch: _Batch, texts: Sequence[int]):
        """(ids, mask, offsets, place of each row in the batch) of those of `texts`, places too, that can be encoded."""
        tokens = self._encoder.tokens
        documents = [batch.documents[i] for i in texts]
        kinds = set(map(type, documents))
        words = documents if kinds == {str} else [d if type(d) is str else d.text for d in documents]
        encoded, bad = tokens.encode(words, fast=self._encoder.fast)
        controls = None if self._options.allow_special else 0
        if kinds == {str} and encoded.lengths is not None and (controls is None or not tokens.has_controls(encoded)):
            # Nothing but texts, and each is the sequence of its tokens: every token is a target.
            every = np.ones(len(texts), bool)
            mask = (encoded.lengths > 0).view(np.uint8)
            return *self._add_around(every, every, encoded.ids, mask, encoded.offsets), texts
        if str in kinds:
            documents = [Rendering(d, [(0, len(d))], controls, around=True) if type(d) is str else d for d in documents]
        allowed = np.array([-1 if document.controls is None else document.controls for document in documents])
        replaced = {}
        for i in np.flatnonzero((allowed >= 0) & (tokens.control_counts(encoded) != allowed)).tolist():
            if i in bad:
                continue
            try:
                if type(documents[i]) is Framed:
                    documents[i] = self._render_fully(batch.records[texts[i]])
                replaced[i] = tokens.encode_guarded(documents[i].text, documents[i].literals)
            except ValueError as error:
                bad[i] = str(error)
        if replaced:
            encoded = replace_rows(encoded, replaced, len(texts))
            self._ledger.note(self._spec.name, "control_tokens_kept_as_text", len(replaced))
        for i, reason in sorted(bad.items()):
            self._reject(batch.positions[texts[i]], batch.records[texts[i]], ValueError(reason))
        for i, document in enumerate(documents):
            if document.facts and i not in bad:
                for name, count in document.facts.items():
                    self._ledger.note(self._spec.name, name, count)
        ids, mask, offsets = self._targets(documents, encoded)
        if not bad:
            return ids, mask, offsets, texts
        good = [i for i in range(len(texts)) if i not in bad]
        return *select_rows(ids, mask, offsets, np.array(good, np.int64)), [texts[i] for i in good]

    def _targets(self, documents: Sequence[Rendering | Framed], encoded: Encoded):
        """Masks of all texts at once, each on its own range of the axis of bytes."""
        if set(map(type, documents)) == {Framed}:  # the many short chats of a usual file: no Python code for each
            trained = framed_spans(documents, encoded.bytes[:-1])
            return encoded.ids, target_mask(encoded.starts, encoded.ends, trained), encoded.offsets
        framed, bases, spans = [], [], []
        bounds = encoded.bytes.tolist()
        for document, base, stop in zip(documents, bounds, bounds[1:], strict=False):
            if type(document) is Framed:
                framed.append(document)
                bases.append(base)
            else:
                spans += [(base + s, base + e) for s, e in byte_spans(document.text, document.spans, stop - base)]
        trained = np.array(spans, np.int64).reshape(-1, 2)
        if framed:
            trained = np.concatenate([trained, framed_spans(framed, np.array(bases, np.int64))])
            if spans:
                trained = trained[np.argsort(trained[:, 0], kind="stable")]
        mask = target_mask(encoded.starts, encoded.ends, trained)
        around = np.fromiter((document.around for document in documents), bool, len(documents))
        eos_is_target = np.fromiter((document.eos_is_target for document in documents), bool, len(documents))
        return self._add_around(around, eos_is_target, encoded.ids, mask, encoded.offsets)

    def _add_around(self, around: np.ndarray, eos_is_target: np.ndarray, ids, mask, offsets):
        """bos before and eos behind the texts that `around` (bool[N]) tells."""
        folder = self._encoder.folder
        prefix = np.array(folder.prefix_ids, np.int32)
        suffix = np.array([] if folder.eos_id is None else [folder.eos_id], np.int32)
        if not around.any() or not len(prefix) + len(suffix):
            return ids, mask, offsets
        grown = bounds_of(np.diff(offsets) + around * (len(prefix) + len(suffix)))
        out_ids, out_mask = np.empty(grown[-1], np.int32), np.zeros(grown[-1], np.uint8)
        given = np.ones(grown[-1], bool)
        for k, token in enumerate(prefix):
            given[grown[:-1][around] + k] = False
            out_ids[grown[:-1][around] + k] = token
        for token in suffix:
            last = grown[1:][around] - 1
            given[last] = False
            out_ids[last] = token
            out_mask[last] = eos_is_target[around]
        out_ids[given], out_mask[given] = ids, mask
        return out_ids, out_mask, grown

    def _interleave(self, batch: _Batch, ids, mask, offsets, good: Sequence[int]):
        """Put documents that came as tokens between the encoded ones, in the order of the input."""
        row = {i: k for k, i in enumerate(good)}
        all_ids, all_masks = [np.empty(0, np.int32)], [np.empty(0, np.uint8)]
        lengths = [0]
        for i, document in enumerate(batch.documents):
            if type(document) is Tokens:
                all_ids.append(document.ids)
                all_masks.append(document.mask)
                if document.removed:
                    self._ledger.note(self._spec.name, "padding_removed", document.removed)
            elif i in row:
                part = slice(offsets[row[i]], offsets[row[i] + 1])
                all_ids.append(ids[part])
                all_masks.append(mask[part])
            else:
                continue
            lengths.append(len(all_ids[-1]))
        return np.concatenate(all_ids), np.concatenate(all_masks), np.cumsum(lengths)

    def _keep(self, ids, mask, offsets):
        """Drop documents that have nothing to give, and enter all in the ledger."""
        lengths = np.diff(offsets)
        empty = lengths == 0
        untrained = ~segment_any(mask, offsets) & ~empty & (not self._options.keep_untrained)
        kept = ~empty & ~untrained
        name = self._spec.name
        self._ledger.read(name, len(lengths), len(ids))
        if empty.any():
            self._ledger.drop(name, "empty", int(empty.sum()), 0)
        if untrained.any():
            self._ledger.drop(name, "no_targets", int(untrained.sum()), int(lengths[untrained].sum()))
        self._ledger.keep(name, int(kept.sum()), int(lengths[kept].sum()))
        if kept.all():
            return ids, mask, offsets
        return select_rows(ids, mask, offsets, np.flatnonzero(kept))


def select_rows(ids, mask, offsets, rows: np.ndarray):
    """Some rows of a batch: (ids, mask, offsets)."""
    lengths = np.diff(offsets)[rows]
    chosen = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(lengths, out=chosen[1:])
    positions = np.arange(chosen[-1]) + np.repeat(offsets[rows] - chosen[:-1], lengths)
    return ids[positions], mask[positions], chosen
