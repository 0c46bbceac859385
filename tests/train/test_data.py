"""The loader: what a row holds against a document-by-document construction, and who trains which pack."""

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from byte_tokenizer import write_byte_tokenizer
from formats.dataset import PackedDataset
from formats.order import EMPTY, Stream
from make_shards import make_shards, random_packs
from prep.cli import main as prep
from train.cut import Cut
from train.data import PackedLoader, Schedule, open_shards
from train.fill import BLOCK
from train.row import TAIL_SEGMENT, Run

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=[1, 4])
def shards(request, tmp_path_factory):
    rows = random_packs(np.random.default_rng(3), 11, 400, request.param, 50)
    folder = make_shards(tmp_path_factory.mktemp("data") / "s", rows, capacity=400, align=request.param, pad_id=7)
    return folder


def schedule(dataset, batch_packs=4, micro_packs=2, seed=5):
    return Schedule(len(dataset), "shuffle", 0, seed, batch_packs, micro_packs)


def expected_row(dataset, packs):
    """The row of `packs`, made one token at a time from the contract: ids, labels, positions, segment lengths."""
    capacity, pad = dataset.manifest.capacity, dataset.manifest.pad_id
    ids, labels, positions, segments = [], [], [], []
    for number in packs:
        used = 0
        if number != EMPTY:
            pack, start = dataset[number], 0
            for real, slot in zip(pack.seq_lens.tolist(), pack.seq_lens_padded.tolist(), strict=True):
                for i in range(slot):
                    ids.append(int(pack.input_ids[start + i]))
                    positions.append(i)
                    trained = i + 1 < real and pack.loss_mask[start + i + 1]
                    labels.append(int(pack.input_ids[start + i + 1]) if trained else -100)
                segments.append(slot)
                start += slot
            used = start
        left = capacity - used
        while left:
            piece = min(left, TAIL_SEGMENT)
            ids += [pad] * piece
            labels += [-100] * piece
            positions += range(piece)
            segments.append(piece)
            left -= piece
    return ids, labels, positions, segments


@pytest.mark.parametrize(("dp_rank", "dp_size"), [(0, 1), (0, 3), (2, 3)])
def test_rows_equal_the_documents_one_token_at_a_time(shards, dp_rank, dp_size):
    dataset = open_shards(shards)
    plan = schedule(dataset)
    loader = PackedLoader(dataset, plan, dp_rank=dp_rank, dp_size=dp_size, device=CPU)
    shapes = set()
    for consumed in (0, 4, 8, 11, 15, 19, 22):
        facts = loader.next_step()
        epoch, start = divmod(consumed, 11)
        order = plan.epoch_order(epoch)
        mine = plan.rank_packs(start, min(start + 4, 11), order, dp_rank, dp_size)
        for row, packs in zip(loader.rows(), mine, strict=True):
            ids, labels, positions, segments = expected_row(dataset, packs.tolist())
            assert row.input_ids.tolist() == ids
            assert row.labels.tolist() == labels
            assert row.position_ids.tolist() == positions
            ends = np.cumsum([0, *segments]).tolist()
            cu_seqlens = row.segments.cu_seqlens.tolist()
            assert cu_seqlens == ends + [len(ids)] * (len(cu_seqlens) - len(ends))
            assert row.segments.max_seqlen >= max(segments)
            shapes.add((row.input_ids.shape, row.segments.cu_seqlens.shape))
        whole = order[start : start + 4]
        assert facts.epoch == epoch
        assert facts.consumed == epoch * 11 + min(start + 4, 11)
        assert facts.tokens == sum(int(dataset[i].seq_lens.sum()) for i in whole)
        assert facts.target_tokens == sum(int(dataset[i].loss_mask.sum()) for i in whole)
        assert facts.sum_sq == sum(int((dataset[i].seq_lens.astype(np.int64) ** 2).sum()) for i in whole)
        positions = mine.size * dp_size * 400
        assert facts.padding_fraction == pytest.approx(1 - facts.tokens / positions)
    assert len(shapes) == 1, "shapes must never change"
    loader.close()


