"""Records as tables and other programs' exports hold them: JSON in cells, empty cells, names in capitals."""

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from encoding_runs import documents, run, write_jsonl

from prep.encode.options import MaskPolicy

CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def write_csv(path, names, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows(rows)
    return path


def test_an_empty_cell_is_no_value(tmp_path, byte_level):
    """One table for chats, texts, tokens and pairs: of each row, what is filled in counts."""
    names = ["messages", "tools", "input_ids", "loss_mask", "chosen", "rejected", "segments", "text"]
    rows = [
        [json.dumps(CHAT), "", "", "", "", "", "", ""],
        ["", "", "", "", "", "", "", "a text"],
        ["", "", "[3, 4, 5]", "[0, 1, 0]", "", "", "", ""],
        ["", "", "[3, 4, 5]", "", "", "", "", ""],
        ["", "", "", "", "", "", json.dumps([{"text": "x", "train": False}, {"text": "y", "train": True}]), ""],
    ]
    store = run(write_csv(tmp_path / "a.csv", names, rows), tmp_path / "s", byte_level)
    records = [
        {"messages": CHAT},
        {"text": "a text"},
        {"input_ids": [3, 4, 5], "loss_mask": [0, 1, 0]},
        {"input_ids": [3, 4, 5]},
        {"segments": [{"text": "x", "train": False}, {"text": "y", "train": True}]},
    ]
    assert documents(store) == documents(run(write_jsonl(tmp_path / "a.jsonl", records), tmp_path / "t", byte_level))
    empty = write_csv(tmp_path / "b.csv", ["messages", "tools"], [[json.dumps(CHAT), ""], ["", ""]])
    with pytest.raises(ValueError, match="row 2: no known field"):
        run(empty, tmp_path / "u", byte_level)
    for cell, reason in (("[1, x]", "input_ids must be a list"), ("{}", "input_ids must be a list")):
        bad = write_csv(tmp_path / "c.csv", ["input_ids"], [[cell]])
        with pytest.raises(ValueError, match=f"row 1: {reason}"):
            run(bad, tmp_path / "v", byte_level)


def test_roles_of_sharegpt_are_known_in_any_case(tmp_path, byte_level):
    known = [{"messages": [{"role": "system", "content": "s"}, *CHAT]}]
    expected = documents(run(write_jsonl(tmp_path / "a.jsonl", known), tmp_path / "s", byte_level))
    for k, (system, user, model) in enumerate(
        [("system", "human", "gpt"), ("System", "Human", "GPT"), ("SYSTEM", "User", "Assistant")]
    ):
        turns = [{"from": system, "value": "s"}, {"from": user, "value": "q"}, {"from": model, "value": "a"}]
        others = [{"role": turn["from"], "content": turn["value"]} for turn in turns]
        path = write_jsonl(tmp_path / f"{k}.jsonl", [{"conversations": turns}, {"conversations": others}])
        assert documents(run(path, tmp_path / f"s{k}", byte_level)) == expected * 2


def test_a_column_that_only_some_messages_fill_is_not_there_for_the_others(tmp_path, byte_level):
    """Parquet gives every message every key; a template that asks whether there is a name must not find None."""
    (tmp_path / "t.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}{% if 'name' in m %} ({{ m.name }}){% endif %}\n"
        "{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    records = [{"messages": CHAT}, {"messages": [{**CHAT[0], "name": "Ann"}, CHAT[1]]}]
    template = str(tmp_path / "t.jinja")
    lines = write_jsonl(tmp_path / "a.jsonl", records)
    whole = [{"messages": [{"name": None, **m} for m in record["messages"]]} for record in records]
    pq.write_table(pa.Table.from_pylist(whole), tmp_path / "a.parquet")
    expected = documents(run(lines, tmp_path / "s", byte_level, chat_template=template))
    assert documents(run(tmp_path / "a.parquet", tmp_path / "t", byte_level, chat_template=template)) == expected
    assert len({len(ids) for ids, _ in expected}) == 2


@pytest.mark.parametrize("role", [["x"], {"a": 1}, 3, None])
def test_a_role_that_is_no_text_is_a_bad_record(role, tmp_path, byte_level):
    bad = {"role": role, "content": "a"}
    records = [{"messages": CHAT}, {"messages": [bad]}, {"prompt": [bad], "completion": [CHAT[1]]}, {"messages": CHAT}]
    store = run(write_jsonl(tmp_path / "a.jsonl", records), tmp_path / "s", byte_level, on_error="skip")
    assert (len(store), store.ledger.total()["dropped"]["error"]["documents"]) == (2, 2)


def test_the_end_of_a_completion_is_trained_unless_it_is_not_wanted(tmp_path, byte_level):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "2+2=", "completion": "4"}])
    for end, trained in (("turn", 1), ("none", 0)):
        store = run(path, tmp_path / end, byte_level, mask=MaskPolicy(end_of_turn=end))
        ids, mask = store.document(0)
        assert (ids[-1], mask[-1]) == (store.info.eos_id, trained)


def test_a_dataset_that_cannot_be_read_is_named_with_its_row(tmp_path, byte_level):
    (tmp_path / "d").mkdir()
    lines = [json.dumps({"text": f"number {k}"}) for k in range(5)]
    (tmp_path / "d" / "train.jsonl").write_text("\n".join([*lines, '{"text": 5']) + "\n")
    with pytest.raises(ValueError, match=r"hf:.*/d#train, row \d+: datasets cannot read it"):
        run(f"hf:{tmp_path}/d#train", tmp_path / "s", byte_level)
