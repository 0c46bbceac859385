"""Sources with weights, repeats and limits."""

import json

import numpy as np
import pytest
from encoding_runs import chats, digest, run, texts, write_jsonl

from prep.encode.mix import select
from prep.encode.mix_file import read_mix
from prep.encode.sources import SourceSpec
from prep.encode.store import DocumentStore
from prep.ledger import Ledger


def test_shares_of_sources_are_exact_to_one_document(tmp_path, byte_level):
    a = write_jsonl(tmp_path / "a.jsonl", texts(200))
    b = write_jsonl(tmp_path / "b.jsonl", texts(60, seed=5))
    specs = [SourceSpec("a", (str(a),), weight=1), SourceSpec("b", (str(b),), weight=3, max_epochs=2.5)]
    store = run(specs, tmp_path / "store", byte_level)
    tokens = {name: int(store.lengths[first:last].sum()) for name, first, last in store.info.sources}
    longest = int(store.lengths.max())
    whole = run(b, tmp_path / "b.store", byte_level)
    assert abs(tokens["b"] - 2.5 * whole.lengths.sum()) <= longest
    assert abs(tokens["b"] - 3 * tokens["a"]) <= 4 * longest
    account = store.ledger.to_json()["sources"]
    assert account["a"]["dropped"]["beyond_share"]["documents"] > 0
    assert account["b"]["repeated"]["documents"] >= 60
    store.ledger.check()
    assert {name: account[name]["kept"]["tokens"] for name in tokens} == tokens
    limited = run([SourceSpec("a", (str(a),), limit_tokens=500)], tmp_path / "limited", byte_level)
    assert abs(int(limited.lengths.sum()) - 500) <= longest


def test_a_mix_from_yaml(tmp_path, byte_level):
    write_jsonl(tmp_path / "a.jsonl", [{"body": "one"}, {"body": "two"}])
    (tmp_path / "b.txt").write_text("three\n\nfour\n")
    (tmp_path / "mix.yaml").write_text(
        "sources:\n"
        "  - {name: first, paths: a.jsonl, columns: {text: body}, repeat: 2}\n"
        "  - {name: second, paths: [b.txt], text_by: paragraph}\n"
    )
    store = run(read_mix(str(tmp_path / "mix.yaml")), tmp_path / "s", byte_level)
    assert store.info.sources == (("first", 0, 4), ("second", 4, 6))
    for text, reason in (
        ("sources: []", "a list under"),
        ("sources: [5]", "source 1 must be an object with a name"),
        ("sources: [{paths: a}]", "source 1 must be an object with a name"),
        ("sources: [{name: x, paths: a}, {name: 5, paths: a}]", "source 2 must be an object with a name"),
        ("sources: [{name: x}]", "no paths"),
        ("sources: [{name: x, pats: y}]", "unknown field pats"),
        ("sources: [{name: x, paths: a, columns: [text]}]", r"source x: columns is \['text'\]; expected names"),
        ("sources: [{name: x, paths: a, columns: {text: 5}}]", "source x: columns is .*; expected names"),
        ("sources: [{name: x, paths: 5}]", "source x: paths is 5; expected a path or a list"),
        ("sources: [{name: x, paths: [5]}]", r"source x: paths is \[5\]; expected a path or a list"),
        ("sources: [{name: x, paths: a, template: 5}]", "source x: template is 5; expected a text"),
        ("sources: [{name: x, paths: a, format: [json]}]", "source x: format is .*; expected a text"),
        ("sources: [{name: x, paths: a, limit_tokens: 10.5}]", "limit_tokens is 10.5; expected a whole number"),
        ("sources: [{name: x, paths: a, limit_tokens: .inf}]", "limit_tokens is inf; expected a whole number"),
        ("sources: [{name: x, paths: a, weight: 1e6}]", "weight is '1e6'; expected a number"),
        ("sources: [{name: x, paths: a, weight: yes}]", "weight is True; expected a number"),
        ("sources: \xff", "not readable as YAML"),
    ):
        (tmp_path / "bad.yaml").write_bytes(text.encode("latin-1"))
        with pytest.raises(ValueError, match=reason):
            read_mix(str(tmp_path / "bad.yaml"))


def test_a_mix_counts_templates_and_limits_as_its_paths_do(tmp_path, byte_level, monkeypatch):
    """Files from the folder of the YAML, wherever the command is run; 500.0 is a whole number."""
    (tmp_path / "deep").mkdir()
    write_jsonl(tmp_path / "deep" / "a.jsonl", chats(20))
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}"
    (tmp_path / "deep" / "t.jinja").write_text(template)
    (tmp_path / "deep" / "mix.yaml").write_text(
        "sources: [{name: x, paths: a.jsonl, template: t.jinja, limit_tokens: 500.0},"
        " {name: y, paths: [a.jsonl], template: chatml}]"
    )
    monkeypatch.chdir(tmp_path)
    specs = read_mix("deep/mix.yaml")
    assert [spec.template for spec in specs] == [str(tmp_path / "deep" / "t.jinja"), "chatml"]
    store = run(specs, tmp_path / "s", byte_level)
    (_, first, last), _ = store.info.sources
    assert abs(int(store.lengths[first:last].sum()) - 500) <= int(store.lengths.max())


