"""Another mix from a store: what encoding with that mix would have given, and nothing of the options is ignored."""

import json

import pytest
import yaml
from packing_runs import chats, documents_of, run, tree, write_jsonl

from formats.manifest import read_manifest
from prep.encode.mix_file import read_mix
from prep.encode.store import DocumentStore
from prep.remix import remix

MIXES = {
    "weights": [{"name": "a", "weight": 3}, {"name": "b", "weight": 1}, {"name": "c", "weight": 2, "max_epochs": 3}],
    "repeats and limits": [
        {"name": "a", "limit_tokens": 700},
        {"name": "b", "repeat": 2.5},
        {"name": "c", "repeat": 0.4},
    ],
    "all": [{"name": "a"}, {"name": "b"}, {"name": "c"}],
    "some, in another order": [{"name": "c", "weight": 1}, {"name": "a", "weight": 4}],
    "one": [{"name": "b"}],
}


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Three files; documents of one stand in the others, too."""
    root = tmp_path_factory.mktemp("raw")
    shared = list(chats(20, seed=9))
    for seed, (name, count) in enumerate({"a": 80, "b": 30, "c": 50}.items()):
        write_jsonl(root / f"{name}.jsonl", [*chats(count, seed=seed), *shared])
    return root


def mix_file(folder, sources, paths=True):
    """A mix as `prep encode` takes it; without paths as a store takes it, too."""
    entries = [{**s, "paths": f"{s['name']}.jsonl"} if paths else s for s in sources]
    path = folder / f"mix{len(list(folder.glob('mix*')))}.yaml"
    path.write_text(yaml.safe_dump({"sources": entries}))
    return path


def encode(raw, sources, store, tokenizer, *more):
    arguments = ["--mix", mix_file(raw, sources), "--out", store, "--tokenizer", tokenizer, "--workers", 1, "--quiet"]
    result = run("encode", *arguments, "--unit-bytes", "2K", *more)
    assert result.exit_code == 0, result.output
    return store


def pack(store, out, *more):
    arguments = ["--seq-len", 256, "--no-page", "--quiet", "--workers", 1, *more]
    result = run("pack", store, "--out", out, *arguments)
    assert result.exit_code == 0, result.output
    return out


@pytest.mark.parametrize("wanted", MIXES)
@pytest.mark.parametrize(("encoded_as", "dedup"), [("all", "none"), ("all", "exact"), ("weights", "exact")])
def test_a_mix_from_a_store_is_that_of_the_raw_files(raw, tokenizer, tmp_path, wanted, encoded_as, dedup):
    """Also from a store that was encoded with a mix of its own, which left documents out and repeated others."""
    store = encode(raw, MIXES[encoded_as], tmp_path / "store", tokenizer, "--dedup", dedup)
    direct = encode(raw, MIXES[wanted], tmp_path / "direct", tokenizer, "--dedup", dedup)
    expected = pack(direct, tmp_path / "expected")
    found = pack(store, tmp_path / "found", "--mix", mix_file(raw, MIXES[wanted], paths=False))
    assert documents_of(found) == documents_of(expected)
    assert read_manifest(found).sources == read_manifest(expected).sources
    assert read_manifest(found).fingerprint == read_manifest(expected).fingerprint
    ours, theirs = (json.loads((folder / "ledger.json").read_text())["sources"] for folder in (found, expected))
    names = [source["name"] for source in MIXES[wanted]]
    assert {name: ours[name] for name in names} == theirs
    for name in ours.keys() - set(names):
        assert ours[name]["kept"] == {"documents": 0, "tokens": 0}
        assert ours[name]["dropped"]["not_in_mix"] == ours[name]["read"]
    assert run("verify", found, "--deep").exit_code == 0


def test_bytes_of_a_mix_do_not_depend_on_workers_and_resume(raw, tokenizer, tmp_path):
    store = encode(raw, MIXES["all"], tmp_path / "store", tokenizer)
    mix = mix_file(raw, MIXES["weights"])  # the file it was encoded with, weights changed
    more = ["--mix", mix, "--shard-size", "4K", "--eval-fraction", 0.2, "--format", "seqid"]
    one = pack(store, tmp_path / "one", *more)
    two = pack(store, tmp_path / "two", *more, "--workers", 2)
    assert len(list((one / "train" / "shards").iterdir())) > 3
    assert tree(one) == tree(two)
    (two / "train" / "manifest.json").unlink()
    next((two / "train" / "shards").iterdir()).unlink()
    other = ["--mix", mix_file(raw, MIXES["all"]), *more[2:]]
    refused = run("pack", store, "--out", two, "--seq-len", 256, "--no-page", "--quiet", "--resume", *other)
    assert refused.exit_code == 1
    assert "with other options" in refused.output or "unfinished run with other" in refused.output
    pack(store, two, *more, "--resume")
    assert tree(one) == tree(two)


def test_shares_that_a_store_cannot_give_are_refused(raw, tokenizer, tmp_path):
    store = encode(raw, MIXES["all"], tmp_path / "store", tokenizer)
    for sources, sentence in (
        ([{"name": "d"}], f"--mix: {store} has no source d, but a, b, c"),
        ([{"name": "a"}, {"name": "a"}], "two sources are called a"),
        ([{"name": "a", "weight": 1}, {"name": "b"}], "source b: with weights every source has a weight"),
        (
            [{"name": "a", "columns": {"text": "body"}}],
            "source a of .* was encoded with columns {}, not {'text': 'body'}",
        ),
        ([{"name": "a", "text_by": "paragraph"}], "was encoded with text_by 'line', not 'paragraph'"),
        ([{"name": "a", "format": "csv"}], "was encoded with format None, not 'csv'"),
        ([{"name": "a", "template": "llama3"}], "source a of .* was encoded with another template than llama3; leave"),
        ([{"name": "a", "template": "nonsense"}], "chat template .*nonsense: neither a readable file nor one of"),
        ([{"name": "a"}, {"name": "b", "limit_tokens": 1}], "source b: its share of 1 tokens is too small for any"),
        ([{"name": "a", "repeat": 1e9}], "source a would be read 1000000000 times; at most 10000 are possible"),
    ):
        mix = read_mix(str(mix_file(tmp_path, sources, paths=False)), encoded=True)
        with pytest.raises(ValueError, match=sentence):
            remix(DocumentStore.open(store), mix)


def test_a_ledger_that_does_not_fit_its_units_is_named(raw, tokenizer, tmp_path):
    store = encode(raw, MIXES["all"], tmp_path / "store", tokenizer)
    content = json.loads((store / "store.json").read_text())
    content["ledger"]["sources"]["a"]["kept"]["documents"] -= 1
    (store / "store.json").write_text(json.dumps(content))
    for more in (["--mix", mix_file(tmp_path, [{"name": "a"}], paths=False)], ["--eval-source", "a"]):
        result = run("pack", store, "--out", tmp_path / "out", "--seq-len", 256, *more)
        assert result.output.endswith(
            f"Error: {store}: its ledger does not fit its units; remove the store and encode again\n"
        )
        assert not (tmp_path / "out").exists()


def test_a_mix_may_name_the_template_that_a_store_was_encoded_with(raw, tokenizer, tmp_path):
    sources = [{"name": "a", "template": "chatml"}, {"name": "b", "template": "plain"}]
    store = encode(raw, sources, tmp_path / "store", tokenizer)
    rows = remix(DocumentStore.open(store), read_mix(str(mix_file(tmp_path, sources, paths=False)), encoded=True))
    assert len(rows) == 150
    with pytest.raises(ValueError, match=r"source b of .* was encoded with another template than chatml"):
        swapped = [{"name": "a"}, {"name": "b", "template": "chatml"}]
        remix(DocumentStore.open(store), read_mix(str(mix_file(tmp_path, swapped, paths=False)), encoded=True))


def test_what_another_mix_left_unfinished_is_not_gone_on_with(raw, tokenizer, tmp_path):
    """Its shards would be taken for damaged, and replaced."""
    store, out = encode(raw, MIXES["all"], tmp_path / "store", tokenizer), tmp_path / "out"
    pack(store, out, "--mix", mix_file(tmp_path, MIXES["all"], paths=False))
    (out / "manifest.json").unlink()
    before = tree(out)
    once = [*MIXES["all"][:2], {"name": "c", "repeat": 1}]
    for other, differs in ((MIXES["one"], "sources"), (once, "with other plan left")):
        more = ["--resume", "--mix", mix_file(tmp_path, other, paths=False)]
        result = run("pack", store, "--out", out, "--seq-len", 256, "--no-page", "--quiet", *more)
        assert result.exit_code == 1
        assert "an unfinished run with other " in result.output
        assert differs in result.output
        assert tree(out) == before


def test_no_pack_inside_its_store_and_no_empty_mix(raw, tokenizer, tmp_path):
    store = encode(raw, MIXES["all"], tmp_path / "store", tokenizer)
    for more, sentence in (
        (["--out", store / "units" / "x"], f"lies inside {store}, which holds a document store and nothing else"),
        (["--out", tmp_path / "out", "--mix", ""], "--mix : No such file or directory; name a YAML file"),
    ):
        result = run("pack", store, "--seq-len", 256, *more)
        assert result.exit_code == 1
        assert sentence in result.output
    assert not (store / "units" / "x").exists()


def test_options_that_a_store_cannot_heed_are_refused(raw, tokenizer, tmp_path):
    store = encode(raw, MIXES["all"], tmp_path / "store", tokenizer)
    for options in (
        ["--dedup", "exact"],
        ["--dedup", "none"],  # said is said, though it is the default
        ["--train-on", "all"],
        ["--tokenizer", "nowhere"],
        ["--chat-template", "nonsense"],
        ["--keep-untrained"],
        ["--column", "text=body"],
        ["--engine", "ray"],
        ["--unit-bytes", "1M"],
    ):
        result = run("pack", store, "--out", tmp_path / "out", "--seq-len", 256, *options)
        assert result.exit_code == 1
        assert result.output == f"Error: {store} is encoded already: leave out {options[0]}, or name the raw files\n"
        assert not (tmp_path / "out").exists()
    both = run("pack", store, "--out", tmp_path / "out", "--seq-len", 256, "--train-on", "all", "--max-errors", 3)
    assert "leave out --train-on, --max-errors, or" in both.output
