"""What is trained: flags before policies, openings and ends that the model writes, `{% generation %}` blocks; and what
is said of words that a template leaves out."""

import pytest
from rendering import END, FOUR, GENERATION, chat, reader, trained


def user(text, **more):
    return {"role": "user", "content": text, **more}


def model(text, **more):
    return {"role": "assistant", "content": text, **more}


def part(text, **more):
    return {"type": "text", "text": text, **more}


@pytest.mark.parametrize("flag", [{"train": False}, {"train": 0}, {"weight": 0}, {"weight": False}, {"weight": 0.0}])
def test_flags_of_turns_and_parts_that_are_not_trained(byte_level, flag):
    read = reader(byte_level).read
    record = {"messages": [user("u"), model("one", **flag), user("v"), model("two")]}
    assert trained(read(record)) == ["two" + END]
    record = {"messages": [user("u"), model([part("one ", **flag), part("two")])]}
    assert trained(read(record)) == ["two" + END]


@pytest.mark.parametrize("flag", [{"train": True}, {"train": 1}, {"train": 1, "weight": 1}])
def test_flags_of_turns_and_parts_that_are_trained(byte_level, flag):
    record = {"messages": [user("u", **flag), user([part("v "), part("w", **flag)]), model("a", weight=1)]}
    assert trained(reader(byte_level).read(record)) == ["u" + END, "w", "a" + END]


@pytest.mark.parametrize("flag", [{"train": "false"}, {"train": 2}, {"train": []}, {"weight": "0"}, {"weight": 0.5}])
def test_flags_that_are_none_are_refused(byte_level, flag):
    name = next(iter(flag))
    with pytest.raises(ValueError, match=f"message 2 has {name} .*; only true, false, 0 and 1 are possible"):
        reader(byte_level).read({"messages": [user("u"), model("one", **flag)]})
    with pytest.raises(ValueError, match=f"part 1 of message 2 has {name}"):
        reader(byte_level).read({"messages": [user("u"), model([part("one", **flag)])]})


FLAGGED = {
    "messages": [user("u1", train=True), model("a1"), user("u2"), model("a2", weight=0), user("u3"), model("a3")]
}


@pytest.mark.parametrize("template", [True, GENERATION])
@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ({}, ["u1" + END, "a1" + END, "a3" + END]),
        ({"train_on": "completion"}, ["u1" + END, "a3" + END]),
        ({"train_on": "last-turn"}, ["u1" + END, "a3" + END]),
        ({"end_of_turn": "none"}, ["u1", "a1", "a3"]),
        ({"end_of_turn": "last"}, ["u1", "a1", "a3" + END]),
        ({"end_of_turn": "all"}, ["u1" + END, "a1" + END, END, END, END, "a3" + END]),
        ({"roles": ("user",)}, ["u1" + END, "u2" + END, "u3" + END]),
        ({"roles": ("user", "assistant")}, ["u1" + END, "a1" + END, "u2" + END, "u3" + END, "a3" + END]),
    ],
)
def test_flags_go_before_policies_in_every_kind_of_template(byte_level, template, policy, expected):
    assert trained(reader(byte_level, template=template, **policy).read(FLAGGED)) == expected


@pytest.mark.parametrize("template", [True, GENERATION])
@pytest.mark.parametrize(
    ("end", "gone"),
    [("turn", ["a2" + END]), ("all", ["a2"]), ("last", [END, END, END, "a2" + END, END]), ("none", 6 * [END] + ["a2"])],
)
def test_all_trains_all_but_what_flags_and_ends_leave_out(byte_level, template, end, gone):
    rendering = reader(byte_level, template=template, train_on="all", end_of_turn=end).read(FLAGGED)
    left = "".join(trained(rendering))
    assert len(left) == len(rendering.text) - sum(map(len, gone))
    assert "a2" not in left
    assert left.count(END) == rendering.text.count(END) - sum(END in text for text in gone)
    assert left.startswith("<|im_start|>user\nu1")


def test_all_minds_the_flags_of_parts(byte_level):
    record = {"messages": [user("u"), model([part("one ", train=False), part("two"), part(" three", weight=0)])]}
    rendering = reader(byte_level, train_on="all").read(record)
    assert "".join(trained(rendering)) == rendering.text.replace("one ", "").replace(" three", "")


OFF, ON = {"train": False}, {"train": True}


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([part("A ", **OFF), part(" B")], [" B" + END]),
        ([part(" A"), part("B\n\n", **OFF)], [" A", END]),
        ([part("A"), part(" ", **OFF), part("C")], ["A", "C" + END]),
        ([part(" "), part("B\t "), part(" \n"), part(" C ", **OFF)], [" B\t  \n", END]),
    ],
)
def test_flags_of_parts_hold_for_their_white_space_too(byte_level, parts, expected):
    assert trained(reader(byte_level).read({"messages": [user("u"), model(parts)]})) == expected
    # The same from the other side: everything but these.
    flags = [{**p, "train": not p.get("train", True)} for p in parts]
    record = {"messages": [user(flags), model("a")]}
    assert trained(reader(byte_level).read(record)) == [*(p["text"] for p in parts if "train" in p), "a" + END]


