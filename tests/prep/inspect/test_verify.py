"""`prep verify` finds and names every kind of damage; the trainer's own reader refuses it too, as far as it looks."""

import json
import random
import re
import shutil

import numpy as np
import pytest
from packing_runs import run

from formats.dataset import PackedDataset
from formats.manifest import _own_hash, read_manifest
from formats.shard import json_bytes
from prep.inspect.deep import check_packs
from prep.inspect.verify import verify

FLIPS = 150


def files(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file())


def test_a_sound_folder_passes(sound):
    for deep in (False, True):
        verdict = verify(sound, deep=deep)
        assert verdict.problems == []
    assert {p.name for p in files(sound)} >= {
        "manifest.json",
        "packs.arrow",
        "ledger.json",
        "report.json",
        "report.html",
    }
    result = run("verify", sound, "--deep")
    assert result.exit_code == 0
    assert "sound" in result.output
    assert json.loads(run("verify", sound, "--json").output)[str(sound)]["problems"] == []


def test_one_flipped_bit_anywhere_is_found_and_named(copy):
    """A bit in every file, and `FLIPS` more anywhere, large files no likelier than small ones."""
    draw = random.Random(5)
    everywhere = files(copy)
    for path in everywhere + draw.choices(everywhere, k=FLIPS):
        data = path.read_bytes()
        bit = draw.randrange(8 * len(data))
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        verdict = verify(copy)
        assert verdict.problems, f"bit {bit} of {path.name} is not noticed"
        assert any(path.name in problem for problem in verdict.problems), (path, verdict.problems)
        path.write_bytes(data)
    assert verify(copy).problems == []


def shards(folder):
    return sorted((folder / "shards").iterdir())


def damage_missing(folder):
    shards(folder)[1].unlink()
    return "00001.arrow: missing"


def damage_truncated(folder):
    path = shards(folder)[1]
    path.write_bytes(path.read_bytes()[:-100])
    return "00001.arrow: has"


def damage_swapped(folder):
    first, second = shards(folder)[:2]
    held = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(held)
    return "00000.arrow"


def damage_extra(folder):
    shutil.copy(shards(folder)[0], folder / "shards" / "00999.arrow")
    return "00999.arrow: not part of these shards"


def damage_left_over(folder):
    (folder / "shards" / "00001.arrow.tmp").write_bytes(b"half")
    return "left by an interrupted run"


def damage_edited_manifest(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    return "manifest.json: was edited or damaged"


def forge(folder, change):
    """Edit the manifest with a right hash of its own: only its content can give it away."""
    path = folder / "manifest.json"
    value = json.loads(path.read_text())
    change(value)
    value.pop("hash")
    path.write_bytes(json_bytes({**value, "hash": _own_hash(value)}))


def damage_manifest_without_its_last_byte(folder):
    path = folder / "manifest.json"
    path.write_bytes(path.read_bytes()[:-1])
    return "manifest.json: was edited or damaged"


def damage_path_outside(folder):
    forge(folder, lambda m: m["files"][0].update(name="../out/shards/00000.arrow"))
    return "leaves the folder"


def damage_version(folder):
    forge(folder, lambda m: m.update(format_version=2))
    return "format version 2"


def damage_totals(folder):
    forge(folder, lambda m: m["totals"].update(tokens=m["totals"]["tokens"] + 1))
    return "the manifest says"


def damage_fingerprint(folder):
    forge(folder, lambda m: m.update(fingerprint="0" * 32))
    return "the fingerprint is not that of packs.arrow"


def damage_ledger_sum(folder):
    path = folder / "ledger.json"
    value = json.loads(path.read_text())
    for account in (*value["sources"].values(), value["total"]):
        account["kept"]["tokens"] += 1
    data = json.dumps(value).encode()
    path.write_bytes(data)
    relist(folder, "ledger.json")
    return "does not agree"


def change_ledger(folder, change):
    path = folder / "ledger.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
    relist(folder, "ledger.json")


def damage_ledger_total(folder):
    change_ledger(folder, lambda value: value["total"]["read"].update(tokens=1))
    return "ledger.json: its total is not the sum of its sources"


def damage_ledger_of_more_documents(folder):
    def change(value):
        for account in (*value["sources"].values(), value["total"]):
            for book in ("read", "kept"):
                account[book]["documents"] += 1

    change_ledger(folder, change)
    return "ledger.json: keeps 151 documents, the shards hold 150"


def damage_shards_in_another_order(folder):
    first, second = shards(folder)[:2]
    aside = first.rename(folder / "aside")
    second.rename(first)
    aside.rename(second)
    for path in (first, second):
        relist(folder, f"shards/{path.name}")
    return "shards/00000.arrow: says shard 1, the manifest 0"


def damage_ledger_that_is_no_json(folder):
    (folder / "ledger.json").write_text("{")
    relist(folder, "ledger.json")
    return "ledger.json: not readable as JSON"


def damage_ledger_of_something_else(folder):
    (folder / "ledger.json").write_text("[1]")
    relist(folder, "ledger.json")
    return "ledger.json: is not a ledger"


def damage_unlisted_index(folder):
    forge(folder, lambda m: m.update(files=[e for e in m["files"] if e["name"] != "packs.arrow"]))
    return "lists no packs.arrow"


def damage_link(folder):
    path = shards(folder)[0]
    outside = folder.parent / "outside.arrow"
    path.rename(outside)
    path.symlink_to(outside)
    return "leads out of the folder"


def relist(folder, name):
    """Make the manifest agree with a changed file."""
    from formats.shard import file_digest

    path = folder / name
    entry = {"name": name, "bytes": path.stat().st_size, "xxh3_128": file_digest(path)}
    forge(folder, lambda m: m.update(files=[entry if e["name"] == name else e for e in m["files"]]))


DAMAGES = [value for name, value in globals().items() if name.startswith("damage_")]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__.removeprefix("damage_"))
def test_damage_is_found_and_named(copy, damage):
    message = damage(copy)
    verdict = verify(copy)
    assert any(message in problem for problem in verdict.problems), verdict.problems
    result = run("verify", copy)
    assert result.exit_code == 1
    assert result.output.count("Error: ") == len(verdict.problems)
    assert "Traceback" not in result.output


