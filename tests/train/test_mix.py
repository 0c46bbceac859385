"""Several folders as one training set: who is drawn how often, and what does not go together."""

import numpy as np
import pytest
import torch

from make_shards import make_shards, random_packs
from train.cut import WHOLE, choose_cut
from train.data import PackedLoader
from train.flags import parse_shards
from train.mix import open_training

OPTIONS = {"seed": 3, "batch_packs": 4, "micro_packs": 1}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three folders of 6, 9 and 2 packs; ids of the k-th lie in [100k + 1, 100k + 99]."""
    made = []
    for number, (count, align) in enumerate(((6, 1), (9, 4), (2, 8))):
        rows = random_packs(np.random.default_rng(number), count, 96, align, 100)
        rows = [(np.where(row[0] > 0, row[0] + 100 * number, 0).astype(np.int32), *row[1:]) for row in rows]
        folder = tmp_path_factory.mktemp("mix") / f"f{number}"
        made.append(str(make_shards(folder, rows, capacity=96, align=align, cp=max(1, align // 2), vocab_size=400)))
    return made


def rows_of(training, epochs=1, dp_size=1, dp_rank=0, consumed=0, cut=WHOLE):
    """(packs, rows): the input_ids of every row of so many epochs, and what the facts add up to."""
    loader = PackedLoader(
        *(training.dataset, training.schedule),
        dp_rank=dp_rank,
        dp_size=dp_size,
        device=torch.device("cpu"),
        cut=cut,
        consumed=consumed,
    )
    rows, tokens = [], 0
    for _ in range(training.schedule.steps(epochs)):
        tokens += loader.next_step().tokens
        rows += [tuple(row.input_ids.tolist()) for row in loader.rows()]
    loader.close()
    return [row for row in rows if any(row)], tokens


def test_without_weights_every_pack_of_every_folder_is_trained_once(folders):
    training = open_training(folders, None, **OPTIONS)
    alone = [rows_of(open_training([folder], None, **OPTIONS)) for folder in folders]
    rows, tokens = rows_of(training)
    assert sorted(rows) == sorted(row for own, _ in alone for row in own)
    assert tokens == sum(count for _, count in alone)
    assert training.weights == (6 / 17, 9 / 17, 2 / 17)


def test_weights_set_the_share_of_packs(folders):
    a, b, _ = folders
    training = open_training([f"{a}:3", f"{b}:1"], None, **OPTIONS)
    rows, _ = rows_of(training, epochs=4)
    from_a = [row for row in rows if max(row) < 100]
    assert (len(from_a), len(rows)) == (44, 60), "three quarters of 15 packs an epoch, exact to one"
    counts = {from_a.count(row) for row in set(from_a)}
    assert (len(set(from_a)), counts) == (6, {7, 8}), "44 draws of 6 packs: no pack is ahead by more than one"
    assert training.weights == (0.75, 0.25)
    assert f"{a} 73.3%, 11 packs an epoch = 1.83 passes" in training.summary


@pytest.mark.parametrize("dp_size", [2, 3, 5])
def test_the_ranks_share_a_mixture_without_loss_or_repeat(folders, dp_size):
    training = open_training(folders, None, **OPTIONS)
    parts = [row for rank in range(dp_size) for row in rows_of(training, dp_size=dp_size, dp_rank=rank)[0]]
    assert sorted(parts) == sorted(rows_of(training)[0])


def test_a_mixture_goes_on_where_it_stopped(folders):
    training = open_training([f"{folders[0]}:1", f"{folders[1]}:2"], None, **OPTIONS)
    rows, _ = rows_of(training, epochs=2)
    rest, _ = rows_of(training, epochs=1, consumed=15)
    assert rest == rows[-15:]


def test_a_damaged_pack_is_named_by_its_own_folder(folders, tmp_path):
    rows = random_packs(np.random.default_rng(9), 3, 96, 1, 100)
    bad = make_shards(tmp_path / "bad", rows, capacity=96, vocab_size=400)
    shard = bad / "shards" / "00000.arrow"
    data = shard.read_bytes()
    at = data.index(rows[1][0].tobytes())
    shard.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    training = open_training([folders[0], str(bad)], None, **OPTIONS)
    with pytest.raises(ValueError, match=r"bad.*00000\.arrow: row 1 .*damaged"):
        rows_of(training)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (["a:0.5", "b"], "--shards b has no weight but others have"),
        (["a", "a"], "--shards a is given more than once"),
        (["a:1", "./b/../a:2"], "--shards a is given more than once"),
        (["a:0"], "the weight must be a number greater than 0, not 0"),
        (["a:-1"], "greater than 0, not -1"),
        (["a:nan", "b:1"], "greater than 0, not nan"),
    ],
)
def test_weights_that_make_no_sense_are_refused(values, says):
    with pytest.raises(ValueError, match=r".") as error:
        parse_shards(values)
    assert says in str(error.value)


def test_a_colon_of_the_path_is_no_weight():
    assert parse_shards(["s3://bucket/a", "data:v2"]) == (["s3://bucket/a", "data:v2"], None)
    assert parse_shards(["data:v2:0.5", "b:2"]) == (["data:v2", "b"], [0.5, 2.0])


def test_folders_that_do_not_go_together_are_refused(folders, tmp_path):
    rows = random_packs(np.random.default_rng(9), 3, 64, 1, 100)
    short = str(make_shards(tmp_path / "short", rows, capacity=64, vocab_size=400))
    with pytest.raises(ValueError, match=r"packs of 64 tokens and .* of 96; pack them with the same --seq-len"):
        open_training([folders[0], short], None, **OPTIONS)
    with pytest.raises(ValueError, match=r"its weight gives it no pack in an epoch of 15"):
        open_training([f"{folders[0]}:0.001", f"{folders[1]}:1"], None, **OPTIONS)
    other = str(make_shards(tmp_path / "other", rows, capacity=64, vocab_size=400, tokenizer_hash="another"))
    with pytest.raises(ValueError, match=r"other and .*short were made with different tokenizers; encode them with"):
        open_training([short, other], None, **OPTIONS)


@pytest.mark.parametrize(("first", "second", "kind"), [(0, 1, "contiguous"), (1, 0, "contiguous"), (1, 2, "zigzag")])
def test_a_mixture_is_cut_as_all_of_its_folders_allow(folders, first, second, kind):
    """Slots are multiples of 1, of 4 and of 8 tokens; two ranks that cut documents zigzag want multiples of 4."""
    training = open_training([folders[first], folders[second]], None, **OPTIONS)
    parts = []
    for rank in range(2):
        cut = choose_cut("gather", 2, rank, training.dataset.manifest)
        assert cut.kind == kind
        parts.append(rows_of(training, cut=cut)[0])
    whole, _ = rows_of(training)
    assert sorted(i for row in parts[0] + parts[1] for i in row if i) == sorted(i for row in whole for i in row if i)


def test_every_file_of_every_folder_is_checked_by_one_of_the_parts(folders, tmp_path):
    rows = random_packs(np.random.default_rng(9), 20, 96, 1, 100)
    other = make_shards(tmp_path / "other", rows, capacity=96, vocab_size=400)
    dataset = open_training([folders[1], str(other)], None, **OPTIONS).dataset
    for path in sorted((other / "shards").iterdir()):
        data = path.read_bytes()
        path.write_bytes(data[:-20] + bytes([data[-20] ^ 1]) + data[-19:])
        found = []
        for part in range(3):
            try:
                dataset.check_files(part, 3)
            except ValueError as error:
                found.append(str(error))
        path.write_bytes(data)
        (sentence,) = found
        assert f"{path}: damaged" in sentence
