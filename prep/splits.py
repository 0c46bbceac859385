"""Which documents go to which packed folder, and the ledger of each."""

import numpy as np

from prep.encode.store import DocumentStore
from prep.ledger import Ledger
from prep.plan import Plan


def choose_parts(store: DocumentStore, eval_fraction: float, eval_sources: tuple[str, ...] = ()) -> dict:
    """Rows of the store for each packed folder: `all`, or `train` and `eval`, int64, ascending.

    Held out are all documents of `eval_sources`, and of the others the share `eval_fraction`, each by its own hash: a
    document stays on its side when others come or go. Equal documents are on the same side, those of other sources,
    too: what is evaluated is never trained.
    """
    rows = np.arange(len(store), dtype=np.int64)
    if eval_fraction == 0 and not eval_sources:
        return {"all": rows}
    held_out = np.zeros(len(store), bool)
    if eval_fraction:
        held_out = store.doc_hashes < np.uint64(int(eval_fraction * 2**64))
    names = [name for name, _, _ in store.info.sources]
    for wanted in eval_sources:
        if wanted not in names:
            raise ValueError(f"--eval-source {wanted} is none of the sources {', '.join(names)}")
    for name, first, last in store.info.sources:
        if name in eval_sources:
            held_out[first:last] = True
    if eval_sources:
        held_out |= np.isin(store.doc_hashes, store.doc_hashes[held_out])
    asked = f"--eval-source {' '.join(eval_sources)}" if eval_sources else f"--eval-fraction {eval_fraction}"
    for name, chosen in (("eval", held_out), ("train", ~held_out)):
        if not chosen.any():
            raise ValueError(f"{asked} leaves no document for {name} among {len(rows)}; change it")
    return {"train": rows[~held_out], "eval": rows[held_out]}


def part_ledger(name: str, rows: np.ndarray, plan: Plan, store: DocumentStore) -> Ledger:
    """The store's ledger carried on to one packed folder: what went to the other split, was dropped or cut."""
    ledger = Ledger.from_json(store.ledger.to_json())
    lengths = store.lengths.astype(np.int64)
    here = np.zeros(len(store), bool)
    here[rows] = True
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
            "to_eval" if name == "train" else "to_train": inside & ~here,
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
