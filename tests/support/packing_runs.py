"""Small inputs for `prep pack`, a run over them, and what stands in its folder."""

import json
import random
from pathlib import Path

import numpy as np
from click.testing import CliRunner

from formats.dataset import PackedDataset
from formats.layout import check_thd, seqid_to_thd
from prep.cli import main

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "naïve", "日本語", "émigrés"]


def chats(count, seed=0, longest=6):
    draw = random.Random(seed)

    def words():
        return " ".join(draw.choices(WORDS, k=draw.randint(1, longest)))

    for i in range(count):
        if i % 7 == 3:
            yield {"prompt": words(), "completion": words()}
        elif i % 7 == 5:
            yield {"text": words()}
        else:
            turns = [{"role": ("user", "assistant")[t % 2], "content": words()} for t in range(2 * draw.randint(1, 2))]
            yield {"messages": turns}


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def packed(source, out, tokenizer, *arguments, page=False):
    arguments = [*arguments, *([] if page else ["--no-page"])]
    result = run(
        "pack", source, "--out", out, "--tokenizer", tokenizer, "--seq-len", 256, "--workers", 1, "--quiet", *arguments
    )
    assert result.exit_code == 0, result.output
    return out


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def documents_of(folder):
    """doc id → (ids, mask) put together from the slots of a packed folder, checking every row on the way."""
    dataset = PackedDataset(folder)
    m, found = dataset.manifest, {}
    for i in range(len(dataset)):
        pack = dataset[i]
        dataset.check(i)
        if m.kind == "thd":
            ids, mask, seq_lens, slots = pack[:4]
        else:
            ids, mask, seq_lens, slots = seqid_to_thd(*(pack[c] for c in (0, 1, 3)), align=m.align)
        check_thd(ids, mask, seq_lens, slots, capacity=m.capacity, align=m.align)
        starts = np.cumsum(slots) - slots
        for start, n, doc, offset in zip(starts, seq_lens, pack.doc_ids, pack.doc_offsets, strict=True):
            piece = (ids[start : start + n].tolist(), mask[start : start + n].tolist())
            assert (doc, offset) not in found
            found[int(doc), int(offset)] = piece
    whole = {}
    for (doc, offset), (ids, mask) in sorted(found.items()):
        so_far = whole.setdefault(doc, ([], []))
        assert len(so_far[0]) == offset
        so_far[0].extend(ids)
        so_far[1].extend(mask)
    return whole
