"""Another mix of a finished store: the rows of its sources chosen anew, without tokenizing anything again."""

from collections.abc import Mapping, Sequence

import numpy as np

from prep.encode.builtin import hash_template, load_template
from prep.encode.mix import check_shares, select
from prep.encode.sources import SHARES, SourceSpec, as_sources
from prep.encode.store import DocumentStore, read_store, source_ranges
from prep.ledger import Ledger

_SELECTED = ("duplicate", "beyond_share")
"""Reasons for which `prep.encode.mix.select` drops documents: they still lie in the units of the store."""
NOT_IN_MIX = "not_in_mix"


def remix(store: DocumentStore, mix: Sequence[SourceSpec]) -> DocumentStore:
    """The store as it would be had it been encoded with the shares of `mix`, in place of those it was made with.

    The sources are those of `mix`, in its order; the others are left out (`not_in_mix` in the ledger). Only name and
    shares of a source count, not its paths: its files lie in the store as they were read. Duplicates are left out if
    they were.

    Raises:
        ValueError: a source that the store lacks or that was encoded otherwise than `mix` says; shares that contradict
            each other or cannot be met.
    """
    mix = as_sources(mix)
    check_shares(mix)
    ledger, ranges = _before_selection(store)
    _check_sources(mix, ranges, store)
    kept = ledger.to_json()["sources"]
    for name in ranges.keys() - {spec.name for spec in mix}:
        ledger.drop_kept(name, NOT_IN_MIX, kept[name]["kept"]["documents"], kept[name]["kept"]["tokens"])
    names = [spec.name for spec in mix]
    used = np.concatenate([np.arange(*ranges[name], dtype=np.int64) for name in names])
    sources = source_ranges(names, [ranges[name][1] - ranges[name][0] for name in names])
    view = store.with_rows(used, sources, ledger)
    dedup = store.info.options.get("dedup") == "exact"
    chosen = select(view, [(first, last) for _, first, last in sources], mix, ledger, dedup=dedup)
    ledger.check()
    return store.with_rows(used[np.concatenate(chosen)], source_ranges(names, [len(rows) for rows in chosen]), ledger)


def shares(mix: Sequence[SourceSpec]) -> list[dict]:
    """What of `mix` decides the documents, JSON-compatible."""
    return [{name: getattr(spec, name) for name in ("name", *SHARES)} for spec in mix]


def hashes_as_read(store: DocumentStore, names: Sequence[str]) -> np.ndarray:
    """Hashes of all documents that were read from these sources, uint64[N]: also of those that lie in the units of the
    store only, as duplicates or beyond a share."""
    _, ranges = _before_selection(store)
    rows = np.concatenate([np.arange(*ranges[name], dtype=np.int64) for name in names])
    return store.with_rows(rows, (), store.ledger).doc_hashes


def _before_selection(store: DocumentStore) -> tuple[Ledger, Mapping[str, tuple[int, int]]]:
    """The ledger as it was before duplicates and shares left documents out or repeated them, and which rows of the
    units, (first, last), each source has there; also of a store that has another mix by now."""
    content = read_store(store.path)
    value = content["ledger"]
    for account in value["sources"].values():
        taken = [account["dropped"].pop(reason) for reason in _SELECTED if reason in account["dropped"]]
        for unit in ("documents", "tokens"):
            account["kept"][unit] += sum(count[unit] for count in taken) - account["repeated"][unit]
            account["repeated"][unit] = 0
    ledger = Ledger.from_json(value)
    counts = {name: account["kept"]["documents"] for name, account in value["sources"].items()}
    if sum(counts.values()) != store.starts[-1]:
        raise ValueError(f"{store.path}: its ledger does not fit its units; remove the store and encode again")
    order = [name for name, _, _ in content["sources"]]
    ranges = source_ranges(order, [counts[name] for name in order])
    return ledger, {name: (first, last) for name, first, last in ranges}


def _check_sources(mix: Sequence[SourceSpec], names: Mapping[str, int], store: DocumentStore) -> None:
    encoded = {source["name"]: source for source in store.info.options.get("sources", ())}
    for spec in mix:
        if spec.name not in names:
            raise ValueError(
                f"--mix: {store.path} has no source {spec.name}, but {', '.join(names)}; name one of these"
            )
        theirs = encoded[spec.name]
        default = SourceSpec(spec.name, ())
        for field in ("format", "text_by", "columns"):
            given = getattr(spec, field)
            given = dict(given) if field == "columns" else given
            unsaid = dict(default.columns) if field == "columns" else getattr(default, field)
            if given not in (unsaid, theirs[field]):
                raise ValueError(
                    f"--mix: source {spec.name} of {store.path} was encoded with {field} {theirs[field]!r}, not "
                    f"{given!r}; leave that out, or encode it again"
                )
        if spec.template is not None and hash_template(load_template(spec.template, None)) != theirs["template_hash"]:
            raise ValueError(
                f"--mix: source {spec.name} of {store.path} was encoded with another template than {spec.template}; "
                "leave that out, or encode it again"
            )