@pytest.mark.parametrize("cut", [Cut(), Cut(3, 0), Cut(3, 1), Cut(3, 2)], ids=["whole", "first", "second", "third"])
def test_rows_longer_than_a_block_of_the_copy(tmp_path, cut):
    """Ids and labels are copied block by block: a label looks over the end of a block, and of a rank's part."""
    rows = random_packs(np.random.default_rng(2), 3, 5 * BLOCK + 40, 1, 50_000, max_docs=6)
    dataset = open_shards(make_shards(tmp_path / "s", rows, capacity=5 * BLOCK + 40, order="input", pad_id=7))
    ids, labels, positions = [], [], []
    for number in range(3):
        of_pack = expected_row(dataset, [number])
        ids, labels, positions = ids + of_pack[0], labels + of_pack[1], positions + of_pack[2]
    loader = PackedLoader(dataset, Schedule(3, "input", 0, 0, 3, 3), dp_rank=0, dp_size=1, device=CPU, cut=cut)
    loader.next_step()
    (row,) = loader.rows()
    mine = slice(cut.rank * len(ids) // cut.size, (cut.rank + 1) * len(ids) // cut.size)
    assert row.input_ids.tolist() == ids[mine]
    assert row.labels.tolist() == labels[mine]
    real = torch.tensor(ids[mine]) != 7  # padding is cut otherwise for three ranks
    assert torch.equal(row.position_ids[real], torch.tensor(positions[mine], dtype=torch.int32)[real])
    loader.close()


def test_a_loader_that_starts_later_continues_exactly(shards):
    dataset = open_shards(shards)

    def rows(consumed, steps):
        loader = PackedLoader(dataset, schedule(dataset), dp_rank=1, dp_size=2, device=CPU, consumed=consumed)
        seen = []
        for _ in range(steps):
            loader.next_step()
            seen += [row.input_ids.clone() for row in loader.rows()]
        loader.close()
        return seen

    straight, resumed = rows(0, 6), rows(11, 3)
    assert all(torch.equal(a, b) for a, b in zip(straight[3:], resumed, strict=True))


@pytest.mark.parametrize("micro_packs", [1, 2, 3])
@pytest.mark.parametrize("dp_size", range(1, 9))
@pytest.mark.parametrize(("num_packs", "order", "block"), [(1, "input", 0), (23, "shuffle", 0), (24, "cost", 5)])
def test_an_epoch_trains_each_pack_exactly_once_on_any_number_of_ranks(num_packs, order, block, dp_size, micro_packs):
    plan = Schedule(num_packs, order, block, 9, 6, micro_packs)
    for epoch in range(2):
        ids = plan.epoch_order(epoch)
        seen, per_step = [], []
        for start in range(0, num_packs, 6):
            stop = min(start + 6, num_packs)
            dealt = [plan.rank_packs(start, stop, ids, rank, dp_size) for rank in range(dp_size)]
            assert len({d.shape for d in dealt}) == 1, "every rank runs equally many rows"
            packs = np.concatenate([d.ravel() for d in dealt])
            per_step.append(sorted(packs[packs != EMPTY].tolist()))
            seen += per_step[-1]
        assert sorted(seen) == list(range(num_packs))
        assert per_step == [sorted(ids[s : s + 6].tolist()) for s in range(0, num_packs, 6)], (
            "steps do not depend on ranks"
        )


def test_a_damaged_pack_stops_before_it_is_trained(tmp_path):
    rows = random_packs(np.random.default_rng(1), 4, 300, 1, 50)
    folder = make_shards(tmp_path / "s", rows, capacity=300, order="input")
    shard = folder / "shards" / "00000.arrow"
    data = bytearray(shard.read_bytes())
    at = data.find(rows[2][0].tobytes())
    data[at + 8] ^= 1
    shard.write_bytes(bytes(data))

    dataset = open_shards(folder)
    loader = PackedLoader(dataset, Schedule(4, "input", 0, 0, 1, 1), dp_rank=0, dp_size=1, device=CPU)
    for _ in range(2):
        loader.next_step()
        assert len(list(loader.rows())) == 1
    loader.next_step()
    with pytest.raises(ValueError, match=r"00000.arrow: row 2 \(pack 2\) is damaged"):
        list(loader.rows())
    loader.close()

    trusting = PackedLoader(dataset, Schedule(4, "input", 0, 0, 4, 1), dp_rank=0, dp_size=1, device=CPU, verify=False)
    trusting.next_step()
    assert len(list(trusting.rows())) == 4
    trusting.close()


@pytest.mark.parametrize(
    ("column", "value", "says"),
    [
        (3, [30, 31], "slots sum to 61, but there are 60 ids"),
        (2, [30, 31], "slot 1: 31 tokens in a slot of 30"),
        (2, [0, 30], "slot 0: 0 tokens in a slot of 30"),
        (1, [0] * 59, "there are 60 ids and 59 mask values"),
        (0, [1] * 90, "slots sum to 60, but there are 90 ids"),
    ],
)
@pytest.mark.parametrize("cut", [Cut(), Cut(2, 0, "mixed")], ids=["as it lies", "re-laid"])
def test_what_is_no_pack_is_refused_though_its_hash_is_right(tmp_path, column, value, says, cut):
    """The compiled loops follow lengths and slots: they must not leave the pack, or the buffers."""
    lens = np.array([30, 30], np.int32)
    good = np.ones(60, np.int32), np.zeros(60, np.uint8), lens, lens, np.arange(2), np.zeros(2, np.int32)
    bad = [*good[:column], np.array(value, good[column].dtype), *good[column + 1 :]]
    folder = make_shards(tmp_path / "s", [good, good, bad, good], capacity=80, order="input")
    schedule = Schedule(4, "input", 0, 0, 4, 1)
    loader = PackedLoader(open_shards(folder), schedule, dp_rank=0, dp_size=1, device=CPU, cut=cut)
    loader.next_step()
    rows = loader.rows()
    assert [next(rows).input_ids.sum() > 0 for _ in range(2)] == [True, True], "the two before it"
    with pytest.raises(ValueError, match=says):
        next(rows)
    loader.close()


def test_waiting_is_counted_step_by_step(shards):
    dataset = open_shards(shards)
    loader = PackedLoader(dataset, schedule(dataset), dp_rank=0, dp_size=1, device=CPU)
    loader.next_step()
    list(loader.rows())
    loader.stall_seconds = 60.0
    loader.next_step()
    assert loader.stall_seconds == 0
    loader.close()


def test_more_documents_than_the_index_counts_are_refused(tmp_path):
    ones = np.ones(40, np.int32)
    pack = ones, np.zeros(40, np.uint8), ones, ones, np.arange(40), np.zeros(40, np.int32)
    folder = make_shards(tmp_path / "s", [pack], capacity=40)
    dataset = open_shards(folder)
    dataset.index.documents = np.array([3], np.int32)
    loader = PackedLoader(dataset, Schedule(1, "input", 0, 0, 1, 1), dp_rank=0, dp_size=1, device=CPU)
    loader.next_step()
    with pytest.raises(ValueError, match=r"pack 0: its documents are not those that packs\.arrow counts"):
        list(loader.rows())
    loader.close()


def test_unverified_offsets_that_leave_the_file_are_refused(tmp_path):
    rows = random_packs(np.random.default_rng(1), 2, 300, 1, 50)
    folder = make_shards(tmp_path / "s", rows, capacity=300, order="input")
    shard = folder / "shards" / "00000.arrow"
    data = bytearray(shard.read_bytes())
    lengths = [len(row[0]) for row in rows]
    at = data.find(np.array([0, lengths[0], sum(lengths)], np.int32).tobytes())
    data[at + 4 : at + 8] = np.int32(1 << 30).tobytes()
    shard.write_bytes(bytes(data))
    plan = Schedule(2, "input", 0, 0, 2, 1)
    loader = PackedLoader(open_shards(folder), plan, dp_rank=0, dp_size=1, device=CPU, verify=False)
    loader.next_step()
    with pytest.raises(ValueError, match=r"00000.arrow: row 0 \(pack 0\) is damaged"):
        list(loader.rows())
    loader.close()


@pytest.mark.parametrize("rank", range(3))
def test_of_a_contiguous_part_no_other_token_is_read_or_written(shards, rank):
    dataset = open_shards(shards)
    run = Run(dataset, 2, 2, Cut(3, rank), pinned=False)
    for row in run.rows:
        for name in ("input_ids", "labels", "position_ids"):
            row.buffers[name].fill_(-7)
    run.fill([[3, 1], [EMPTY, 2]], [5, 5], verify=True)
    tokens = len(run.rows[0].buffers["input_ids"])
    mine = torch.arange(tokens) // (tokens // 3) == rank
    mine[800:] = False  # what rounding adds is filled once and for all
    for row in run.rows:
        for name in ("input_ids", "labels", "position_ids"):
            assert torch.equal(row.buffers[name] != -7, mine), name


def test_compressed_shards_are_refused_until_they_are_decompressed(tmp_path):
    """What `prep pack --compress` made cannot be mapped; `prep convert` makes of it what can."""
    write_byte_tokenizer(tmp_path)
    (tmp_path / "in.jsonl").write_text('{"text": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"}\n' * 20)
    pack = ["pack", tmp_path / "in.jsonl", "--tokenizer", tmp_path, "--out", tmp_path / "small", "--compress", "zstd"]
    convert = ["convert", tmp_path / "small", "--to", "thd", "--out", tmp_path / "plain"]
    for arguments in ([*pack, "--seq-len", 512, "--workers", 1, "--no-page"], convert):
        if arguments is convert:
            with pytest.raises(ValueError, match=r"compressed for shipping, which cannot be mapped; .* prep convert"):
                open_shards(tmp_path / "small")
        result = CliRunner().invoke(prep, [str(a) for a in arguments])
        assert result.exit_code == 0, result.output
    assert len(open_shards(tmp_path / "plain")) == 2


def test_the_buffers_are_owned_and_the_map_stays_as_it_is(shards):
    dataset = open_shards(shards)
    loader = PackedLoader(dataset, schedule(dataset), dp_rank=0, dp_size=1, device=CPU)
    loader.next_step()
    for row in loader.rows():
        row.input_ids.fill_(-1)
        row.labels.fill_(-1)
    for i in range(len(dataset)):
        dataset.check(i)
    loader.close()


@pytest.mark.parametrize("taken", [0, 1, 2])
def test_closing_ends_the_thread_wherever_it_stands(shards, taken):
    dataset = PackedDataset(shards)
    loader = PackedLoader(dataset, schedule(dataset), dp_rank=0, dp_size=1, device=CPU)
    loader.next_step()
    rows = loader.rows()
    for _ in range(taken):
        next(rows)
    loader.close()
    assert not loader._thread.is_alive()


def test_sequence_id_shards_are_refused_naming_the_conversion(tmp_path):
    rows = random_packs(np.random.default_rng(1), 2, 64, 1, 50)
    with pytest.raises(ValueError, match="prep convert"):
        open_shards(make_shards(tmp_path / "s", rows, capacity=64, kind="seqid"))


def test_a_model_with_too_few_embeddings_is_refused(tmp_path):
    """However few of the tokenizer's ids occur: it may be that of another model."""
    rows = random_packs(np.random.default_rng(1), 2, 64, 1, 50)
    for number, (largest, pad) in enumerate([(57, 0), (40, 57)]):
        folder = make_shards(tmp_path / str(number), rows, capacity=64, vocab_size=60, largest_id=largest, pad_id=pad)
        with pytest.raises(ValueError, match=r"has 57 token embeddings, but .* holds the id 57, of a tokenizer of 60;"):
            open_shards(folder, 57)
        with pytest.raises(ValueError, match=r"has 59 token embeddings, but .* holds tokens of a tokenizer of 60;"):
            open_shards(folder, 59)
        assert len(open_shards(folder, 60)) == 2


def test_a_tokenizer_may_have_a_few_ids_that_never_occur(tmp_path):
    """That of Gemma 3 1B has one more than the model embeds, for images."""
    rows = random_packs(np.random.default_rng(1), 2, 64, 1, 50)
    folder = make_shards(tmp_path / "s", rows, capacity=64, vocab_size=262145, largest_id=262143)
    assert len(open_shards(folder, 262144)) == 2
    with pytest.raises(ValueError, match=r"holds the id 262143, of a tokenizer of 262145;"):
        open_shards(folder, 262143)
    small = make_shards(tmp_path / "t", rows, capacity=64, vocab_size=2000, largest_id=49)
    assert len(open_shards(small, 1998)) == 2
    with pytest.raises(ValueError, match=r"the model has 1997 token embeddings, but .* tokens of a tokenizer of 2000;"):
        open_shards(small, 1997)


@pytest.mark.parametrize(
    ("address", "command"),
    [
        ("s3://bucket/packed/train", "aws s3 sync s3://bucket/packed/train FOLDER"),
        ("gs://bucket/packed", "gcloud storage rsync --recursive gs://bucket/packed FOLDER"),
        ("https://host/packed", "rclone copy https://host/packed FOLDER"),
    ],
)
def test_shards_behind_an_address_are_refused_with_the_command_that_copies_them(address, command):
    with pytest.raises(ValueError, match="read from a local folder") as caught:
        open_shards(address)
    assert str(caught.value).endswith(f"copy them first with: {command}")
    with pytest.raises(ValueError, match="copy them first"):
        open_shards(Path(address))  # which has lost a slash


def test_the_prefetch_thread_stands_on_the_gpu_of_its_rank(shards, monkeypatch):
    """A thread begins on GPU 0: whatever it did there would open a context beside that of rank 0."""
    seen = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: seen.append((threading.current_thread().name, device)))
    monkeypatch.setattr("train.data.Run", lambda *args, pinned, **options: Run(*args, pinned=False, **options))
    dataset, device = open_shards(shards), torch.device("cuda", 3)
    loader = PackedLoader(dataset, schedule(dataset), dp_rank=0, dp_size=1, device=device)
    loader.next_step()
    next(loader.rows())
    loader.close()
    assert seen == [("prefetch", device)]


