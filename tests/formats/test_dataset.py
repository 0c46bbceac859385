"""Shards, manifest and index: what is written comes back, views are read-only, damage is named."""

import dataclasses
import io
import json
import random
import subprocess
import sys
import threading
from pathlib import Path

import datasets
import numpy as np
import pytest

from formats.dataset import PackedDataset, SeqIdPack, ThdPack
from formats.layout import seqid_to_thd
from formats.manifest import fingerprint, read_manifest, write_manifest
from formats.schema import METADATA_KEY
from formats.shard import FileEntry, Shard, atomic_write, file_digest
from make_shards import make_shards, random_packs

CAPACITY = 48


@pytest.fixture
def rows():
    return random_packs(np.random.default_rng(7), 13, CAPACITY, 4, 100)


@pytest.fixture
def folder(tmp_path, rows):
    return make_shards(tmp_path / "packed", rows, capacity=CAPACITY, align=4, cp=2)


def test_rows_come_back_as_written(folder, rows):
    dataset = PackedDataset(folder)
    assert len(dataset) == len(rows) == 13
    for i, row in enumerate(rows):
        pack = dataset[i]
        assert isinstance(pack, ThdPack)
        for got, wanted in zip(pack, row, strict=True):
            assert got.dtype == wanted.dtype
            np.testing.assert_array_equal(got, wanted)
        dataset.check(i)
    with pytest.raises(IndexError):
        dataset[13]


def test_views_are_zero_copy_and_read_only(folder):
    pack = PackedDataset(folder)[3]
    for array in pack:
        assert not array.flags.owndata
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


