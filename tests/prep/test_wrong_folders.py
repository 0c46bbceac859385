"""A folder that holds train and eval of something, given where one of them, or raw input, is wanted."""

import shutil

import pytest
from packing_runs import packed, run


@pytest.fixture(scope="module")
def root(source, tokenizer, tmp_path_factory):
    """`packs`, `stores` and `saved`, each with train and eval: shards, document stores, exports for Hugging Face; and
    `begun`, which holds a store that is not finished."""
    root = tmp_path_factory.mktemp("wrong")
    packed(source, root / "packs", tokenizer, "--eval-fraction", 0.1)
    for part in ("train", "eval"):
        shutil.copytree(root / "packs.store", root / "stores" / part)
    begun = ["--out", root / "begun" / "store", "--tokenizer", tokenizer, "--unit-range", "1/2", "--quiet"]
    assert run("encode", source, *begun).exit_code == 0
    assert run("convert", root / "packs", "--to", "hf", "--out", root / "saved", "--quiet").exit_code == 0
    return root


RAW_STORES = "holds a document store in {0}/eval and {0}/train; name the raw files, or pack one store alone: prep pack"
RAW_SAVED = "holds saved datasets in {0}/eval and {0}/train; name one of them"
CASES = {
    ("pack", "packs"): "holds packed shards in {0}/train and {0}/eval: pack the raw files or the document store that "
    "they were made of ({0}.store), or change their form with prep convert",
    ("pack", "stores"): RAW_STORES,
    ("pack", "saved"): RAW_SAVED,
    ("encode", "packs"): "{0}: holds packed shards in {0}/eval and {0}/train; name the raw files, or pack the document "
    "store that they were made of",
    ("encode", "stores"): RAW_STORES,
    ("encode", "saved"): RAW_SAVED,
    ("encode", "stores/train"): "{0}: holds a document store and no raw input; pack it: prep pack {0}",
    **{
        (command, folder): f"{{0}}: holds an unfinished document store in {{0}}{more}; finish it with prep encode"
        for command in ("pack", "encode", "plan", "lint")
        for folder, more in (("begun", "/store"), ("begun/store", ""))
    },
    ("plan", "stores"): RAW_STORES,
    ("plan", "saved"): RAW_SAVED,
    ("lint", "stores"): RAW_STORES,
    ("lint", "saved"): RAW_SAVED,
    ("view", "packs"): "{0}: holds the packed folders train and eval; name one, e.g. {0}/train",
    ("view", "stores"): "{0}: holds document stores and no packed shards; make some of {0}/train and of {0}/eval, e.g. "
    "prep pack {0}/train --out DIR --seq-len N",
    ("view", "saved"): "{0}: holds no packed shards; name a folder that prep pack wrote",
    **{
        (command, "stores"): "{0}/train: a document store and no packed shards; make some: prep pack {0}/train"
        for command in ("verify", "report", "convert")
    },
    **{
        (command, "saved"): "{0}/train: holds no packed shards; name a folder that prep pack wrote"
        for command in ("verify", "report", "convert")
    },
}


@pytest.mark.parametrize("with_tokenizer", [True, False])
@pytest.mark.parametrize(("command", "what"), CASES)
def test_what_lies_there_is_named_with_both_folders(command, what, with_tokenizer, root, tokenizer, tmp_path):
    """Whether or not a tokenizer is given: nobody looks for one in vain."""
    more = {"pack": ["--seq-len", 256], "plan": ["--seq-len", 256], "convert": ["--to", "seqid"]}.get(command, [])
    if command in ("pack", "encode", "convert"):
        more = [*more, "--out", tmp_path / "out"]
    if command == "encode" or (with_tokenizer and command not in ("verify", "report", "convert")):
        more = [*more, "--tokenizer", tokenizer]
    result = run(command, root / what, *more)
    assert result.exit_code == 1
    assert CASES[command, what].format(root / what) in result.output.splitlines()[0]
    assert result.output.count("Error: ") == (2 if command == "verify" else 1)
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_into_what_is_whole(root, source, tokenizer):
    """`prep verify` would call the shards damaged, whose folder holds what their manifest does not know."""
    shards, store = root / "packs" / "train", root / "packs.store"
    encoding = ["--tokenizer", tokenizer, "--quiet"]
    for place, held, command in (
        (shards / "x", "packed shards", ["pack", store, "--seq-len", 256, "--out"]),
        (shards / "shards" / "x", "packed shards", ["encode", source, *encoding, "--out"]),
        (store / "x", "a document store", ["encode", source, *encoding, "--out"]),
        (store / "x", "a document store", ["convert", shards, "--to", "seqid", "--out"]),
    ):
        result = run(*command, place)
        assert result.exit_code == 1
        assert f"--out {place} lies inside {place.parents[place.parent.name == 'shards']}, which" in result.output
        assert f"which holds {held} and nothing else; name another folder" in result.output
        assert not place.exists()
    page = run("view", shards, "--html", shards / "page.html")
    assert (page.exit_code, (shards / "page.html").exists()) == (1, False)
    assert "holds packed shards and nothing else; name another file" in page.output