@pytest.mark.parametrize("bad", [50, -1, 2**31 - 1])
@pytest.mark.parametrize("at", ["first", "last", "padding"])
@pytest.mark.parametrize("cut", [Cut(), Cut(2, 0, "mixed")], ids=["as it lies", "re-laid"])
def test_an_id_that_the_model_does_not_embed_is_refused_whatever_the_manifest_says(tmp_path, cut, at, bad):
    """On CUDA it would end in an assertion of the device, steps later."""
    lens, slots = np.array([30, 29], np.int32), np.array([30, 30], np.int32)
    good = np.full(60, 49, np.int32), np.zeros(60, np.uint8), lens, slots, np.arange(2), np.zeros(2, np.int32)
    ids = good[0].copy()
    ids[{"first": 0, "last": 58, "padding": 59}[at]] = bad
    made = [good, (ids, *good[1:]), good]
    folder = make_shards(tmp_path / "s", made, capacity=80, order="input", vocab_size=50, largest_id=49)
    plan = Schedule(3, "input", 0, 0, 3, 1)
    loader = PackedLoader(open_shards(folder, 50), plan, dp_rank=0, dp_size=1, device=CPU, cut=cut, vocab_size=50)
    loader.next_step()
    rows = loader.rows()
    assert next(rows).input_ids.max() == 49
    if at == "padding" and cut.kind == "mixed":  # written anew
        assert next(rows).input_ids.max() == 49
    else:
        with pytest.raises(ValueError, match=f"pack 1 holds the id {bad}, and the model has 50 token embeddings"):
            next(rows)
    loader.close()


def test_every_epoch_has_an_order_of_its_own(shards):
    dataset = open_shards(shards)
    for plan in (schedule(dataset), replace(schedule(dataset), streams=(Stream(11, "shuffle", 0, 11),))):
        orders = [tuple(plan.epoch_order(epoch).tolist()) for epoch in range(4)]
        assert len(set(orders)) == 4
        assert {tuple(sorted(order)) for order in orders} == {tuple(range(11))}


def test_the_longest_segment_may_be_one_of_padding(tmp_path):
    """A kernel that is told less would leave the rest of it out."""
    lens = np.array([5, 9], np.int32)
    pack = np.ones(14, np.int32), np.zeros(14, np.uint8), lens, lens, np.arange(2), np.zeros(2, np.int32)
    dataset = open_shards(make_shards(tmp_path / "s", [pack], capacity=400))
    for rank in range(2):  # the second has no pack
        loader = PackedLoader(dataset, Schedule(1, "input", 0, 0, 2, 1), dp_rank=rank, dp_size=2, device=CPU)
        loader.next_step()
        (row,) = loader.rows()
        assert row.segments.max_seqlen == row.segments.cu_seqlens.diff().max() == TAIL_SEGMENT
        loader.close()