def test_white_space_at_the_edges_of_a_list_may_be_stripped(byte_level):
    parts = [part("\n"), part(" A ", **OFF), part(" "), part(" B\n"), part(" ")]
    source = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content | trim + '<|im_end|>' }}{% endfor %}"
    assert trained(reader(byte_level, template=source).read({"messages": [user("u"), model(parts)]})) == ["  B" + END]


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize(
    ("strip", "kept"), [("", " \n  def f()"), (" | trim", "def f()"), (".lstrip(' ')", "\n  def f()")]
)
def test_white_space_before_words_is_theirs_where_the_template_keeps_it(byte_level, strip, kept, direct):
    """Not only behind the header of a generation prompt."""
    source = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + STRIPPED + '<|im_end|>\n' }}{% endfor %}"
    source += "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    read = reader(byte_level, template=source.replace("STRIPPED", f"(m.content{strip})"), roles=("user", "tool")).read
    for role in ("user", "tool"):
        between = [model("a"), {"role": role, "content": "g"}, model(" ")]  # an empty turn has a header, too
        messages = [{"role": role, "content": " \n  def f() "}, *between, {"role": role, "content": "  h"}]
        tools = {} if direct else {"tools": [{"type": "function"}]}
        rendering = read({"messages": messages, **tools})
        last = "h" if strip else "  h"
        assert trained(rendering) == [kept + ("" if "trim" in strip else " ") + END, "g" + END, last + END]


def test_words_of_others_between_the_words_of_a_turn_are_never_trained(byte_level):
    """A template that tells first what all thought, then what they said."""
    source = (
        "{% for m in messages %}{{ m.reasoning_content }}{% endfor %}"
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}"
    )
    read = reader(byte_level, template=source).read
    with pytest.raises(ValueError, match="scatters the words of message 2, so they cannot be located"):
        read({"messages": [user("u"), model("a", reasoning_content="r")]})
    assert trained(read({"messages": [user("u"), model("a")]})) == ["a" + END]


@pytest.mark.parametrize("end", ["turn", "all"])
def test_only_trained_turns_are_counted_as_endless(byte_level, end):
    source = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% endfor %}"
    rendering = reader(byte_level, template=source, end_of_turn=end).read(FOUR)
    assert rendering.facts == {"turns_without_a_trained_end": 2}


def test_the_last_end_is_that_of_the_last_turn_with_words(byte_level):
    record = {"messages": [user("u"), model("a"), user("v"), model(" ")]}
    assert trained(reader(byte_level, end_of_turn="last").read(record)) == ["a" + END]


def test_all_trains_prompts_too_and_segments_as_they_say(byte_level):
    read = reader(byte_level, train_on="all").read
    record = {"prompt": FOUR["messages"][:4], "completion": FOUR["messages"][4:]}
    assert trained(read(record)) == [read(FOUR).text]
    assert trained(read({"segments": [{"text": "a", "train": False}, {"text": "b", "train": True}]})) == ["b"]


def test_no_end_of_turn_of_texts_where_none_is_wanted(byte_level):
    for end, is_target in (("turn", True), ("none", False)):
        read = reader(byte_level, end_of_turn=end).read
        assert read({"prompt": "a", "completion": "b"}).eos_is_target == is_target
        # A bare text is one with all its targets.
        assert read({"text": "a"}) == "a" if is_target else not read({"text": "a"}).eos_is_target


def test_an_empty_answer_in_a_generation_block_is_trained_unless_a_flag_says_no(byte_level):
    def spans(*flags, **policy):
        messages = [m for k, flag in enumerate(flags) for m in (user(f"u{k}"), model("", **flag))]
        messages += [user("v"), model("a")]
        return trained(reader(byte_level, template=GENERATION, **policy).read({"messages": messages}))

    assert spans({}) == [END, "a" + END]
    for flag in ({"weight": 0}, {"train": False}):
        assert spans(flag) == ["a" + END]
        assert spans({}, flag) == spans(flag, {}) == [END, "a" + END]
    assert spans({}, end_of_turn="last") == ["a" + END]
    assert spans({}, train_on="last-turn") == ["a" + END]
    # Two empty turns in a row, of which one is trained: the blocks are theirs in order.
    record = {"messages": [user("u"), model("", weight=0), model(""), user("v"), model("a")]}
    rendering = reader(byte_level, template=GENERATION).read(record)
    assert trained(rendering) == [END, "a" + END]
    assert rendering.text[: rendering.spans[0][0]].count("assistant") == 2


def test_an_end_in_the_words_of_a_generation_block_is_not_the_templates(byte_level):
    bare = GENERATION.replace("+ '<|im_end|>' }}{% endgen", "}}{% endgen").replace("{{ '\n'", "{{ '<|im_end|>\n'")
    rendering = reader(byte_level, template=bare).read(chat("u", f"say {END}"))
    assert rendering.facts == {"turns_without_a_trained_end": 1}
    untrained = reader(byte_level, template=bare, end_of_turn="none").read(chat("u", f"say {END}"))
    assert trained(untrained) == [f"say {END}"]


