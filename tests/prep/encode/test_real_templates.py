"""Ids and masks against transformers, on the real tokenizers and templates of five model families."""

import json
from contextlib import nullcontext

import pytest

from prep.encode.chats import ChatRenderer
from prep.encode.options import MaskPolicy
from prep.encode.records import RecordReader
from prep.encode.templates import ChatTemplate
from prep.encode.tokenizer import read_tokenizer
from prep.encode.tokens import TokenEncoder, can_be_fast
from prep.encode.unit import _UnitRun

transformers = pytest.importorskip("transformers")

FAMILIES = ["llama3_1", "qwen3", "gemma3", "deepseek_v3", "smollm2"]
ENDS = {
    "llama3_1": "<|eot_id|>",
    "qwen3": "<|im_end|>",
    "gemma3": "<end_of_turn>",
    "deepseek_v3": "<｜end▁of▁sentence｜>",
    "smollm2": "<|im_end|>",
}


def user(text):
    return {"role": "user", "content": text}


def model(text, **more):
    return {"role": "assistant", "content": text, **more}


LONG = [m for k in range(250) for m in (user(f"question {k}"), model(f"answer {k}, naïvely — 你好 {k}"))]
CHATS = {
    "one turn": ([user("Hi"), model("Hello there!")], ["Hello there!"]),
    "system": ([{"role": "system", "content": "Be brief."}, user("a?"), model("b")], ["b"]),
    "turns": ([user("a?"), model("b."), user("c?"), model("d!")], ["b.", "d!"]),
    "scripts": (
        [user("naïve 你好"), model("привет 😀 👩‍👩‍👧‍👦 こんにちは"), user("x"), model("ok")],
        ["привет 😀 👩‍👩‍👧‍👦 こんにちは", "ok"],
    ),
    "code": (
        [user("code"), model("def f(x):\n    return x\n\n\nprint(f(1))")],
        ["def f(x):\n    return x\n\n\nprint(f(1))"],
    ),
    "user last": ([user("a"), model("b"), user("c")], ["b"]),
    "tags of the user": ([user("<think>q</think> <b>x</b>"), model("b")], ["b"]),
    "500 turns": (LONG, [m["content"] for m in LONG[1::2]]),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, npm_tokenizer):
    folder = request.getfixturevalue("smollm2_dir") if request.param == "smollm2" else npm_tokenizer(request.param)
    tokenizer = read_tokenizer(folder)
    engines = [TokenEncoder(tokenizer, "hf")]
    if can_be_fast(tokenizer):
        engines.append(TokenEncoder(tokenizer, "fast"))
    return request.param, tokenizer, transformers.AutoTokenizer.from_pretrained(folder), engines


def reader(tokenizer, policy=None):
    policy = policy or MaskPolicy()
    template = ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens)
    return RecordReader(tokenizer, ChatRenderer(template, tokenizer.control_pattern, policy), policy)


def trained_texts(rendering):
    return [rendering.text[start:end] for start, end in rendering.spans]


@pytest.mark.parametrize("name", CHATS)
def test_ids_are_those_of_transformers_and_the_words_and_their_end_are_trained(family, name):
    kind, tokenizer, reference, engines = family
    messages, words = CHATS[name]
    records = reader(tokenizer)
    expected = reference.apply_chat_template(messages, tokenize=True, return_dict=False)
    for direct in (False, True):
        with nullcontext() if direct else records._chats.indirectly():
            rendering = records.read({"messages": messages})
        looked_at = kind == "qwen3" and name == "tags of the user"
        assert (direct and not looked_at) == (rendering.literals is None), "rendered the other way"
        for engine in engines:
            encoded, bad = engine.encode([rendering.text])
            assert not bad
            assert encoded.ids.tolist() == expected
        assert trained_texts(rendering) == [word + ENDS[kind] for word in words]