@pytest.mark.parametrize("column", ["input_ids", "loss_mask", "seq_lens", "labels", "position_ids", "attention_mask"])
def test_deep_finds_what_a_forger_made_consistent(copy, column):
    """A value changed inside a shard, with checksum, index and fingerprint made to fit: only the row gives it away."""
    import pyarrow as pa

    from formats.manifest import fingerprint
    from formats.shard import Shard, pack_digest

    path = shards(copy)[0]
    with pa.OSFile(str(path)) as file:
        reader = pa.ipc.open_file(file)
        schema, batches = reader.schema, [reader.get_batch(i) for i in range(reader.num_record_batches)]
    if column not in schema.names:
        pytest.skip("not a column of this kind")
    values = batches[0].column(column).values.to_numpy().copy()
    if column == "loss_mask":
        values[0] = 1
    elif column == "labels":
        values[0] = batches[0].column("input_ids").values[0].as_py()  # the first token of a document
    elif column == "input_ids":
        values[1] = -3
    else:
        values[1] += 1
    field = schema.field(column)
    arrays = [batches[0].column(c) for c in range(batches[0].num_columns)]
    offsets = arrays[schema.get_field_index(column)].offsets
    arrays[schema.get_field_index(column)] = pa.ListArray.from_arrays(offsets, pa.array(values, field.type.value_type))
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        for batch in [pa.RecordBatch.from_arrays(arrays, schema=schema), *batches[1:]]:
            writer.write_batch(batch)
    with pa.OSFile(str(copy / "packs.arrow")) as file:
        index = pa.ipc.open_file(file).read_all()
    digests = index["xxh3"].to_numpy().copy()
    digests[0] = pack_digest(Shard(path, read_manifest(copy).kind).row(0))
    index = index.set_column(index.schema.get_field_index("xxh3"), index.schema.field("xxh3"), pa.array(digests))
    with pa.OSFile(str(copy / "packs.arrow"), "wb") as file, pa.ipc.new_file(file, index.schema) as writer:
        writer.write_table(index)
    m = read_manifest(copy)
    for name in ("shards/00000.arrow", "packs.arrow"):
        relist(copy, name)
    forge(copy, lambda v: v.update(fingerprint=fingerprint(digests, kind=m.kind, capacity=m.capacity, align=m.align)))
    assert verify(copy).problems == []
    problems = verify(copy, deep=True).problems
    assert problems
    assert "pack 0 (shard 0, row 0)" in problems[0] or "pack 0" in problems[0]


def test_any_number_of_workers_says_the_same(copy):
    """Packs swapped between shards, a document twice, and a hash that is wrong, all made to fit what lies around them:
    named in the same words and order by one process and by two."""
    import pyarrow as pa

    assert run("verify", copy, "--deep", "--workers", 2).exit_code == 0
    path = copy / "packs.arrow"
    with pa.OSFile(str(path)) as file:
        index = pa.ipc.open_file(file).read_all()
    columns = {name: index[name].to_numpy().copy() for name in index.schema.names}
    last = len(index) - 1
    columns["xxh3"][[1, last]] ^= np.uint64(1)
    columns["row"][[2, 3]] = columns["row"][[3, 2]]  # two packs of one shard, each in the other's place
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, index.schema) as writer:
        writer.write_table(pa.table({n: pa.array(v) for n, v in columns.items()}, schema=index.schema))
    relist(copy, "packs.arrow")
    alone, shared = (run("verify", copy, "--deep", "--workers", n) for n in (1, 2))
    assert alone.exit_code == shared.exit_code == 1
    assert alone.output == shared.output
    named = [int(n) for n in re.findall(r"pack (\d+) \(shard \d+, row \d+\): its hash", alone.output)]
    assert named == [1, 2, 3, last]


def test_a_document_in_two_packs_is_found_wherever_they_lie(tmp_path):
    """The second of two packs is named, in the same shard and in another; and which, not how often, with many."""
    from make_shards import make_shards, random_packs

    rows = random_packs(np.random.default_rng(0), 40, 64, 1, 50)
    again = {3: 2, 9: 1, 39: 0}  # 39 lies in another shard than 0
    for n, of in again.items():
        doc_ids, offsets = rows[n][4].copy(), rows[n][5].copy()
        doc_ids[-1], offsets[-1] = rows[of][4][0], rows[of][5][0]
        rows[n] = (*rows[n][:4], doc_ids, offsets)
    folder = make_shards(tmp_path / "s", rows, capacity=64, shard_packs=5)
    for workers in (1, 2):
        problems = check_packs(folder, read_manifest(folder), workers)
        twice = [p for p in problems if "already packed elsewhere" in p]
        assert [int(re.search(r"pack (\d+)", p)[1]) for p in twice] == sorted(again)


def test_the_reader_refuses_a_damaged_pack(copy):
    dataset = PackedDataset(copy)
    name = shards(copy)[0]
    data = bytearray(name.read_bytes())
    at = data.find(np.ascontiguousarray(dataset[0].input_ids).tobytes()[:64])
    del dataset
    data[at + 5] ^= 1
    name.write_bytes(data)
    with pytest.raises(ValueError, match=r"row 0 \(pack 0\) is damaged"):
        PackedDataset(copy).check(0)