@pytest.fixture
def quick_switches():
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_threads_that_come_at_once_get_the_same_places(folder, quick_switches):
    """A place is an address: it must not be that of a table, or of a map, that another thread's has replaced."""
    for _ in range(20):
        dataset, found = PackedDataset(folder), []
        start = threading.Barrier(4)

        def look(dataset=dataset, found=found, start=start):
            start.wait()
            found.append([dataset.place(i) for i in reversed(range(len(dataset)))])

        threads = [threading.Thread(target=look) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [[dataset.place(i) for i in reversed(range(len(dataset)))]] * 4


def test_opening_and_reading_loads_no_pandas(folder):
    """Its import takes longer than all else from opening to the first batch, on every rank."""
    code = f"import sys; from formats.dataset import PackedDataset; PackedDataset({str(folder)!r})[0]; "
    code += "sys.exit('pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


def test_sequence_id_shards_hold_the_same_packs(tmp_path, rows):
    dataset = PackedDataset(make_shards(tmp_path / "s", rows, capacity=CAPACITY, align=4, kind="seqid"))
    for i, row in enumerate(rows):
        pack = dataset[i]
        assert isinstance(pack, SeqIdPack)
        assert len(pack.input_ids) == CAPACITY
        back = seqid_to_thd(pack.input_ids, pack.attention_mask, pack.labels, align=4)
        for got, wanted in zip((*back, pack.doc_ids, pack.doc_offsets), row, strict=True):
            np.testing.assert_array_equal(got, wanted)
        dataset.check(i)


def test_hugging_face_datasets_opens_the_shards(folder, rows, tmp_path):
    files = sorted(str(p) for p in (folder / "shards").iterdir())
    table = datasets.load_dataset("arrow", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert table.num_rows == len(rows)
    assert table[4]["input_ids"] == rows[4][0].tolist()
    assert table[4]["seq_lens"] == rows[4][2].tolist()


def test_essentials_stand_in_every_shard(folder):
    essentials = Shard(folder / "shards" / "00001.arrow", "thd").essentials
    assert essentials == {"align": 4, "capacity": CAPACITY, "format_version": 1, "kind": "thd"}
    assert METADATA_KEY == b"meshpack"


def test_files_are_listed_with_their_checksums(folder):
    manifest = read_manifest(folder)
    on_disk = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {"manifest.json"}
    assert {entry.name for entry in manifest.files} == on_disk
    for entry in manifest.files:
        assert file_digest(folder / entry.name) == entry.xxh3_128


def test_the_same_rows_give_the_same_bytes_and_resharding_keeps_the_fingerprint(tmp_path, rows, folder):
    again = make_shards(tmp_path / "again", rows, capacity=CAPACITY, align=4, cp=2)
    assert (again / "manifest.json").read_bytes() == (folder / "manifest.json").read_bytes()
    other = make_shards(tmp_path / "other", rows, capacity=CAPACITY, align=4, cp=2, shard_packs=3, batch_packs=3)
    assert read_manifest(other).fingerprint == read_manifest(folder).fingerprint
    swapped = make_shards(tmp_path / "swapped", [rows[1], rows[0], *rows[2:]], capacity=CAPACITY, align=4, cp=2)
    assert read_manifest(swapped).fingerprint != read_manifest(folder).fingerprint


def test_any_flipped_bit_of_a_pack_is_found(folder):
    shard = folder / "shards" / "00001.arrow"
    dataset = PackedDataset(folder)
    whole = shard.read_bytes()
    ids = dataset[6].input_ids.tobytes()
    at = whole.index(ids)
    damaged = bytearray(whole)
    damaged[at + 5] ^= 16
    shard.write_bytes(damaged)
    reopened = PackedDataset(folder)
    reopened.check(5)
    with pytest.raises(ValueError, match=r"00001\.arrow: row 1 \(pack 6\) is damaged"):
        reopened.check(6)


def test_every_file_is_compared_with_its_checksum(folder):
    PackedDataset(folder).check_files()
    for name in ("shards/00000.arrow", "shards/00001.arrow"):
        path = folder / name
        whole = path.read_bytes()
        middle = len(whole) // 2  # data, not the footer that opening reads
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
        damaged = PackedDataset(folder)
        found = [part for part in range(3) if _damage(damaged, part, 3)]
        assert len(found) == 1
        with pytest.raises(ValueError, match=rf"{name}: damaged"):
            damaged.check_files()
        path.write_bytes(whole)


def _damage(dataset, part, parts):
    try:
        dataset.check_files(part, parts)
    except ValueError:
        return True
    return False


def test_a_document_store_is_told_from_shards(tmp_path):
    (tmp_path / "store.json").write_text("{}")
    with pytest.raises(ValueError, match="a document store and no packed shards; make some: prep pack"):
        PackedDataset(tmp_path)


def test_a_missing_manifest_means_unfinished(folder):
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"unfinished.*prep pack --resume"):
        PackedDataset(folder)


def test_the_fingerprint_is_of_all_that_decides_the_rows():
    digests = np.arange(5, dtype=np.uint64)
    facts = {"kind": "thd", "capacity": 64, "align": 4}
    found = {fingerprint(digests, **facts), fingerprint(digests[::-1], **facts), fingerprint(digests[:4], **facts)}
    for change in ({"kind": "seqid"}, {"capacity": 128}, {"align": 8}, {"capacity": 6, "align": 44}):
        found.add(fingerprint(digests, **{**facts, **change}))
    assert len(found) == 7
    assert fingerprint(digests.copy(), **facts) in found


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        PackedDataset(tmp_path / "nowhere")


def test_a_folder_of_splits_names_them(folder):
    folder.rename(folder.parent / "train")
    with pytest.raises(ValueError, match="holds the packed folders train; name one"):
        PackedDataset(folder.parent)


def edit(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_an_edited_manifest_is_refused(folder):
    edit(folder, capacity=64)
    with pytest.raises(ValueError, match="edited or damaged"):
        read_manifest(folder)


@pytest.mark.parametrize("version", [0, 99])
def test_another_format_version_is_refused(folder, version):
    edit(folder, format_version=version)
    with pytest.raises(ValueError, match=f"format version {version}, but this meshpack reads version 1"):
        read_manifest(folder)


def test_a_manifest_of_fewer_packs_is_refused(tmp_path, rows):
    """One that another program wrote, with a hash that fits."""
    folder = make_shards(tmp_path / "p", rows, capacity=CAPACITY)
    manifest = read_manifest(folder)
    totals = {**manifest.totals, "packs": len(rows) - 1}
    write_manifest(folder, dataclasses.replace(manifest, totals=totals))
    with pytest.raises(ValueError, match=rf"packs\.arrow: {len(rows)} packs, but the manifest says {len(rows) - 1}"):
        PackedDataset(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", "nonsense", '{"format_version": 1}'])
def test_what_is_no_manifest_is_refused(folder, text):
    (folder / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match="not a manifest"):
        read_manifest(folder)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "shards/../../x", "shards//x", "a\\b"])
def test_file_names_cannot_leave_the_folder(tmp_path, rows, name):
    folder = make_shards(tmp_path / "p", rows, capacity=CAPACITY, files=(FileEntry(name, 1, "x"),))
    with pytest.raises(ValueError, match="leaves the folder"):
        read_manifest(folder)


def test_packs_open_without_their_reports(tmp_path, rows):
    """They are for people, who may take them along or lose them."""
    reports = FileEntry("report.json", 100, "x"), FileEntry("report.html", 100, "x")
    folder = make_shards(tmp_path / "p", rows, capacity=CAPACITY)
    manifest = read_manifest(folder)
    write_manifest(folder, dataclasses.replace(manifest, files=(*manifest.files, *reports)))
    (folder / "report.json").write_text("shorter")
    assert len(PackedDataset(folder)) == len(rows)


def test_a_truncated_or_missing_shard_is_named_at_open(folder):
    shard = folder / "shards" / "00002.arrow"
    data = shard.read_bytes()
    shard.write_bytes(data[:-8])
    with pytest.raises(ValueError, match=r"00002\.arrow: \d+ bytes, but the manifest says"):
        PackedDataset(folder)
    shard.unlink()
    with pytest.raises(ValueError, match=r"00002\.arrow: missing"):
        PackedDataset(folder)


def test_a_damaged_header_never_leads_out_of_the_file(folder):
    """It says where the arrays lie; reading one that ends behind the map would end the process."""
    shard = folder / "shards" / "00000.arrow"
    data, refused = shard.read_bytes(), 0
    header = data.index(b"\xff\xff\xff\xff", 12)  # of the first record batch, behind the schema's
    for place in range(header + 4, header + 600):
        shard.write_bytes(data[:place] + bytes([data[place] ^ 8]) + data[place + 1 :])
        try:
            batches = list(Shard(shard, "thd").batches())
        except ValueError:
            refused += 1
            continue
        for column in (column for batch in batches for column in batch.values()):
            assert 0 <= column.offsets[0] <= column.offsets[-1] <= len(column.values)
    assert refused > 20


def test_a_shard_that_is_no_arrow_file_is_named(folder):
    shard = folder / "shards" / "00000.arrow"
    shard.write_bytes(b"\0" * shard.stat().st_size)
    with pytest.raises(ValueError, match=r"00000\.arrow: not a readable Arrow file"):
        PackedDataset(folder)[0]


def test_pieces_of_any_size_come_in_order_with_their_checksum(tmp_path):
    """Small pieces are joined before they are written; neither order, size nor checksum may show it."""
    rng = np.random.default_rng(3)
    pieces = [rng.bytes(int(n)) for n in rng.choice([0, 1, 4, 700, 65_535, 65_536, 200_000], 60)]
    with atomic_write(tmp_path / "file") as file:
        for n, piece in enumerate(pieces):
            assert file.tell() == sum(map(len, pieces[:n]))
            file.write(piece)
    whole = b"".join(pieces)
    assert (tmp_path / "file").read_bytes() == whole
    assert (file.bytes, file.hexdigest()) == (len(whole), file_digest(tmp_path / "file"))


def test_a_failed_write_leaves_nothing(tmp_path):
    target = tmp_path / "file"
    with pytest.raises(RuntimeError), atomic_write(target) as file:
        file.write(b"half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with atomic_write(target) as file:
        file.write(b"whole")
    assert target.read_bytes() == b"whole"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_system_that_takes_less_than_it_is_given_gets_the_rest(tmp_path, monkeypatch):
    """write(2) takes 2 GiB at most, and what is left of a disk that fills up."""

    class Slow(io.FileIO):
        def write(self, data):
            return super().write(data[:50_000])

    data = np.random.default_rng(0).bytes(200_000)
    monkeypatch.setattr("formats.shard.open", lambda path, mode, buffering: Slow(path, mode), raising=False)
    with atomic_write(tmp_path / "file") as file:
        file.write(data)
    assert (tmp_path / "file").read_bytes() == data


def test_a_failed_replacement_keeps_the_old_file(tmp_path):
    target = tmp_path / "file"
    target.write_bytes(b"old")
    with pytest.raises(RuntimeError), atomic_write(target) as file:
        file.write(b"new")
        raise RuntimeError
    assert target.read_bytes() == b"old"


def contents(folder):
    """All that a reader takes from a folder, each pack compared with its hash first."""
    dataset = PackedDataset(folder)
    packs = []
    for i in range(len(dataset)):
        dataset.check(i)
        packs.append([column.tobytes() for column in dataset[i]])
    index = dataset.index
    columns = [index.shard, index.row, index.documents, index.tokens, index.target_tokens, index.max_seqlen]
    return packs, [c.tobytes() for c in (*columns, index.sum_sq, index.xxh3, *map(index.padded, (2, 16, 128)))]


@pytest.mark.parametrize("kind", ["thd", "seqid"])
def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path, rows, kind):
    """Anywhere in any file: a reader that compares packs with their hashes (the trainer's default) sees what was
    written, or a sentence that names the file. Bytes that mean nothing (Arrow's alignment) may be damaged unseen, but
    not by a reader that compares whole files."""
    folder = make_shards(tmp_path / "packed", rows, capacity=CAPACITY, align=4, cp=2, kind=kind)
    truth, draw, unseen = contents(folder), random.Random(3), 0
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files * 40:
        whole = path.read_bytes()
        bit = draw.randrange(8 * len(whole))
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            found = contents(folder)
        except ValueError as error:
            refusal = str(error)
        else:
            assert found == truth, f"bit {bit} of {path.name}"
            unseen += 1
            with pytest.raises(ValueError) as caught:  # noqa: PT011 (the name is asserted below)
                PackedDataset(folder).check_files()
            refusal = str(caught.value)
        assert path.name in refusal, f"bit {bit} of {path.name}: {refusal}"
        path.write_bytes(whole)
    assert contents(folder) == truth
    assert 0 < unseen < len(files) * 20


def test_shards_swapped_or_too_many_are_refused(folder):
    first, second = sorted((folder / "shards").iterdir())[:2]
    (folder / "shards" / "00999.arrow").write_bytes(first.read_bytes())
    with pytest.raises(ValueError, match=r"00999\.arrow: not part of these shards"):
        PackedDataset(folder)
    (folder / "shards" / "00999.arrow").unlink()
    held = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(held)
    with pytest.raises(ValueError, match=r"0000[01]\.arrow"):
        contents(folder)
