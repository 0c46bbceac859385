"""Every kind of record: what becomes text, what is trained, what is refused."""

import json
import mmap

import pytest
from rendering import END, FOUR, GENERATION, chat, reader, trained

from prep.encode import limits
from prep.encode.templates import ChatTemplate
from prep.encode.tokenizer import read_tokenizer


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ({}, ["a1" + END, "a2" + END]),
        ({"train_on": "last-turn"}, ["a2" + END]),
        ({"train_on": "completion"}, ["a2" + END]),
        ({"end_of_turn": "none"}, ["a1", "a2"]),
        ({"end_of_turn": "last"}, ["a1", "a2" + END]),
        ({"end_of_turn": "all"}, [END, END, "a1" + END, END, "a2" + END]),
        ({"roles": ("user",)}, ["u1" + END, "u2" + END]),
        ({"roles": ("user", "assistant"), "train_on": "last-turn"}, ["a2" + END]),
    ],
)
def test_policies(byte_level, policy, expected):
    for _ in range(2):  # through Jinja, and then directly
        read = reader(byte_level, **policy)
        assert trained(read.read(FOUR)) == expected
        again = read.read(FOUR)
        assert again.literals is None
        assert trained(again) == expected


def test_all_trains_everything(byte_level):
    rendering = reader(byte_level, train_on="all").read(FOUR)
    assert trained(rendering) == [rendering.text]


def test_flags_of_messages(byte_level):
    record = chat("u1", "a1", "u2", "a2")
    record["messages"][1]["train"] = False
    record["messages"][2]["train"] = True
    assert trained(reader(byte_level).read(record)) == ["u2" + END, "a2" + END]
    record["messages"][3]["weight"] = 0
    assert trained(reader(byte_level).read(record)) == ["u2" + END]


def test_flags_of_parts_of_a_content_list(byte_level):
    parts = [
        {"type": "text", "text": "not this, "},
        {"type": "text", "text": "but this"},
        {"type": "text", "text": " no"},
    ]
    parts[0]["train"] = parts[2]["train"] = False
    record = {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": parts}]}
    rendering = reader(byte_level).read(record)
    assert "not this, but this no" in rendering.text
    assert trained(rendering) == ["but this", END]
    record["messages"][0]["content"] = [{"type": "text", "text": "x"}, {"type": "text", "text": "y", "train": True}]
    assert trained(reader(byte_level).read(record)) == ["y", "but this", END]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ({}, ["a1" + END, "a2" + END]),
        ({"train_on": "last-turn"}, ["a2" + END]),
        ({"end_of_turn": "none"}, ["a1", "a2"]),
        ({"end_of_turn": "last"}, ["a1", "a2" + END]),
    ],
)
def test_generation_blocks_decide_where_a_template_has_them(byte_level, policy, expected):
    assert trained(reader(byte_level, template=GENERATION, **policy).read(FOUR)) == expected


def test_a_template_that_rewrites_words_is_refused_not_guessed(byte_level):
    upper = "{% for m in messages %}{{ m.role + ': ' + m.content | upper + '<|im_end|>' }}{% endfor %}"
    twice = "{% for m in messages %}{{ m.content + m.content }}{% endfor %}"
    backwards = "{% for m in messages %}{{ m.content[::-1] }}{% endfor %}"
    assert trained(reader(byte_level, template=upper).read(FOUR)) == ["A1" + END, "A2" + END]
    for template in (twice, backwards):
        with pytest.raises(ValueError, match=r"cannot be located|not supported"):
            reader(byte_level, template=template).read(FOUR)


GENERATION_WITHOUT_END = GENERATION.replace("+ '<|im_end|>' }}{% endgen", "}}{% endgen").replace(
    "{{ '\n'", "{{ '<|im_end|>\n'"
)
ENDLESS = {"turns_without_a_trained_end": 2}


@pytest.mark.parametrize(
    ("template", "policy", "expected"),
    [
        ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% endfor %}", {}, ENDLESS),
        ("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}", {}, ENDLESS),
        ("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}", {"end_of_turn": "none"}, {}),
        # The end stands behind the block that the template says is the model's.
        (
            GENERATION.replace("+ '<|im_end|>' }}{% endgen", "}}{% endgen").replace("{{ '\n'", "{{ '<|im_end|>\n'"),
            {},
            ENDLESS,
        ),
        (GENERATION, {}, {}),
        (True, {}, {}),
    ],
)
def test_turns_whose_end_is_not_trained_are_counted(byte_level, template, policy, expected):
    records = reader(byte_level, template=template, **policy)
    for _ in range(2):  # the second time directly, where the template allows it
        assert records.read(FOUR).facts == expected