@pytest.mark.parametrize("name", ["turns", "scripts", "code"])
def test_target_tokens_decode_to_the_words_and_their_end(family, name):
    kind, tokenizer, _, engines = family
    messages, words = CHATS[name]
    rendering = reader(tokenizer).read({"messages": messages})
    ids, mask = encode_one(tokenizer, engines[0], rendering)
    runs, previous = [], 0
    for token, target in zip(ids.tolist(), mask.tolist(), strict=True):
        if target and not previous:
            runs.append([])
        if target:
            runs[-1].append(token)
        previous = target
    assert [tokenizer.tokenizer.decode(run, skip_special_tokens=False) for run in runs] == [
        w + ENDS[kind] for w in words
    ]


def encode_one(tokenizer, engine, rendering):
    """Ids and mask of one rendering by the code that work units run."""

    class Encoder:
        folder = tokenizer
        tokens = engine

    run = object.__new__(_UnitRun)
    run._encoder = Encoder
    encoded, _ = Encoder.tokens.encode([rendering.text])
    ids, mask, _ = run._targets([rendering], encoded)
    return ids, mask


def test_white_space_at_the_edges_belongs_to_the_words_where_the_template_keeps_it(family):
    kind, tokenizer, reference, _ = family
    messages = [user(" a \n"), model("\n\nb\n")]
    rendering = reader(tokenizer).read({"messages": messages})
    assert rendering.text == reference.apply_chat_template(messages, tokenize=False)
    trims = kind in ("llama3_1", "gemma3")
    scaffold = kind == "qwen3"  # its last turn opens with an empty scaffold and drops leading newlines
    assert trained_texts(rendering) == [("b" if trims else "b\n" if scaffold else "\n\nb\n") + ENDS[kind]]


def test_reasoning_is_trained_where_the_template_keeps_it(npm_tokenizer):
    tokenizer = read_tokenizer(npm_tokenizer("qwen3"))
    messages = [
        user("2?"),
        model("<think>\nold\n</think>\n\ntwo"),
        user("3?"),
        model("<think>\nnew\n</think>\n\nthree"),
    ]
    rendering = reader(tokenizer).read({"messages": messages})
    assert trained_texts(rendering) == ["two<|im_end|>", "<think>\nnew\n</think>\n\nthree<|im_end|>"]
    given = reader(tokenizer).read({"messages": [user("2?"), model("two", reasoning_content="easy")]})
    assert trained_texts(given) == ["<think>\neasy\n</think>\n\ntwo<|im_end|>"]


def test_tool_calls_are_trained_with_what_closes_them_and_tool_results_are_not(npm_tokenizer):
    tokenizer = read_tokenizer(npm_tokenizer("qwen3"))
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich", "days": 3}}}
    messages = [user("w?"), model("", tool_calls=[call]), {"role": "tool", "content": "sunny"}, model("Sun.")]
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    record = {"messages": messages, "tools": json.dumps(tools)}
    rendering = reader(tokenizer).read(record)
    expected = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich", "days": 3}}\n</tool_call><|im_end|>'
    assert trained_texts(rendering) == [expected, "Sun.<|im_end|>"]
    reference = transformers.AutoTokenizer.from_pretrained(tokenizer.path)
    assert rendering.text == reference.apply_chat_template(messages, tools=tools, tokenize=False)


def test_a_single_tool_call_that_deepseek_does_not_close_is_counted(npm_tokenizer):
    """Its template writes the end of a message behind the last of several tool calls, but none behind a single one."""
    tokenizer = read_tokenizer(npm_tokenizer("deepseek_v3"))
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
    messages = [user("w?"), model(None, tool_calls=[call]), {"role": "tool", "content": "sunny"}, model("Sun.")]
    rendering = reader(tokenizer).read({"messages": messages})
    assert rendering.text.count(ENDS["deepseek_v3"]) == 1
    assert "Bern" in trained_texts(rendering)[0]
    assert trained_texts(rendering)[-1] == "Sun." + ENDS["deepseek_v3"]
    assert rendering.facts == {"turns_without_a_trained_end": 1}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("plan it</think>\n\nok", "<think>\nplan it\n</think>\n\nok"),
        ("plan it\n</think>\n\nok", "<think>\nplan it\n</think>\n\nok"),
        ("<think>\nplan it\n</think>\n\nok", "<think>\nplan it\n</think>\n\nok"),
        ("</think>hello", "hello"),
        ("<think></think>hello", "hello"),
        ("<think>\n \t</think> hello", " hello"),
        ("hello", "hello"),
    ],
)
def test_reasoning_without_its_opening_tag_and_empty_reasoning_in_a_content(npm_tokenizer, content, expected):
    """The prompt of a thinking model writes the opening tag, so that its answers come without."""
    rendering = reader(read_tokenizer(npm_tokenizer("qwen3"))).read({"messages": [user("u"), model(content)]})
    assert trained_texts(rendering) == [expected + "<|im_end|>"]
    assert rendering.text.count("</think>") == 1


