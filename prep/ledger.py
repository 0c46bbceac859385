"""What happened to every document and every token, per source, in sums that must agree exactly.

    read + repeated = kept + Σ dropped[reason] + Σ truncated[reason]        (documents and tokens, per source)

A document counts once: it is kept or dropped; each further use of it counts as repeated. Truncation takes tokens from
a document that is kept, so it takes no documents. Notes are facts outside the sums.
"""

from collections.abc import Mapping
from pathlib import Path

from formats.shard import read_json

LEDGER_NAME = "ledger.json"

SPLIT_REASONS = ("to_eval", "to_train", "held_out_copy")
"""Reasons for which a document is not in one of train and eval: it is in the other, or its twin is. Nothing is lost."""

_COUNTS = ("read", "repeated", "kept")
_BOOKS = ("dropped", "truncated")


class Ledger:
    """Counts of documents and tokens by source and account; all methods take plain integers."""

    def __init__(self):
        self._sources: dict[str, dict] = {}

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(self._sources)

    def open(self, source: str) -> None:
        """Make a source known even if nothing is ever read from it."""
        self._account(source)

    def read(self, source: str, documents: int, tokens: int) -> None:
        """Documents and tokens that came in."""
        _add(self._account(source)["read"], documents, tokens)

    def keep(self, source: str, documents: int, tokens: int) -> None:
        """Documents and tokens that go out."""
        _add(self._account(source)["kept"], documents, tokens)

    def repeat(self, source: str, documents: int, tokens: int) -> None:
        """Documents that are used again, and their tokens."""
        _add(self._account(source)["repeated"], documents, tokens)
        self.keep(source, documents, tokens)

    def drop(self, source: str, reason: str, documents: int, tokens: int) -> None:
        """Documents that never were kept, with the tokens they had."""
        _add(self._book(source, "dropped", reason), documents, tokens)

    def truncate(self, source: str, reason: str, tokens: int) -> None:
        """Tokens taken off documents that are kept (and are counted as kept without these tokens)."""
        _add(self._book(source, "truncated", reason), 0, tokens)

    def drop_kept(self, source: str, reason: str, documents: int, tokens: int) -> None:
        """A later stage drops documents that an earlier one kept."""
        _add(self._account(source)["kept"], -documents, -tokens)
        self.drop(source, reason, documents, tokens)

    def truncate_kept(self, source: str, reason: str, tokens: int) -> None:
        """A later stage cuts tokens off documents that an earlier one kept."""
        _add(self._account(source)["kept"], 0, -tokens)
        self.truncate(source, reason, tokens)

    def note(self, source: str, name: str, count: int) -> None:
        """Add to a fact that stands outside the sums."""
        notes = self._account(source)["notes"]
        notes[name] = notes.get(name, 0) + count

    def merge(self, other: "Ledger") -> None:
        """Add another ledger's counts to this one's."""
        for source, account in other._sources.items():
            mine = self._account(source)
            for name in _COUNTS:
                _add(mine[name], **account[name])
            for book in _BOOKS:
                for reason, count in account[book].items():
                    _add(self._book(source, book, reason), **count)
            for name, count in account["notes"].items():
                self.note(source, name, count)

    def total(self) -> dict:
        """The accounts summed over the sources, in the form of one source."""
        everything = Ledger()
        for account in self._sources.values():
            single = Ledger()
            single._sources["total"] = account
            everything.merge(single)
        return everything._account("total")

    def check(self) -> None:
        """Raise ValueError, naming the source, unless every sum agrees exactly."""
        for source, account in self._sources.items():
            for unit in ("documents", "tokens"):
                out = account["kept"][unit] + sum(c[unit] for book in _BOOKS for c in account[book].values())
                came = account["read"][unit] + account["repeated"][unit]
                if came != out:
                    raise ValueError(
                        f"the ledger of source {source} does not agree: {came} {unit} came in, "
                        f"{out} accounted for; this is a bug, please report it"
                    )

    def to_json(self) -> dict:
        """A JSON-compatible copy: {"sources": {name: account}, "total": account}."""
        return {"sources": {name: _copy(a) for name, a in self._sources.items()}, "total": _copy(self.total())}

    @classmethod
    def from_json(cls, value: Mapping) -> "Ledger":
        """The ledger that `to_json` was made from."""
        ledger = cls()
        ledger._sources = {name: _copy(account) for name, account in value["sources"].items()}
        return ledger

    @classmethod
    def read_file(cls, path: Path) -> "Ledger":
        """The ledger in a `ledger.json`."""
        return cls.from_json(read_json(path))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ledger) and self._sources == other._sources

    __hash__ = None

    def _account(self, source: str) -> dict:
        if source not in self._sources:
            self._sources[source] = {
                "read": {"documents": 0, "tokens": 0},
                "repeated": {"documents": 0, "tokens": 0},
                "kept": {"documents": 0, "tokens": 0},
                "dropped": {},
                "truncated": {},
                "notes": {},
            }
        return self._sources[source]

    def _book(self, source: str, book: str, reason: str) -> dict:
        return self._account(source)[book].setdefault(reason, {"documents": 0, "tokens": 0})


def _add(count: dict, documents: int, tokens: int) -> None:
    count["documents"] += documents
    count["tokens"] += tokens


def _copy(account: Mapping) -> dict:
    return {
        **{name: dict(account[name]) for name in (*_COUNTS, "notes")},
        **{book: {reason: dict(count) for reason, count in account[book].items()} for book in _BOOKS},
    }
