"""A packed folder, its documents by plain slicing, and its conversions, each made once."""

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from formats.shard import write_json
from make_shards import make_shards, random_packs
from prep.cli import main
from prep.ledger import Ledger

CAPACITY, VOCABULARY = 64, 300


@pytest.fixture(scope="session")
def rows():
    return random_packs(np.random.default_rng(0), 70, CAPACITY, 4, VOCABULARY)


@pytest.fixture(scope="session")
def packed(rows, tmp_path_factory):
    """A THD folder of 70 packs with slots aligned to 4, so padding is everywhere."""
    folder = tmp_path_factory.mktemp("packed") / "thd"
    tokens, count = int(sum(r[2].sum() for r in rows)), sum(len(r[2]) for r in rows)
    totals = {"packs": len(rows), "documents": count, "tokens": tokens, "lower_bound_packs": 1}
    totals["slot_tokens"] = sum(len(r[0]) for r in rows)
    ledger = Ledger()
    ledger.read("random", count, tokens)
    ledger.keep("random", count, tokens)
    make_shards(folder, rows, capacity=CAPACITY, align=4, cp=2, shard_packs=66, totals=totals, vocab_size=VOCABULARY)
    write_json(folder / "ledger.json", ledger.to_json())
    return folder


@pytest.fixture(scope="session")
def documents(rows):
    """Per pack, (ids, mask) of its documents, by plain slicing."""
    found = []
    for ids, mask, seq_lens, slots, *_ in rows:
        at, pack = 0, []
        for n, slot in zip(seq_lens.tolist(), slots.tolist(), strict=True):
            pack.append((ids[at : at + n].tolist(), mask[at : at + n].tolist()))
            at += slot
        found.append(pack)
    return found


@pytest.fixture(scope="session")
def converted(packed, tmp_path_factory):
    made = {}

    def convert(to: str, source: Path = packed) -> Path:
        if (to, source) not in made:
            out = tmp_path_factory.mktemp("converted") / to
            result = CliRunner().invoke(main, ["convert", str(source), "--to", to, "--out", str(out)])
            assert result.exit_code == 0, result.output
            assert not list(out.parent.glob("*.unfinished"))
            made[to, source] = out
        return made[to, source]

    return convert