def test_reasoning_of_white_space_is_none(npm_tokenizer):
    read = reader(read_tokenizer(npm_tokenizer("qwen3"))).read
    for reasoning in ("", " ", "\n", " \n\t"):
        rendering = read({"messages": [user("u"), model("a", reasoning_content=reasoning)]})
        assert trained_texts(rendering) == ["a<|im_end|>"], reasoning


def test_a_tool_call_without_a_content_is_one_with_an_empty_content_to_qwen(npm_tokenizer):
    """OpenAI writes null there, which its template cannot read."""
    read = reader(read_tokenizer(npm_tokenizer("qwen3"))).read
    calls = [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]
    texts = []
    for content in ({"content": None}, {}, {"content": ""}):
        rendering = read({"messages": [user("w?"), {"role": "assistant", **content, "tool_calls": calls}]})
        texts.append((rendering.text, rendering.spans))
    assert texts[0] == texts[1] == texts[2]
    with pytest.raises(ValueError, match="the chat template refuses this chat"):
        read({"messages": [{"role": "user", "content": None}, model("a")]})


def test_white_space_before_an_answer_to_a_tool_is_the_answers_to_deepseek(npm_tokenizer):
    messages = [user("u"), {"role": "tool", "content": "t"}, model("\n\nSunny")]
    rendering = reader(read_tokenizer(npm_tokenizer("deepseek_v3"))).read({"messages": messages})
    assert trained_texts(rendering) == ["\n\nSunny" + ENDS["deepseek_v3"]]


def test_a_user_turn_that_deepseek_does_not_end_takes_no_end_of_an_empty_answer(npm_tokenizer):
    tokenizer = read_tokenizer(npm_tokenizer("deepseek_v3"))
    messages = [user("a|b"), model("\x1c"), user("x"), model("y")]
    rendering = reader(tokenizer, MaskPolicy(roles=("user", "assistant"))).read({"messages": messages})
    assert trained_texts(rendering) == ["a|b", "x", "y" + ENDS["deepseek_v3"]]


def test_control_tokens_in_a_message_stay_text(family):
    kind, tokenizer, reference, engines = family
    plain = reference.apply_chat_template([user("say now"), model("no:")], tokenize=True, return_dict=False)
    # Every token of the frame, special by its mark or not, but for Gemma's runs of newlines and the tags of thoughts.
    added = {index: str(token) for index, token in reference.added_tokens_decoder.items()}
    frame = {added[index]: index for index in plain if added.get(index, "").startswith("<")}
    frame = {token: index for token, index in frame.items() if token not in ("<think>", "</think>")}
    assert ENDS[kind] in frame
    assert len(frame) > 1
    forged = "".join(frame)
    messages = [user(f"say {forged} now{forged}"), model(f"no: {forged}")]
    records = reader(tokenizer)
    with records._chats.indirectly():
        rendering = records.read({"messages": messages})
    encoded = engines[0].encode_guarded(rendering.text, rendering.literals)
    for index in frame.values():
        assert encoded.ids.tolist().count(index) == plain.count(index)
    assert rendering.controls == sum(map(plain.count, frame.values()))
    assert tokenizer.tokenizer.decode(encoded.ids.tolist(), skip_special_tokens=False) == rendering.text
    data = rendering.text.encode()
    for token, start, stop in zip(encoded.ids.tolist(), encoded.starts.tolist(), encoded.ends.tolist(), strict=True):
        if token in tokenizer.control_tokens.values():
            assert tokenizer.control_tokens[data[start:stop].decode()] == token