def test_shares_that_cannot_be_met_cost_no_unit(tmp_path, byte_level):
    """Weights, limits and duplicates are for the end: whoever mends them goes on with all units."""
    records = texts(40)
    path = write_jsonl(tmp_path / "a.jsonl", [*records, *records[:9]])

    def mix(limit):
        return [SourceSpec("a", (str(path),), limit_tokens=limit)]

    given = {"unit_bytes": 500}
    with pytest.raises(ValueError, match=r"share of 1 tokens is too small .* kept in .* go on with --resume and other"):
        run(mix(1), tmp_path / "s", byte_level, **given)
    stamps = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "s" / "units").iterdir()}
    assert len(stamps) > 8
    with pytest.raises(ValueError, match="unfinished store of the same input; go on with --resume"):
        run(mix(300), tmp_path / "s", byte_level, **given)
    run(mix(300), tmp_path / "s", byte_level, resume=True, dedup="exact", **given)
    run(mix(300), tmp_path / "whole", byte_level, dedup="exact", **given)
    assert digest(tmp_path / "s") == digest(tmp_path / "whole")
    assert {file.name: file.stat().st_mtime_ns for file in (tmp_path / "s" / "units").iterdir()} == stamps
    for other in ({"dedup": "none"}, {"dedup": "exact", "limit": 400}):
        with pytest.raises(ValueError, match=r"other options\.(dedup|sources)"):  # finished, it is what it is
            run(mix(other.pop("limit", 300)), tmp_path / "s", byte_level, **other, **given)


def test_a_part_of_a_source_is_no_prefix_of_it_and_keeps_its_order(tmp_path, byte_level):
    path = (str(write_jsonl(tmp_path / "a.jsonl", chats(80))),)
    whole = run([SourceSpec("a", path)], tmp_path / "whole", byte_level)
    half = run([SourceSpec("a", path, repeat=0.5)], tmp_path / "half", byte_level)
    assert np.all(np.diff(half.rows) > 0)
    assert not np.array_equal(half.rows, np.arange(len(half)))
    targets = json.loads((tmp_path / "half" / "store.json").read_text())["target_tokens"]
    assert targets == sum(int(mask.sum()) for _, mask in documents_of(half)) < whole.target_tokens.sum()


def documents_of(store):
    return [store.document(k) for k in range(len(store))]


def test_a_limit_holds_with_weights_too(tmp_path, byte_level):
    a = (str(write_jsonl(tmp_path / "a.jsonl", texts(200))),)
    specs = [SourceSpec("a", a, weight=1, limit_tokens=300), SourceSpec("b", a, weight=2)]
    store = run(specs, tmp_path / "s", byte_level)
    tokens = {name: int(store.lengths[first:last].sum()) for name, first, last in store.info.sources}
    assert abs(tokens["a"] - 300) <= store.lengths.max()
    assert abs(tokens["b"] - 600) <= store.lengths.max()
    beyond = [SourceSpec("a", a, weight=1, limit_tokens=10**9), SourceSpec("b", a, weight=0.1)]
    account = run(beyond, tmp_path / "t", byte_level).ledger.to_json()["sources"]
    assert [account[name]["repeated"]["documents"] for name in "ab"] == [0, 0], "a limit beyond a source is no repeat"


def test_equal_hashes_are_looked_into(tmp_path, byte_level, monkeypatch):
    """Documents of one hash that differ stay: hashes of 64 bits meet sooner or later."""
    store = run(write_jsonl(tmp_path / "a.jsonl", [*texts(6), *texts(2)]), tmp_path / "s", byte_level)
    monkeypatch.setattr(DocumentStore, "doc_hashes", np.zeros(len(store), np.uint64))
    ledger = Ledger()
    ledger.keep("a", len(store), int(store.lengths.sum()))
    (rows,) = select(store, [(0, len(store))], [SourceSpec("a", ())], ledger, dedup=True)
    assert set(rows.tolist()) >= set(range(6)), "no document that differs from all others goes"


def test_a_file_that_is_not_there_is_named(tmp_path):
    for path, why in ((tmp_path / "none.yaml", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(ValueError, match=f"^--mix {path}: {why}; name a YAML file with a list of sources$"):
            read_mix(str(path))


@pytest.mark.parametrize("share", ["weight", "repeat", "limit_tokens"])
def test_a_share_of_nothing_is_refused(share, tmp_path, byte_level):
    full = write_jsonl(tmp_path / "a.jsonl", texts(3))
    (tmp_path / "b.jsonl").touch()
    copies = write_jsonl(tmp_path / "c.jsonl", texts(3))
    for path, options in ((tmp_path / "b.jsonl", {}), (copies, {"dedup": "exact"})):
        specs = [SourceSpec("a", (str(full),), **{share: 1}), SourceSpec("b", (str(path),), **{share: 1})]
        with pytest.raises(ValueError, match="source b: no document is left of it; check its files or take it out"):
            run(specs, tmp_path / path.stem, byte_level, **options)
        assert not (tmp_path / path.stem / "store.json").exists()


def test_shares_that_cannot_be_are_refused_before_any_work(tmp_path, byte_level):
    path = (str(write_jsonl(tmp_path / "a.jsonl", texts(3))),)
    for specs, reason in (
        ([SourceSpec("a", path, weight=1), SourceSpec("b", path)], "source b: with weights every source has a weight"),
        ([SourceSpec("a", path, weight=1, repeat=2)], "none a repeat"),
        ([SourceSpec("a", path, repeat=0)], "repeat is 0"),
        ([SourceSpec("a", path, weight=float("inf"))], "weight is inf"),
        ([SourceSpec("a", path, repeat=float("nan"))], "repeat is nan"),
        ([SourceSpec("a", path, max_epochs=float("inf"))], "max_epochs is inf"),
        ([SourceSpec("a", path), SourceSpec("a", path)], "two sources are called a"),
    ):
        with pytest.raises(ValueError, match=reason):
            run(specs, tmp_path / "s", byte_level)
        assert not (tmp_path / "s").exists()
