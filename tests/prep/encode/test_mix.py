"""Sources with weights, repeats and limits."""

import pytest
from encoding_runs import run, texts, write_jsonl

from prep.encode.sources import SourceSpec, read_mix


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
        ("sources: [{name: x}]", "no paths"),
        ("sources: [{name: x, pats: y}]", "unknown field pats"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ValueError, match=reason):
            read_mix(str(tmp_path / "bad.yaml"))


def test_shares_that_cannot_be_are_refused_before_any_work(tmp_path, byte_level):
    path = (str(write_jsonl(tmp_path / "a.jsonl", texts(3))),)
    for specs, reason in (
        ([SourceSpec("a", path, weight=1), SourceSpec("b", path)], "source b: with weights every source has a weight"),
        ([SourceSpec("a", path, weight=1, repeat=2)], "none a repeat"),
        ([SourceSpec("a", path, repeat=0)], "repeat is 0"),
        ([SourceSpec("a", path), SourceSpec("a", path)], "two sources are called a"),
    ):
        with pytest.raises(ValueError, match=reason):
            run(specs, tmp_path / "s", byte_level)
        assert not (tmp_path / "s").exists()
