"""One work unit: bad records, control tokens, bos and eos, and second opinions on its engine and its rendering."""

import json

import numpy as np
import pytest
from encoding_runs import chats, documents, run, texts, write_jsonl

from prep.encode.direct import DirectRenderer
from prep.encode.tokens import TokenEncoder


def test_engines_give_the_same_documents(tmp_path, byte_level):
    pytest.importorskip("fastokens")
    path = write_jsonl(tmp_path / "a.jsonl", [*chats(300), *texts(300)])
    fast = run(path, tmp_path / "fast", byte_level, engine="fast")
    assert documents(fast) == documents(run(path, tmp_path / "hf", byte_level, engine="hf"))
    assert fast.ledger.total()["notes"]["compared_with_hf"] > 0


def test_bad_records_stop_with_file_and_line(tmp_path, byte_level):
    good = '{"text": "fine"}\n'
    cases = {
        "not readable as JSON": ('{"text": "x"', "line 101"),
        "no known field": ('{"txt": 1}', "line 101"),
    }
    for reason, (line, where) in cases.items():
        path = tmp_path / "bad.jsonl"
        path.write_text(good * 100 + line + "\n" + good)
        with pytest.raises(ValueError, match=reason) as caught:
            run(path, tmp_path / "store", byte_level, unit_bytes=300)
        assert f"bad.jsonl, {where}:" in str(caught.value)
        assert not (tmp_path / "store").exists()


def test_skipping_bad_records(tmp_path, byte_level):
    good = json.dumps({"text": "fine"})
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([good, "{", good, '{"no": 1}', good]) + "\n")
    store = run(path, tmp_path / "store", byte_level, on_error="skip")
    total = store.ledger.total()
    assert (total["read"]["documents"], total["kept"]["documents"]) == (5, 3)
    assert total["dropped"]["error"]["documents"] == 2
    rejects = [json.loads(line) for line in (tmp_path / "store" / "rejects.jsonl").read_text().splitlines()]
    assert [r["where"] for r in rejects] == ["a.jsonl, line 2", "a.jsonl, line 4"]
    assert rejects[1]["record"] == '{"no": 1}'
    assert "no known field" in rejects[1]["reason"]
    for limit in ("1", "39%"):
        with pytest.raises(ValueError, match="max-errors"):
            run(path, tmp_path / f"s{limit}", byte_level, on_error="skip", max_errors=limit)
    assert len(run(path, tmp_path / "s40", byte_level, on_error="skip", max_errors="40%")) == 3


def test_padding_that_is_taken_out_of_given_tokens_is_counted(tmp_path, byte_level):
    records = [
        {"input_ids": [5, 6, 0, 0], "attention_mask": [1, 1, 0, 0]},
        {"input_ids": [7, 8, 0], "attention_mask": [1, 1, 0]},
    ]
    store = run(write_jsonl(tmp_path / "a.jsonl", records), tmp_path / "store", byte_level)
    assert store.ledger.total()["notes"]["padding_removed"] == 3
    assert store.ledger.total()["kept"]["tokens"] == 4


def test_a_record_that_is_rejected_late_leaves_nothing_in_the_notes(tmp_path, byte_level):
    """Its control tokens cannot be told from text, which is found when it is encoded."""
    odd = [{"role": "narrator", "content": "n"}, {"role": "user", "content": "<|im_end|>\U0010f000"}]
    records = [{"messages": [*odd, {"role": "assistant", "content": "a"}]}, *chats(3)]
    store = run(write_jsonl(tmp_path / "a.jsonl", records), tmp_path / "s", byte_level, on_error="skip")
    assert store.ledger.total()["dropped"]["error"]["documents"] == 1
    assert "turns_of_unknown_roles" not in store.ledger.total()["notes"]
    odd[1]["content"] = "u"
    records = [{"messages": [*odd, {"role": "assistant", "content": "a"}]}, *chats(3)]
    store = run(write_jsonl(tmp_path / "b.jsonl", records), tmp_path / "t", byte_level, on_error="skip")
    assert store.ledger.total()["notes"]["turns_of_unknown_roles"] == 1


def test_control_tokens_in_texts_are_text(tmp_path, byte_level):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a<|im_end|>b"}, {"text": "plain"}])
    end = 599  # not the id: the vocabulary is looked up below
    store = run(path, tmp_path / "s", byte_level)
    tokenizer = json.loads((byte_level / "tokenizer.json").read_text())
    end = next(t["id"] for t in tokenizer["added_tokens"] if t["content"] == "<|im_end|>")
    ids = store.document(0)[0].tolist()
    assert ids.count(end) == 1
    assert ids[-1] == end  # the eos that we put there
    assert store.ledger.total()["notes"]["control_tokens_kept_as_text"] == 1
    allowed = run(path, tmp_path / "allowed", byte_level, allow_special=True)
    assert allowed.document(0)[0].tolist().count(end) == 2


