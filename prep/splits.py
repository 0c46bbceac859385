"""Which documents go to which packed folder, and the ledger of each."""

from collections.abc import Sequence

import numpy as np

from prep.encode.store import DocumentStore
from prep.ledger import Ledger
from prep.plan import Plan
from prep.remix import hashes_as_read


def choose_parts(store: DocumentStore, eval_fraction: float, eval_sources: tuple[str, ...] = ()) -> dict:
    """Rows of the store for each packed folder: `all`, or `train` and `eval`, int64, ascending.

    Held out are all documents of `eval_sources`, and of the others the share `eval_fraction`, each by its own hash: a
    document stays on its side when others come or go. What is evaluated is never trained: equal documents are on the
    same side, but copies that other sources have of a document of `eval_sources` are on none, so that it counts in eval
    as often as its source has it. Where `--dedup` took it for the copy, that of the other source is evaluated instead.
    """
    rows = np.arange(len(store), dtype=np.int64)
    if eval_fraction == 0 and not eval_sources:
        return {"all": rows}
    held_out, copies = np.zeros((2, len(store)), bool)
    if eval_fraction:
        held_out = store.doc_hashes < np.uint64(int(eval_fraction * 2**64))
    check_eval_sources(eval_sources, [name for name, _, _ in store.info.sources])
    if eval_sources:
        own = np.zeros(len(store), bool)
        for name, first, last in store.info.sources:
            own[first:last] |= name in eval_sources
        copies = np.isin(store.doc_hashes, hashes_as_read(store, eval_sources)) & ~own
        stand_in = np.zeros(len(store), bool)
        if store.info.options.get("dedup") == "exact":
            others = np.flatnonzero(copies & ~np.isin(store.doc_hashes, store.doc_hashes[own]))
            stand_in[others[np.unique(store.doc_hashes[others], return_index=True)[1]]] = True
        copies &= ~stand_in
        held_out = (held_out | own | stand_in) & ~copies
    asked = f"--eval-source {' '.join(eval_sources)}" if eval_sources else f"--eval-fraction {eval_fraction}"
    parts = {"train": rows[~held_out & ~copies], "eval": rows[held_out]}
    for name, chosen in parts.items():
        if not chosen.size:
            among = f"{len(rows)}{f', of which {copies.sum()} are copies' if copies.any() else ''}"
            raise ValueError(f"{asked} leaves no document for {name} among {among}; change it")
    return parts


def check_eval_sources(eval_sources: Sequence[str], names: Sequence[str]) -> None:
    """ValueError for a source to hold out that is none of `names`."""
    for wanted in eval_sources:
        if wanted not in names:
            raise ValueError(f"--eval-source {wanted} is none of the sources {', '.join(names)}")


def part_ledger(name: str, parts: dict[str, np.ndarray], plan: Plan, store: DocumentStore) -> Ledger:
    """The store's ledger carried on to part `name` of `parts`: what went to the other one or to none, was dropped or
    cut."""
    ledger = Ledger.from_json(store.ledger.to_json())
    lengths = store.lengths.astype(np.int64)
    here, there = np.zeros((2, len(store)), bool)
    here[parts[name]] = True
    there[np.concatenate([np.empty(0, np.int64), *(rows for other, rows in parts.items() if other != name)])] = True
    overlong = np.zeros(len(store), bool)
    overlong[plan.dropped] = True
    kept = np.bincount(plan.doc, weights=plan.length, minlength=len(store)).astype(np.int64)
    gone = here & (kept == 0)
    cut = here & (kept > 0) & (kept < lengths)
    last_pack = np.zeros(len(store), bool)
    last_pack[plan.last_pack] = True
    for source, first, last in store.info.sources:
        inside = np.zeros(len(store), bool)
        inside[first:last] = True
        dropped = {
            "to_eval" if name == "train" else "to_train": inside & there,
            "held_out_copy": inside & ~here & ~there,
            "overlong": inside & gone & overlong,
            "last_pack": inside & gone & ~overlong,
        }
        for reason, which in dropped.items():
            if which.any():
                ledger.drop_kept(source, reason, int(which.sum()), int(lengths[which].sum()))
        truncated = {"overlong": inside & cut & ~last_pack, "last_pack": inside & cut & last_pack}
        for reason, which in truncated.items():
            if which.any():
                ledger.truncate_kept(source, reason, int((lengths - kept)[which].sum()))
        split = plan.split[(plan.split >= first) & (plan.split < last)]
        if split.size:
            ledger.note(source, "split_documents", int(split.size))
    ledger.check()
    total = ledger.total()["kept"]
    packed = int(plan.length.sum(dtype=np.int64))
    assert total["tokens"] == packed, f"ledger keeps {total['tokens']} tokens, the plan {packed}"
    return ledger
