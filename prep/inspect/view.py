"""`prep view`: packs as text or ids, in the terminal or as a page."""

import html
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.text import Text
from tokenizers import Tokenizer

from formats.dataset import PackedDataset, SeqIdPack
from formats.layout import seqid_to_thd
from formats.order import permutation
from formats.shard import atomic_write
from prep.inspect.documents import read_slots
from prep.inspect.visible import visible

COLORS = ("cyan", "green", "yellow", "magenta", "blue", "red")
PADDING = "·"


class View(NamedTuple):
    """An open packed folder, and its tokenizer when there is one."""

    dataset: PackedDataset
    tokenizer: Tokenizer | None
    special: frozenset[int]


class Run(NamedTuple):
    """Consecutive tokens that look alike: `text`, whether they are targets, special tokens, padding."""

    text: str
    target: bool
    special: bool
    padding: bool


class Slot(NamedTuple):
    """A document in a pack, ready to be shown. `source` is its name."""

    doc: int
    offset: int
    source: str
    tokens: int
    targets: int
    padding: int
    runs: list[Run]


def open_view(folder: Path, tokenizer: Path | None) -> View:
    """Open a packed folder with an optional tokenizer folder. ValueError when the tokenizer cannot be read."""
    dataset = PackedDataset(folder)
    if tokenizer is None:
        return View(dataset, None, frozenset())
    path = Path(tokenizer) / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; name the folder of the tokenizer that the packs were made with")
    loaded = Tokenizer.from_file(str(path))
    special = {i for i, token in loaded.get_added_tokens_decoder().items() if token.special}
    return View(dataset, loaded, frozenset(special))


def choose_packs(
    dataset: PackedDataset, number: int | None, doc: int | None, count: int | None, seed: int
) -> list[int]:
    """The packs to show: one by its number, those of a document, or `count` drawn by `seed`; the first by default."""
    if sum(x is not None for x in (number, doc, count)) > 1:
        raise ValueError("--pack, --doc and --random exclude each other; give one of them")
    if doc is not None:
        slots = read_slots(dataset)
        packs = sorted(set(slots.packs[slots.docs == doc].tolist()))
        if not packs:
            raise ValueError(f"document {doc} is in no pack of {dataset.folder}; rows run from 0, see the sources")
        return packs
    if count is not None:
        return sorted(permutation(len(dataset), seed, 0)[:count].tolist())
    chosen = number or 0
    if not 0 <= chosen < len(dataset):
        raise ValueError(f"--pack {chosen}: {dataset.folder} has packs 0 to {len(dataset) - 1}")
    return [chosen]


def slots(view: View, number: int, *, show_ids: bool = False) -> Iterator[Slot]:
    """The documents of a pack in order."""
    dataset = view.dataset
    dataset.check(number)
    pack = dataset[number]
    if isinstance(pack, SeqIdPack):
        thd = seqid_to_thd(pack.input_ids, pack.attention_mask, pack.labels, align=dataset.manifest.align)
    else:
        thd = pack[:4]
    ids, mask, seq_lens, sizes = thd
    start = 0
    pieces = zip(seq_lens.tolist(), sizes.tolist(), pack.doc_ids.tolist(), pack.doc_offsets.tolist(), strict=True)
    for n, size, doc, offset in pieces:
        runs = _runs(view, ids[start : start + n], mask[start : start + n], show_ids)
        if size > n:
            runs.append(Run(PADDING * (size - n), False, False, True))
        source = next((s.name for s in dataset.manifest.sources if s.first_row <= doc < s.last_row), "?")
        yield Slot(doc, offset, source, n, int(mask[start : start + n].sum()), size - n, runs)
        start += size


def _runs(view: View, ids: np.ndarray, mask: np.ndarray, show_ids: bool) -> list[Run]:
    """Cut at every change between target and not, special and not; decode each piece on its own."""
    special = np.isin(ids, list(view.special)) if view.special else np.zeros(len(ids), bool)
    cuts = np.flatnonzero((mask[1:] != mask[:-1]) | (special[1:] != special[:-1])) + 1
    bounds = [0, *cuts.tolist(), len(ids)]
    runs = []
    for low, high in pairwise(bounds):
        part = ids[low:high].tolist()
        if view.tokenizer is None or show_ids:
            text = " ".join(map(str, part)) + " "
        else:
            text = visible(view.tokenizer.decode(part, skip_special_tokens=False), lines=True)
        runs.append(Run(text, bool(mask[low]), bool(special[low]), False))
    return runs