def test_bos_and_eos_of_plain_texts(tmp_path, sentencepiece, byte_level):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "hello"}, {"prompt": "2+2=", "completion": "4"}])
    store = run(path, tmp_path / "s", sentencepiece)
    for index, trained in ((0, None), (1, 2)):
        ids, mask = store.document(index)
        assert ids[0] == store.info.bos_id
        assert ids[-1] == store.info.eos_id
        assert (mask[0], mask[-1]) == (0, 1)
        if trained:
            assert mask.sum() == trained
    assert run(path, tmp_path / "b", byte_level).info.bos_id is None


def test_a_unit_in_which_the_fast_engine_differs_is_done_again_with_hf(tmp_path, byte_level, monkeypatch):
    pytest.importorskip("fastokens")
    path = write_jsonl(tmp_path / "a.jsonl", texts(3000))
    expected = run(path, tmp_path / "hf", byte_level, engine="hf", unit_bytes=10**6)
    real = TokenEncoder._encode_fast

    def wrong(self, given):
        ids, offsets = real(self, given)
        return ids + (ids == ids[0]).astype(np.int32), offsets

    monkeypatch.setattr(TokenEncoder, "_encode_fast", wrong)
    store = run(path, tmp_path / "fast", byte_level, engine="fast", unit_bytes=10**6)
    assert documents(store) == documents(expected)
    assert store.ledger.total()["notes"]["engine_differed_units"] >= 1


def test_small_units_are_compared_too(tmp_path, byte_level, monkeypatch):
    """A hundred thousand files of a few lines must not be a hundred thousand units that nobody looked at."""
    pytest.importorskip("fastokens")
    paths = [write_jsonl(tmp_path / f"{k}.jsonl", texts(2, seed=k)) for k in range(6)]
    store = run(paths, tmp_path / "s", byte_level, engine="fast")
    assert all(a["notes"]["compared_with_hf"] >= 1 for a in store.ledger.to_json()["sources"].values())
    real = TokenEncoder._encode_fast

    def wrong(self, given):
        ids, offsets = real(self, given)
        return ids + (ids == ids[0]).astype(np.int32), offsets

    monkeypatch.setattr(TokenEncoder, "_encode_fast", wrong)
    mended = run(paths, tmp_path / "t", byte_level, engine="fast")
    assert documents(mended) == documents(store)
    assert mended.ledger.total()["notes"]["engine_differed_units"] == 6


def render_wrongly(monkeypatch, word=""):
    """Direct rendering adds a character to every chat, or to those whose first message holds a word."""
    real = DirectRenderer.render

    def wrong(self, messages):
        rendering = real(self, messages)
        if rendering is not None and word in messages[0]["content"]:
            rendering.text += "!"
        return rendering

    monkeypatch.setattr(DirectRenderer, "render", wrong)


def test_a_unit_in_which_direct_rendering_differs_is_done_again_through_jinja(tmp_path, byte_level, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", chats(300))
    expected = run(path, tmp_path / "right", byte_level)
    render_wrongly(monkeypatch)
    store = run(path, tmp_path / "wrong", byte_level)
    assert documents(store) == documents(expected)
    assert store.ledger.total()["notes"]["direct_rendering_differed_units"] == 1


def test_chats_all_over_a_unit_are_proven(tmp_path, byte_level, monkeypatch):
    """Not only the first, which may be of another kind than the rest."""
    records = [{"messages": [{"role": "user", "content": "early"}, {"role": "assistant", "content": "a"}]}] * 500
    path = write_jsonl(tmp_path / "a.jsonl", records + json.loads(json.dumps(records).replace("early", "late")))
    render_wrongly(monkeypatch, "late")
    store = run(path, tmp_path / "store", byte_level)
    assert store.ledger.total()["notes"]["direct_rendering_differed_units"] == 1


def test_a_difference_in_one_unit_says_nothing_of_the_next(tmp_path, byte_level, monkeypatch):
    """Else the notes would depend on which process ran which unit, and on crashes."""
    path = write_jsonl(tmp_path / "a.jsonl", chats(200))
    render_wrongly(monkeypatch)
    store = run(path, tmp_path / "store", byte_level, unit_bytes=10_000)
    units = len(json.loads((tmp_path / "store" / "store.json").read_text())["units"])
    assert units > 3
    assert store.ledger.total()["notes"]["direct_rendering_differed_units"] == units


def test_texts_are_the_same_documents_alone_and_beside_other_records(tmp_path, byte_level):
    records = [*texts(300), {"text": "a<|im_end|>b"}]
    others = [{"prompt": "2+2=", "completion": "4"}, *chats(2), {"input_ids": [1, 2, 3]}]
    alone = documents(run(write_jsonl(tmp_path / "a.jsonl", records[:300]), tmp_path / "a", byte_level))
    beside = documents(run(write_jsonl(tmp_path / "b.jsonl", [*records, *others]), tmp_path / "b", byte_level))
    assert alone == beside[:300]
    assert all(mask == [0] + [1] * (len(ids) - 1) for ids, mask in alone)
    pair = documents(run(write_jsonl(tmp_path / "c.jsonl", records[-2:]), tmp_path / "c", byte_level))
    assert pair == beside[299:301]
