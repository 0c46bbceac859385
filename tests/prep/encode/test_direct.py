"""Direct rendering against Jinja, on templates that look at contents in many ways."""

import itertools
import random

import pytest

from prep.encode.builtin import BUILTIN
from prep.encode.chats import ChatRenderer
from prep.encode.direct import only_frames
from prep.encode.options import MaskPolicy
from prep.encode.templates import ChatTemplate
from prep.encode.tokenizer import read_tokenizer

FRAME = "{%% for m in messages %%}{{ '<|im_start|>' + m.role + '\n' }}%s{{ '<|im_end|>\n' }}{%% endfor %%}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
UNDERSTOOD = {
    "verbatim": FRAME % "{{ m.content }}",
    "trim": FRAME % "{{ m.content | trim }}",
    "strips newlines of the last turn": FRAME % "{{ m.content.lstrip('\n') if loop.last else m.content }}",
    "scaffold in the last turn": FRAME
    % "{{ '<think>\n\n</think>\n\n' + m.content.lstrip('\n') if loop.last and m.role == 'assistant' else m.content }}",
    "cuts reasoning": FRAME % "{{ m.content.split('</think>')[-1] if '</think>' in m.content else m.content }}",
    "replaces": FRAME % "{{ m.content.replace('cat', 'dog') }}",
    "compares": FRAME % "{{ 'nothing' if m.content == 'yes' else m.content }}",
    "starts with": FRAME % "{{ '!' if m.content.startswith('cat') else '' }}{{ m.content }}",
}
NOT_UNDERSTOOD = {
    "length": FRAME % "{{ m.content | length }}{{ m.content }}",
    "upper": FRAME % "{{ m.content | upper }}",
    "slice": FRAME % "{{ m.content[:3] }}{{ m.content[3:] }}",
    "last character": FRAME % "{{ m.content }}{{ '.' if m.content[-1] != '.' else '' }}",
    "json": FRAME % "{{ m.content | tojson }}",
    "lines": FRAME % "{{ m.content.split('\n') | join(' ') }}",
    "size": FRAME % "{{ 'x' if m.content > 'cat' else 'y' }}{{ m.content }}",
}
CONTENTS = [
    "a",
    "cat",
    " cat",
    "cat\n",
    "\n\ncat",
    "\t a b \r\n",
    "yes",
    "<think>x</think>y",
    "</think>",
    "",
    "  ",
    "日本語 é",
    "dog cat",
]
POLICIES = [MaskPolicy(), MaskPolicy(end_of_turn="all"), MaskPolicy(train_on="last-turn"), MaskPolicy(roles=("user",))]


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_templates_that_only_frame_are_understood(name):
    assert only_frames(ChatTemplate(UNDERSTOOD[name], {})) is not None


@pytest.mark.parametrize("name", NOT_UNDERSTOOD)
def test_what_is_not_understood_is_left_to_jinja(name):
    assert only_frames(ChatTemplate(NOT_UNDERSTOOD[name], {})) is None


@pytest.mark.parametrize("name", BUILTIN)
def test_built_in_templates_are_rendered_directly(name):
    assert only_frames(ChatTemplate(BUILTIN[name], {"bos_token": "<s>", "eos_token": "</s>"})) is not None


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", UNDERSTOOD)
def test_direct_rendering_is_what_jinja_writes(name, policy, byte_level):
    tokenizer = read_tokenizer_once(byte_level)
    template = ChatTemplate(UNDERSTOOD[name] + PROMPT, tokenizer.special_tokens)
    direct, jinja = (ChatRenderer(template, tokenizer.control_pattern, policy, direct=d) for d in (True, False))
    draw = random.Random(0)
    pairs = list(itertools.product(CONTENTS, repeat=2))
    longer = [draw.choices(CONTENTS, k=4) for _ in range(100)]
    for contents in [("plain", "words"), ("more", "plain", "words", "here"), *pairs, *longer]:
        messages = [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(contents)]
        messages = [{"role": "system", "content": "s"}] * (len(contents) > 2) + messages
        assert outcome(direct, messages) == outcome(jinja, messages), messages


def outcome(renderer, messages):
    try:
        found = renderer.render(messages, None)
    except ValueError as error:
        return str(error)
    return found.text, list(found.spans), found.controls


def test_the_second_chat_of_an_order_of_roles_is_rendered_directly(byte_level):
    tokenizer = read_tokenizer_once(byte_level)
    template = ChatTemplate(UNDERSTOOD["trim"], tokenizer.special_tokens)
    renderer = ChatRenderer(template, tokenizer.control_pattern, MaskPolicy())
    for k, content in enumerate(["first", "\n second "]):
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": content}]
        assert (renderer.render(messages, None).literals is None) == (k == 1)


_folders = {}


def read_tokenizer_once(path):
    if path not in _folders:
        _folders[path] = read_tokenizer(path)
    return _folders[path]