def test_an_answer_without_words_is_not_trained_and_counted(byte_level):
    rendering = reader(byte_level).read(chat("u", "", "v", "  ", "w", "yes"))
    assert trained(rendering) == ["yes" + END]
    assert rendering.facts == {"turns_without_words": 2}
    untrained = {"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "", "weight": 0}]}
    assert reader(byte_level).read(untrained).facts == {}


def test_a_template_with_two_ends_of_turn(byte_level):
    """As gpt-oss: the last turn ends in another token than the earlier ones."""
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
        "{{ '<|endoftext|>' if loop.last and m.role == 'assistant' else '<|im_end|>' }}{% endfor %}"
    )
    for _ in range(2):
        assert trained(reader(byte_level, template=template).read(FOUR)) == ["a1<|im_end|>", "a2<|endoftext|>"]


def test_todays_date_is_refused_unless_it_is_fixed(byte_level):
    tokenizer = read_tokenizer(byte_level)
    source = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.content + '<|im_end|>' }}{% endfor %}"
    with pytest.raises(ValueError, match="--template-date"):
        ChatTemplate(source, tokenizer.special_tokens).render(FOUR["messages"])
    dated = ChatTemplate(source, tokenizer.special_tokens, "2025-01-31")
    assert dated.render(FOUR["messages"]).startswith("31 Jan 2025")


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append({'role': 'x', 'content': 'y'}) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        "{{ 'x' * 100000000000 }}",
        "{{ lipsum(n=1) }}",
        "{{ messages | random }}",
        "{{ 'x'.ljust(100000000000) }}",
        "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    ],
)
def test_templates_cannot_reach_out_or_run_away(monkeypatch, source):
    monkeypatch.setattr(limits, "SECONDS", 0.3)
    with pytest.raises(ValueError, match="chat template"):
        ChatTemplate(source, {}).render(FOUR["messages"])


def test_the_memory_of_a_rendering_counts_from_what_the_process_has_at_its_begin():
    template = ChatTemplate("{{ ('x' * count) | length }}", {})
    assert template.render([], count=10**8) == "100000000"
    with mmap.mmap(-1, limits.BYTES + (64 << 20), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS):  # untouched, so free
        assert template.render([], count=10**8) == "100000000"


FRAME = (
    "{% for m in messages %}{{ m.role + m.content + '<|im_end|>' }}{% if 'boom' in m.content %}X{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    "trouble",
    [
        "{{ 1 / 0 }}",
        "{{ 2.0 ** 5000 }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{{ f() }}",
        "{{ '{:c}'.format(99999999) }}",
        "{{ nothing() }}",
        "{{ 'ab cd ' * 300000 }}",
    ],
)
def test_whatever_a_template_raises_is_its_refusal_of_one_chat(byte_level, trouble):
    read = reader(byte_level, template="{% macro f() %}{{ f() }}{% endmacro %}" + FRAME.replace("X", trouble)).read
    assert trained(read(chat("u", "a"))) == ["a" + END]
    with pytest.raises(ValueError, match=r"the chat template (refuses|ran away on) this chat"):
        read(chat("boom", "a"))
    assert trained(read(chat("u", "a"))) == ["a" + END]


PARENTHESES = "{{" + 500 * "(" + "1" + 500 * ")" + "}}"
SUM = "{{" + 3000 * "1 + " + "1 }}"


@pytest.mark.parametrize("source", [PARENTHESES, SUM, "{{ x | nothing }}", "{% if %}", "{% nothing %}"])
def test_templates_that_cannot_be_compiled_are_refused(source):
    with pytest.raises(ValueError, match=r"the chat template (cannot be compiled|is not valid Jinja)"):
        ChatTemplate(source, {})


def test_a_template_may_write_much_for_a_long_chat(byte_level):
    read = reader(byte_level).read
    assert len(read(chat("u" * 3_000_000, "a")).text) > 3_000_000
    assert len(read(chat(*["u", "a"] * 20_000)).text) > 1 << 20


def nested(levels):
    value = 1
    for _ in range(levels):
        value = {"x": [value]}
    return value


