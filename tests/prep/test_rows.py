"""The kernels that lay packs out, against plain slicing and against the layout functions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.layout import align_up, check_thd, thd_to_seqid
from formats.shard import write_json
from prep.encode.store import STORE_VERSION, DocumentStore, UnitWriter, source_ranges, store_content
from prep.ledger import Ledger
from prep.materialize import Layout, materialize
from prep.plan import PackOptions, make_plan
from prep.rows import buffers, gather, locate, sequence_rows

PAD = 7


def make_store(folder, lengths, units=3, seed=0):
    """A finished store of random documents over several units and record batches."""
    rng = np.random.default_rng(seed)
    (folder / "units").mkdir(parents=True)
    ledger, results = Ledger(), []
    for number, part in enumerate(np.array_split(np.asarray(lengths), units)):
        unit_ledger = Ledger()
        with UnitWriter(folder, number, "source") as writer:
            for batch in np.array_split(part, 2):
                offsets = np.append(0, np.cumsum(batch)).astype(np.int64)
                ids = rng.integers(0, 100, offsets[-1], np.int32)
                writer.write(ids, rng.integers(0, 2, offsets[-1], np.uint8), offsets)
        unit_ledger.read("source", len(part), int(part.sum()))
        unit_ledger.keep("source", len(part), int(part.sum()))
        results.append(writer.finish(unit_ledger))
        ledger.merge(unit_ledger)
    facts = dict(store_version=STORE_VERSION, inputs=[], options={}, packages={}, engine="hf", pad_id=PAD, bos_id=None)
    facts |= dict(tokenizer_hash="t", template_hash="t", vocab_size=100, eos_id=None)
    write_json(folder / "store.json", store_content(facts, results, ledger, source_ranges(["source"], [len(lengths)])))
    return DocumentStore.open(folder)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("rows") / "store", np.random.default_rng(1).integers(1, 30, 50))


def lay_out(store, packs, align):
    """(ids, mask, length, slots, slot_starts, offsets, targets, checks) of packs of (doc, start, length) pieces."""
    pieces = [p for pack in packs for p in pack]
    doc, start, length = (np.array(column) for column in zip(*pieces, strict=True))
    offsets = np.append(0, np.cumsum([len(p) for p in packs])).astype(np.int64)
    length = length.astype(np.int32)
    slots = align_up(length, align)
    slot_starts = np.append(0, np.cumsum(slots)).astype(np.int64)
    ids, mask = np.full(slot_starts[-1], -9, np.int32), np.full(slot_starts[-1], 9, np.uint8)
    targets = np.empty(len(packs), np.int32)
    *places, beyond = locate(*buffers(store), doc, start, length)
    checks = (*gather(*places, length, slot_starts, offsets, PAD, ids, mask, targets), beyond)
    return ids, mask, length, slots, slot_starts, offsets, targets, checks


@settings(max_examples=60, deadline=None)
@given(data=st.data(), align=st.sampled_from([1, 2, 8]))
def test_gather_and_sequence_rows(store, data, align):
    packs = []
    for _ in range(data.draw(st.integers(1, 4))):
        pack = []
        for doc in data.draw(st.lists(st.integers(0, len(store) - 1), min_size=1, max_size=6)):
            start = data.draw(st.integers(0, int(store.lengths[doc]) - 1))
            pack.append((doc, start, data.draw(st.integers(1, int(store.lengths[doc]) - start))))
        packs.append(pack)
    ids, mask, length, slots, slot_starts, offsets, targets, checks = lay_out(store, packs, align)
    assert checks[3] == 0
    expected_ids, expected_mask = [], []
    for doc, start, n in (p for pack in packs for p in pack):
        document_ids, document_mask = store.document(doc)
        padding = -n % align
        expected_ids += [*document_ids[start : start + n].tolist(), *[PAD] * padding]
        expected_mask += [0, *document_mask[start + 1 : start + n].tolist(), *[0] * padding]
    assert ids.tolist() == expected_ids
    assert mask.tolist() == expected_mask
    assert checks[:3] == (min(expected_ids), max(expected_ids), max(expected_mask))

    capacity = 6 * 32 + 8
    columns = [np.full(len(packs) * capacity, -5, np.int32) for _ in range(4)]
    sequence_rows(ids, mask, length, slot_starts, offsets, PAD, capacity, *columns)
    for n in range(len(packs)):
        tokens, of_pack = slice(*slot_starts[offsets[n : n + 2]]), slice(*offsets[n : n + 2])
        row = (ids[tokens], mask[tokens], length[of_pack], slots[of_pack])
        check_thd(*row, capacity=capacity, align=align)
        assert targets[n] == row[1].sum()
        expected = thd_to_seqid(*row, capacity=capacity, pad_id=PAD)
        for column, want in zip(columns, expected, strict=True):
            np.testing.assert_array_equal(column[n * capacity : (n + 1) * capacity], want)


def test_a_piece_beyond_its_document_is_counted_and_not_read(store):
    n = int(store.lengths[4])
    *_, checks = lay_out(store, [[(4, 0, n)], [(4, 1, n)]], 1)
    assert checks[3] == 1


@pytest.mark.parametrize("damage", ["id", "mask"])
def test_a_damaged_store_is_refused_and_leaves_no_shard(tmp_path, damage):
    made = make_store(tmp_path / "store", np.full(40, 20))
    unit = tmp_path / "store" / "units" / "00001.arrow"
    data = bytearray(unit.read_bytes())
    ids, mask, _ = made.batches[2]
    wanted, bad = (ids[:8], np.int32(10**6)) if damage == "id" else (mask[:16], np.uint8(3))
    at = data.find(wanted.tobytes())
    data[at + 4 : at + 4 + bad.nbytes] = bad.tobytes()
    del made, ids, mask, wanted
    unit.write_bytes(data)
    opened = DocumentStore.open(tmp_path / "store")
    plan = make_plan(opened.lengths, np.arange(40), PackOptions(64))
    layout = Layout("thd", 64, 1, PAD, opened.info.largest_id)
    with pytest.raises(ValueError, match="the store is damaged"):
        materialize(plan, opened, tmp_path / "out", layout, essentials={}, shard_packs=100, workers=1)
    assert list((tmp_path / "out" / "shards").iterdir()) == []


def test_a_plan_of_longer_documents_than_the_store_has_is_refused(tmp_path):
    opened = make_store(tmp_path / "store", np.full(40, 20))
    plan = make_plan(opened.lengths + 1, np.arange(40), PackOptions(64))
    layout = Layout("thd", 64, 1, PAD, opened.info.largest_id)
    with pytest.raises(ValueError, match=r"the store is damaged \(40 documents shorter than planned\)"):
        materialize(plan, opened, tmp_path / "out", layout, essentials={}, shard_packs=100, workers=1)
    assert list((tmp_path / "out" / "shards").iterdir()) == []