def test_turns_that_generation_blocks_leave_out_are_counted(byte_level):
    last_only = GENERATION.replace("m.role == 'assistant'", "m.role == 'assistant' and loop.last")
    rendering = reader(byte_level, template=last_only).read(FOUR)
    assert (trained(rendering), rendering.facts) == (["a2" + END], {"turns_outside_generation": 1})


SCAFFOLD = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and m.reasoning_content %}{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}"
    "{% elif m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls %}{{ '<tool_call>' + (c.function | tojson) + '</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def call(name="f", **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        (model("yes"), "yes"),
        (model("", tool_calls=[call()]), '<tool_call>{"name": "f", "arguments": {}}</tool_call>'),
        (model("yes", reasoning_content="so"), "<think>\nso\n</think>\n\nyes"),
    ],
)
def test_an_empty_scaffold_is_not_trained_whatever_follows(byte_level, last, expected):
    rendering = reader(byte_level, template=SCAFFOLD).read({"messages": [user("u"), last]})
    assert trained(rendering) == [expected + END]


CHANNELS = (
    "{% set last = namespace(name='') %}{% for m in messages %}{% if m.tool_calls %}"
    "{% set last.name = m.tool_calls[0].function.name %}"
    "{{ '<|im_start|>assistant to=' + last.name + '<|endoftext|>' + m.tool_calls[0].function.arguments | tojson }}"
    "{{ '<|endoftext|>' }}{% elif m.role == 'tool' %}"
    "{{ '<|im_start|>' + last.name + ' to=assistant<|endoftext|>' + m.content + '<|im_end|>' }}"
    "{% elif m.role == 'assistant' %}{{ '<|im_start|>assistant final<|endoftext|>' + m.content + '<|im_end|>' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '<|endoftext|>' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)


def test_a_tool_call_ends_before_the_next_message_and_what_quotes_it_is_not_trained(byte_level):
    """As gpt-oss: an end of its own, the tool's name again in the header of its result, a channel before the words."""
    messages = [user("u"), model("", tool_calls=[call("look", at="x")]), {"role": "tool", "content": "t"}, model("yes")]
    rendering = reader(byte_level, template=CHANNELS).read({"messages": messages})
    assert trained(rendering) == [
        ' to=look<|endoftext|>{"at": "x"}<|endoftext|>',
        " final<|endoftext|>yes<|im_end|>",
    ]
    assert rendering.facts == {}


def test_the_end_of_an_empty_message_is_not_that_of_the_turn_before(byte_level):
    source = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
        "{{ '' if m.open else '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    record = {"messages": [user("u"), model("b", open=True), user(""), model("a")]}
    rendering = reader(byte_level, template=source).read(record)
    assert trained(rendering) == ["b", "a" + END]
    assert rendering.facts == {"turns_without_a_trained_end": 1}


def test_words_that_a_template_leaves_out_are_counted(byte_level):
    answer = model("yes", reasoning_content="so", tool_calls=[call()])
    record = {"messages": [user("u"), answer, {"role": "note", "content": "n"}], "tools": [{"name": "f"}]}
    expected = {
        "reasoning_left_out": 1,
        "tool_calls_left_out": 1,
        "tools_left_out": 1,
        "turns_of_unknown_roles": 1,
    }
    assert reader(byte_level).read(record).facts == expected
    some = "{% for m in messages if m.role != 'note' %}{{ m.role + m.content + '<|im_end|>' }}{% endfor %}"
    expected |= {"content_left_out": 1, "turns_left_out": 1}
    assert reader(byte_level, template=some).read(record).facts == expected
    aware = {"messages": [user("u"), model("", tool_calls=[call()])], "tools": [{"name": "f"}]}
    assert reader(byte_level, template="{{ tools | tojson }}" + SCAFFOLD).read(aware).facts == {}
    assert reader(byte_level, roles=("note",)).read({"messages": [*record["messages"][::2]]}).facts == {}


def test_turns_of_unknown_roles_are_counted_of_directly_rendered_chats_too(byte_level):
    records = reader(byte_level)
    record = {"messages": [{"role": "human", "content": "u"}, model("a")]}
    for literals in ((), None):
        rendering = records.read(record)
        assert rendering.facts == {"turns_of_unknown_roles": 1}
        assert (rendering.literals is None) == (literals is None) or rendering.literals is None


def test_a_key_without_a_value_is_no_key_as_in_transformers(byte_level):
    transformers = pytest.importorskip("transformers")
    reference = transformers.PreTrainedTokenizerFast(tokenizer_file=str(byte_level / "tokenizer.json"))
    source = "{% for m in messages %}{{ m.content }}{% if 'name' in m %}({{ m.name }}){% endif %}<|im_end|>{% endfor %}"
    messages = [user("u", name=None), model("a", name="x", tool_calls=None)]
    rendering = reader(byte_level, template=source).read({"messages": messages})
    assert rendering.text == "u<|im_end|>a(x)<|im_end|>"
    assert rendering.text == reference.apply_chat_template(messages, chat_template=source, tokenize=False)