def heading(view: View, number: int) -> str:
    """One line about a pack."""
    index, m = view.dataset.index, view.dataset.manifest
    tokens, targets = int(index.tokens[number]), int(index.target_tokens[number])
    return (
        f"pack {number} of {len(view.dataset)}: {int(index.documents[number])} documents, {tokens:,} of {m.capacity:,} "
        f"tokens ({tokens / m.capacity:.1%}), {targets:,} targets"
    )


def describe(view: View, number: int, *, show_ids: bool = False) -> dict:
    """A pack, JSON-compatible: {"pack", "capacity", "documents": [{"doc", "offset", "source", "tokens", "targets",
    "padding", "runs": [{"text", "target", "special"}]}]}; the runs of a document without its padding."""
    documents = [
        {
            **{name: getattr(slot, name) for name in ("doc", "offset", "source", "tokens", "targets", "padding")},
            "runs": [
                {"text": run.text, "target": run.target, "special": run.special} for run in slot.runs if not run.padding
            ],
        }
        for slot in slots(view, number, show_ids=show_ids)
    ]
    return {"pack": number, "capacity": view.dataset.manifest.capacity, "documents": documents}


def print_pack(console: Console, view: View, number: int, *, show_ids: bool = False) -> None:
    """Print a pack: each document in a colour, targets bold, special tokens reversed, padding dim."""
    console.rule(heading(view, number))
    for i, slot in enumerate(slots(view, number, show_ids=show_ids)):
        color = COLORS[i % len(COLORS)]
        console.print(Text(_title(slot), style=f"dim {color}"))
        line = Text()
        for run in slot.runs:
            style = "dim" if run.padding else f"{color}{' bold' * run.target}{' reverse' * run.special}"
            line.append(run.text, style)
        console.print(line)
    tail = view.dataset.manifest.capacity - sum(s.tokens + s.padding for s in slots(view, number, show_ids=True))
    if tail:
        console.print(Text(f"{PADDING * min(tail, 40)} tail padding: {tail:,} tokens", style="dim"))


def _title(slot: Slot) -> str:
    piece = f" from token {slot.offset}" if slot.offset else ""
    padding = f", {slot.padding} padding" if slot.padding else ""
    return f"document {slot.doc}{piece} ({visible(slot.source)}): {slot.tokens} tokens, {slot.targets} targets{padding}"


STYLE = """
:root { color-scheme: light dark; --ink: light-dark(#222, #e6e6e6); --paper: light-dark(#fff, #16181c); }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 1rem auto;
  max-width: 60rem; padding: 0 1rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 0 1rem; padding-left: .7rem; opacity: .85;
  border-left: 4px solid; border-left-color: hsl(calc(var(--n) * 67) 60% 50%); }
pre b { opacity: 1; background: light-dark(#d7f0d9, #1f4527); font-weight: 650; }
i { font-style: normal; outline: 1px solid light-dark(#888, #888); border-radius: 3px; } s { opacity: .35;
  text-decoration: none; }
h2 { font-size: 1.05rem; } h3 { font-size: .8rem; font-weight: 500; opacity: .7; margin: .8rem 0 .2rem; }
"""


def write_page(path: str, view: View, packs: list[int], *, show_ids: bool = False) -> None:
    """Write the packs as one self-contained page; everything from the data is escaped."""
    parts = [
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        f"<title>{html.escape(str(view.dataset.folder.name))}</title><style>{STYLE}</style>",
        "<p>Targets are <b>bold</b> on green, special tokens boxed, padding is dim.</p>",
    ]
    for number in packs:
        parts.append(f"<h2>{html.escape(heading(view, number))}</h2>")
        for i, slot in enumerate(slots(view, number, show_ids=show_ids)):
            body = "".join(_marked(run) for run in slot.runs)
            parts.append(f'<h3>{html.escape(_title(slot))}</h3><pre style="--n:{i}">{body}</pre>')
    with atomic_write(Path(path)) as file:
        file.write(("\n".join(parts) + "\n").encode())


def _marked(run: Run) -> str:
    text = html.escape(run.text)
    for wanted, tag in ((run.special, "i"), (run.target, "b"), (run.padding, "s")):
        text = f"<{tag}>{text}</{tag}>" if wanted else text
    return text
