"""What is wrong is said in one sentence, and nothing is changed."""

import pytest
from whole_runs import cli, spoil

from ranks import run_ranks


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("missing", "no such folder of packed shards"),
        ("init", "--init begins with random weights, but"),
        ("no weights", "convert its weights to safetensors first, or train from scratch with --init"),
        ("unfinished", "unfinished"),
        ("other version", "format version 99"),
        ("damaged", "is damaged: its hash is not the one in packs.arrow"),
        ("damaged, looked at whole", "00000.arrow: damaged, its checksum is not the one in the manifest"),
        ("truncated", "bytes, but the manifest says"),
        ("sequence ids", "prep convert"),
        ("vocabulary", "the model has 320 token embeddings, but"),
        ("out holds other things", "holds something that is no run of this trainer"),
        ("out is a file", "is a file; name a folder"),
        ("no model", "config.json cannot be read"),
        ("checkpoint missing", "no such folder; say never, auto, or the path"),
        ("no checkpoint there", "no complete checkpoint"),
        ("mesh", "1 ranks cannot be divided by pp 1 × dp_replicate 2"),
        ("tp", "1 ranks cannot be divided by pp 1 × dp_replicate 1 × cp 1 × tp 2"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(case, says, flags, tmp_path):
    ((code, said),) = run_ranks(cli, 1, spoil(case, tmp_path, flags), process_group=False)
    assert code == 1
    last = said.splitlines()[-1]
    assert last.startswith("train: error: ")
    assert says in last
    assert "Traceback" not in said
    assert not list(tmp_path.glob("out/checkpoints/*"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seed": 4}, "seed was 3 and is now 4"),
        ({"batch_packs": 5}, "batch_packs was 4 and is now 5"),
        ({"shards": "eval"}, "the shards are not the ones of the checkpoint"),
        ({"resume": "never"}, "already holds a run; go on with it by --resume auto"),
    ],
)
def test_a_resume_that_does_not_fit_says_what_differs_and_changes_nothing(changes, says, flags, finished, data):
    if "shards" in changes:
        changes = {"shards": data / "eval"}
    before = (finished / "metrics.jsonl").read_bytes()
    argv = flags(**{"resume": "auto", **changes})
    ((code, said),) = run_ranks(cli, 1, argv, process_group=False)
    assert (code, len(said.splitlines())) == (1, 1)
    assert says in said
    assert (finished / "metrics.jsonl").read_bytes() == before
