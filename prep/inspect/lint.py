"""What is probably wrong with documents, found before a GPU is paid for.

Every finding has a count, a share and up to three examples. An *error* makes training wrong (exit code 1 of `prep
lint`), a *warning* deserves a look, a *note* is a fact that surprises people.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from numba import njit

from formats.dataset import PackedDataset
from prep.encode.store import DocumentStore
from prep.engine.local import run_units
from prep.inspect.documents import Chunk, ShardUnit, shard_chunks, shard_units, store_chunks

EXAMPLES = 3
LEVELS = ("error", "warning", "note")
REPEATED_FROM = 64
"""Tokens from which on a document can be called repetitive."""
REPEATED_SHARE = 0.6
PERIODS = 16
TRUNCATED_SHARE = 0.01

NOTED = {
    "turns_without_words": (
        "warning",
        "turns of the model have no words, so nothing of them is trained: empty answers, to be mended or left out",
    ),
    "turns_without_a_trained_end": (
        "warning",
        "turns of the model have no end that is trained: the chat template does not close them",
    ),
    "turns_outside_generation": (
        "warning",
        "turns of the model are not trained: the {% generation %} blocks of the chat template leave them out",
    ),
    "turns_of_unknown_roles": (
        "warning",
        "turns are not trained, of roles that nobody knows: rename them, or train them with --train-role",
    ),
    "turns_left_out": ("warning", "turns are missing: the chat template writes none of their words"),
    "tool_calls_left_out": ("warning", "turns lack tool calls: the chat template does not write them, or not all"),
    "tools_left_out": ("warning", "chats lack the tools of their record: the chat template knows of no tools"),
    "content_left_out": ("note", "turns lack a part of their content: the chat template leaves it out"),
    "reasoning_left_out": ("note", "turns lack their reasoning: the chat template leaves it out"),
}
"""What encoding notes in the ledger: how bad that is, and what it means."""

# One bit a property; the kernel sets them, `_findings` reads them.
NO_TARGETS, ALL_TARGETS, TARGET_AT_START, NO_BOS, TWO_BOS, END_NOT_TRAINED, HAS_END, REPEATS, BAD_ID = (
    1 << i for i in range(9)
)


class Facts(NamedTuple):
    """What lint must know besides the documents; ids are −1 where the tokenizer has none."""

    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int
    sources: tuple[tuple[str, int, int], ...]
    ledger: Mapping


def lint_store(store: DocumentStore) -> dict:
    """Lint the documents of a store; see `lint`."""
    info = store.info
    ids = (-1 if i is None else i for i in (info.bos_id, info.eos_id, info.pad_id))
    return lint(store_chunks(store), Facts(info.vocab_size, *ids, info.sources, store.ledger.to_json()))


def lint_packed(dataset: PackedDataset, ledger: Mapping, workers: int = 1) -> dict:
    """Lint the documents of a packed folder with its `ledger` (as JSON), a shard a unit of work; see `lint`."""
    m = dataset.manifest
    ids = (-1 if i is None else i for i in (m.bos_id, m.eos_id, m.pad_id))
    sources = tuple((s.name, s.first_row, s.last_row) for s in m.sources)
    facts = Facts(m.vocab_size, *ids, sources, ledger)
    small = facts._replace(sources=(), ledger={})  # all that looking needs: this goes to every worker
    return _result(run_units(partial(_look_at_shard, small), shard_units(dataset), workers), facts)


def lint(chunks: Iterable[Chunk], facts: Facts) -> dict:
    """JSON-compatible: {"documents", "errors", "warnings", "findings": [{"check", "level", "count", "share", "text",
    "examples"}]}, errors first. Pieces of cut documents count as documents here."""
    return _result([_look_at(chunks, facts)], facts)


class Looked(NamedTuple):
    """What the kernel found: `flags` uint16[D], `hashes` uint64[D], `docs`, `packs` int64[D]."""

    flags: np.ndarray
    hashes: np.ndarray
    docs: np.ndarray
    packs: np.ndarray


def _look_at_shard(facts: Facts, unit: ShardUnit) -> Looked:
    return _look_at(shard_chunks(unit), facts)


def _look_at(chunks: Iterable[Chunk], facts: Facts) -> Looked:
    flags, hashes, docs, packs = [], [], [], []
    for chunk in chunks:
        found = np.zeros(len(chunk.docs), np.uint16)
        fingerprint = np.empty(len(chunk.docs), np.uint64)
        _look(
            *(chunk.ids, chunk.mask, chunk.starts, chunk.lengths, chunk.offsets),
            *(facts.vocab_size, facts.bos_id, facts.eos_id, found, fingerprint),
        )
        flags.append(found)
        hashes.append(fingerprint)
        docs.append(chunk.docs)
        packs.append(chunk.packs)
    return Looked(*(np.concatenate(column) for column in (flags, hashes, docs, packs)))


def _result(looked: Sequence[Looked], facts: Facts) -> dict:
    flags, hashes, *places = (np.concatenate(column) for column in zip(*looked, strict=True))
    findings = _findings(flags, hashes, places, facts)
    findings.sort(key=lambda f: LEVELS.index(f["level"]))
    return {
        "documents": len(places[0]),
        "errors": sum(f["level"] == "error" for f in findings),
        "warnings": sum(f["level"] == "warning" for f in findings),
        "findings": findings,
    }


def _findings(flags: np.ndarray, hashes: np.ndarray, places, facts: Facts) -> list[dict]:
    total, findings = len(flags), []

    def add(check: str, level: str, which: np.ndarray, text: str) -> None:
        if which.any():
            examples = [_place(i, places, facts) for i in np.flatnonzero(which)[:EXAMPLES]]
            count = int(which.sum())
            findings.append(finding(check, level, count, count / total, text, examples))

    def has(bit: int) -> np.ndarray:
        return (flags & bit) != 0

    add("id-out-of-range", "error", has(BAD_ID), f"have ids outside the vocabulary of {facts.vocab_size}")
    add("target-at-start", "error", has(TARGET_AT_START), "train their first token, though nothing can predict it")
    untrained = has(NO_TARGETS)
    level = "error" if untrained.all() else "warning"
    add("no-targets", level, untrained, "train not a single token: they cost time and teach nothing")
    if facts.eos_id >= 0:
        never = has(END_NOT_TRAINED)
        whole = never.any() and not (has(HAS_END) & ~never & ~untrained).any()
        text = "never train the end of turn: the model will not learn to stop"
        add("end-of-turn-untrained", "error" if whole else "warning", never, text)
        silent = ~has(HAS_END) & ~untrained
        add(
            "no-end-token",
            "warning" if silent.all() else "note",
            silent,
            f"have no end-of-sequence token (id {facts.eos_id})",
        )
    if facts.bos_id >= 0:
        add("bos-doubled", "error", has(TWO_BOS), f"begin with two begin-of-sequence tokens (id {facts.bos_id})")
        missing = has(NO_BOS)
        mixed = bool((~missing).any())
        text = f"do not begin with the begin-of-sequence token (id {facts.bos_id})" + (", others do" if mixed else "")
        add("bos-missing", "warning" if mixed else "note", missing, text)
    add("all-trained", "note", has(ALL_TARGETS), "train every token but the first: right for texts, not for chats")
    add("repetitive", "warning", has(REPEATS), f"repeat themselves in over {REPEATED_SHARE:.0%} of their tokens")
    _, first, which, counts = np.unique(hashes, return_index=True, return_inverse=True, return_counts=True)
    again = counts[which] > 1
    again[first] = False
    add("duplicates", "warning", again, "are exact copies of an earlier document")
    if facts.pad_id >= 0 and facts.pad_id == facts.eos_id:
        text = "pad with the end-of-sequence token: harmless here; tools that mask by the pad id untrain every end"
        findings.append(finding("pad-is-eos", "note", total, 1.0, text, []))
    account = facts.ledger["total"]
    for name, (level, text) in NOTED.items():
        if count := account["notes"].get(name, 0):
            findings.append(finding(name.replace("_", "-"), level, count, count / total, text, []))
    cut = sum(count["tokens"] for count in account["truncated"].values())
    if cut:
        share = cut / account["read"]["tokens"]
        text = "tokens were cut off: take a larger --seq-len or --overlong split"
        findings.append(finding("truncated", "warning" if share > TRUNCATED_SHARE else "note", cut, share, text, []))
    return findings


def finding(check: str, level: str, count: int, share: float, text: str, examples: list[str]) -> dict:
    """One finding, JSON-compatible."""
    return {"check": check, "level": level, "count": count, "share": share, "text": text, "examples": examples}


def _place(i: int, places, facts: Facts) -> str:
    doc, pack = int(places[0][i]), int(places[1][i])
    source = next((name for name, first, last in facts.sources if first <= doc < last), "?")
    return f"document {doc} of {source}" + (f", pack {pack}" if pack >= 0 else "")


@njit(cache=True, nogil=True)
def _look(ids, mask, starts, lengths, offsets, vocab_size, bos_id, eos_id, flags, hashes):
    matches = np.zeros(PERIODS + 1, np.int64)
    for d in range(starts.size):
        document = ids[starts[d] : starts[d] + lengths[d]]
        trained = mask[starts[d] : starts[d] + lengths[d]]
        n = document.size
        found, targets, ends, trained_ends = 0, 0, 0, 0
        digest = np.uint64(n)
        for t in range(n):
            token = document[t]
            if token < 0 or token >= vocab_size:
                found |= BAD_ID
            targets += trained[t]
            if token == eos_id and t > 0:
                ends += 1
                trained_ends += trained[t]
            digest = (digest ^ np.uint64(token)) * np.uint64(0x9E3779B97F4A7C15)
            digest ^= digest >> np.uint64(29)
        hashes[d] = digest
        if targets == 0:
            found |= NO_TARGETS
        elif targets - trained[0] == n - 1:
            found |= ALL_TARGETS
        if trained[0] != 0:
            found |= TARGET_AT_START
        if ends > 0:
            found |= HAS_END
            if trained_ends == 0 and targets > 0:
                found |= END_NOT_TRAINED
        if offsets[d] == 0:
            if document[0] != bos_id:
                found |= NO_BOS
            elif n > 1 and document[1] == bos_id:
                found |= TWO_BOS
        if n >= REPEATED_FROM:
            most = np.int64(0)
            for period in range(1, PERIODS + 1):
                matches[period] = 0
                for t in range(period, n):
                    matches[period] += document[t] == document[t - period]
                most = max(most, matches[period])
            if most > REPEATED_SHARE * n:
                found |= REPEATS
        flags[d] = found