@pytest.mark.parametrize("levels", [40, 450, 40_000])
def test_what_is_nested_too_deep_is_refused(byte_level, levels):
    call = {"type": "function", "function": {"name": "f", "arguments": nested(levels)}}
    answer = {"role": "assistant", "content": "a", "tool_calls": [call]}
    user = {"role": "user", "content": "u"}
    for record, name in (
        ({"messages": [user, answer]}, "message 2"),
        ({"messages": [user], "tools": [nested(levels)]}, "tools"),
        ({"prompt": [user], "completion": [answer]}, "message 2"),
    ):
        with pytest.raises(ValueError, match=f"{name} is nested more than 64 levels deep"):
            reader(byte_level).read(record)
    flat = {**call, "function": {"name": "f", "arguments": nested(25)}}
    assert reader(byte_level).read({"messages": [user, {**answer, "tool_calls": [flat]}]}).text


def test_sharegpt(byte_level):
    record = {
        "system": "s",
        "conversations": [
            {"from": "human", "value": "u1"},
            {"from": "gpt", "value": "a1"},
            {"from": "human", "value": "u2"},
            {"from": "gpt", "value": "a2"},
        ],
    }
    assert reader(byte_level).read(record).text == reader(byte_level).read(FOUR).text


def test_alpaca(byte_level):
    record = {"instruction": "add", "input": "1 1", "output": "2"}
    rendering = reader(byte_level).read(record)
    assert rendering.text == reader(byte_level).read(chat("add\n\n1 1", "2")).text
    assert trained(rendering) == ["2" + END]
    bare = reader(byte_level, template=False).read(record)
    assert trained(bare) == ["2"]
    assert bare.around
    assert "### Input:\n1 1" in bare.text


def test_prompt_and_completion(byte_level):
    rendering = reader(byte_level).read({"prompt": "2+2=", "completion": "4"})
    assert (rendering.text, trained(rendering), rendering.around) == ("2+2=4", ["4"], True)
    record = {"prompt": [FOUR["messages"][1]], "completion": [FOUR["messages"][2]]}
    assert trained(reader(byte_level).read(record)) == ["a1" + END]
    record = {"prompt": FOUR["messages"][:4], "completion": FOUR["messages"][4:]}
    assert trained(reader(byte_level).read(record)) == ["a2" + END]


def test_segments(byte_level):
    segments = [
        {"text": "<|im_start|>x", "train": False},
        {"text": "y<|im_end|>", "train": True},
        {"text": "z", "label": 0},
    ]
    rendering = reader(byte_level).read({"segments": segments})
    assert (rendering.text, trained(rendering)) == ("<|im_start|>xy<|im_end|>z", ["y<|im_end|>"])
    assert rendering.controls == 0  # control tokens in them are text, as everywhere
    assert reader(byte_level, allow_special=True).read({"segments": segments}).controls is None
    assert not rendering.around
    assert trained(reader(byte_level).read({"input_output": json.dumps(segments)})) == ["y<|im_end|>"]


def test_tokens_pass_through(byte_level):
    read = reader(byte_level).read
    assert read({"input_ids": [5, 6, 7]}).mask.tolist() == [1, 1, 1]
    assert read({"input_ids": [5, 6, 7], "labels": [-100, 6, -100]}).mask.tolist() == [0, 1, 0]
    assert read({"input_ids": [5, 6, 7], "loss_mask": [0, 1, 1]}).mask.tolist() == [0, 1, 1]
    for label in (-101, -1, 7):  # -100 alone means that nothing is trained
        with pytest.raises(ValueError, match="labels differ from input_ids at position 1"):
            read({"input_ids": [5, 6, 7], "labels": [-100, label, -100]})
    padded = read({"input_ids": [5, 6, 0, 0], "attention_mask": [1, 1, 0, 0]})
    assert (padded.ids.tolist(), padded.removed) == ([5, 6], 2)
    # One document says so in the same fields; the padding before it has position 0, too.
    one = {"attention_mask": [0, 0, 1, 1], "position_ids": [0, 0, 0, 1], "seq_lengths": [2], "seq_lens": []}
    assert read({"input_ids": [0, 0, 5, 6], **one}).ids.tolist() == [5, 6]


def test_columns(byte_level):
    read = reader(byte_level, columns={"text": "body"}).read
    assert read({"body": "hello", "text": "not me"}) == "hello"
    with pytest.raises(ValueError, match="column body"):
        read({"text": "x"})


def test_control_tokens_are_counted_as_the_template_writes_them(byte_level):
    read = reader(byte_level).read
    assert read(chat("a", "b")).controls == 4
    assert read({"prompt": "a<|im_end|>", "completion": "b"}).controls == 0
    pair = reader(byte_level, allow_special=True).read({"prompt": "a<|im_end|>", "completion": "b"})
    assert pair.controls is None
    assert reader(byte_level, allow_special=True).read(chat("a", "b")).controls is None


CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"k": "v"}}}]}


def test_tool_calls_and_tools_may_be_json_text(byte_level):
    """As CSV and many Parquet files have them."""
    template = (
        "{{ tools | tojson }}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
        "{{ m.tool_calls | tojson if m.tool_calls }}<|im_end|>{% endfor %}"
    )
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    read = reader(byte_level, template=template).read
    plain = {"messages": [{"role": "user", "content": "u"}, CALL, {"role": "user", "content": "v"}], "tools": tools}
    text = {**plain, "messages": [dict(m) for m in plain["messages"]], "tools": json.dumps(tools)}
    text["messages"][1]["tool_calls"] = json.dumps(CALL["tool_calls"])
    assert read(text) == read(plain)
    assert isinstance(text["messages"][1]["tool_calls"], str), "a record that is rejected is shown as it was"


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ([1, 2], "an object with named fields, not a list"),
        ({}, "no known field"),
        ({"txt": "x"}, "the record has: txt"),
        ({"chosen": "a", "rejected": "b"}, "preference pair"),
        ({"messages": []}, "at least one message"),
        ({"messages": "no json"}, "not JSON"),
        ({"messages": [{"content": "x"}]}, "message 1 must be an object with role"),
        ({"messages": [{"role": ["x"], "content": "x"}]}, "message 1 must be an object with role"),
        ({"prompt": [{"role": {"a": 1}, "content": "x"}], "completion": []}, "message 1 must be an object with role"),
        ({"messages": [{"role": "a<|im_end|>", "content": "x"}]}, "not a name"),
        ({"messages": [{"role": "user", "content": 3}]}, "must be text or a list, not a number"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}, "'image'; only text parts"),
        ({"messages": [{"role": "user", "content": "x", "weight": 0.5}]}, "weight 0.5"),
        ({"messages": [{"role": "user"}]}, "the chat template refuses"),
        ({"conversations": [{"from": "human"}]}, "turn 1"),
        ({"instruction": "x"}, "must be there"),
        ({"prompt": "x"}, "must both be there"),
        ({"segments": [{"text": "x"}]}, "segment 1"),
        ({"text": 5}, "text must be text"),
        ({"input_ids": [1, -2]}, "outside the tokenizer's vocabulary"),
        ({"input_ids": [1, 10**6]}, "outside the tokenizer's vocabulary"),
        ({"input_ids": ["a"]}, "whole numbers"),
        ({"input_ids": [1, 2], "loss_mask": [1, -100]}, "loss_mask holds -100; only 0 and 1"),
        ({"input_ids": [1, 2], "loss_mask": [0.5, 1]}, "loss_mask holds 0.5; only 0 and 1"),
        ({**FOUR, "tools": {"type": "function"}}, "tools must be a list of objects"),
        ({**FOUR, "tools": 5}, "tools must be a list of objects"),
        ({**FOUR, "tools": "[1]"}, "tools must be a list of objects"),
        ({"messages": [CALL | {"tool_calls": {"name": "f"}}]}, "tool_calls of message 1 must be a list of objects"),
        ({"messages": [CALL | {"tool_calls": ["f(x)"]}]}, "tool_calls of message 1 must be a list of objects"),
        ({"messages": [CALL | {"tool_calls": "f(x)"}]}, "tool_calls of message 1 is text that is not JSON"),
        ({"input_ids": [1, 2], "labels": [1]}, "as long as input_ids"),
        ({"input_ids": [1, 2], "labels": [[1], 2]}, "as long as input_ids"),
        ({"input_ids": [1, 2], "labels": [2, -100]}, "unshifted"),
        ({"input_ids": [1, 2], "seq_lens": [1, 1]}, "a pack of several documents, as seq_lens says"),
        ({"input_ids": [1, 2], "seq_lengths": "[1, 1]"}, "a pack of several documents, as seq_lengths says"),
        ({"input_ids": [1, 2], "seq_start_id": [0, 1]}, "a pack of several documents, as seq_start_id says"),
        ({"input_ids": [1, 2], "position_ids": [0, 0]}, "a pack of several documents, as position_ids says"),
        ({"input_ids": [1, 2], "attention_mask": [1, 2]}, "a pack of several documents, as attention_mask says"),
    ],
)
def test_bad_records_are_refused_with_their_reason(byte_level, record, reason):
    with pytest.raises(ValueError, match=reason):
        reader(byte_level).read(record)


def test_a_chat_without_a_template(byte_level):
    with pytest.raises(ValueError, match="no chat template"):
        reader(byte_level, template=False).read(FOUR)
