"""Direct rendering against Jinja, on templates that look at contents in many ways."""

import itertools
import random

import pytest

from prep.encode.builtin import BUILTIN
from prep.encode.chats import ChatRenderer
from prep.encode.direct import Framed, Inspection, only_frames
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
POSITIONS = {
    "parity": FRAME % "{{ 'even ' if loop.index0 % 2 == 0 else 'odd ' }}{{ m.content }}",
    "position": FRAME % "{{ loop.index }}: {{ m.content }}",
    "left to come": FRAME % "{{ m.content }}{{ ' (more)' if loop.revindex0 > 1 else '' }}",
    "a default system": "{% if messages[0].role != 'system' %}{{ 'Be kind.\n' }}{% endif %}"
    + FRAME % "{{ m.content }}",
    "what comes next": FRAME
    % "{{ m.content }}{{ '!' if not loop.last and messages[loop.index0 + 1].role == 'assistant' else '?' }}",
    "number of messages": "{{ messages | length }}\n" + FRAME % "{{ m.content }}",
    "only of the last system": FRAME
    % "{{ m.content }}{{ ' [S]' if messages[0].role == 'system' and loop.last else '' }}",
    "skips the system": FRAME % "{{ m.content if m.role != 'system' else 'S' }}",
    "looks for the letter of the frame": FRAME % "{{ '!' if 'x' in m.content else '' }}{{ m.content }}",
    "generation": "{% for m in messages %}{{ m.role + ': ' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
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


@pytest.mark.parametrize("name", [*UNDERSTOOD, *POSITIONS])
def test_templates_that_only_frame_are_understood(name):
    assert only_frames(ChatTemplate({**UNDERSTOOD, **POSITIONS}[name], {})) is not None


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


def test_an_order_of_roles_is_learnt_from_its_first_plain_chat(byte_level):
    tokenizer = read_tokenizer_once(byte_level)
    template = ChatTemplate(UNDERSTOOD["trim"], tokenizer.special_tokens)
    renderer = ChatRenderer(template, tokenizer.control_pattern, MaskPolicy())
    assert renderer.render([{"role": "user", "content": "u"}, {"role": "assistant", "content": " "}], None).literals
    for content in ["\n first ", "second"]:
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": content}]
        assert renderer.render_directly(messages) is None or content == "second"
        assert type(renderer.render(messages, None)) is Framed


@pytest.mark.parametrize("name", NOT_UNDERSTOOD)
def test_no_order_is_learnt_that_jinja_does_not_confirm(name, byte_level, monkeypatch):
    """Even where the reading of the template were wrong: here it takes every template for one that only frames."""
    tokenizer = read_tokenizer_once(byte_level)
    template = ChatTemplate(NOT_UNDERSTOOD[name] + PROMPT, tokenizer.special_tokens)
    jinja = ChatRenderer(template, tokenizer.control_pattern, MaskPolicy(), direct=False)
    monkeypatch.setattr("prep.encode.chats.only_frames", lambda _: Inspection(frozenset(), ()))
    for contents in itertools.product([c for c in CONTENTS if c.strip()], repeat=2):
        direct = ChatRenderer(template, tokenizer.control_pattern, MaskPolicy())
        messages = [{"role": ("user", "assistant")[k], "content": text.strip()} for k, text in enumerate(contents)]
        assert outcome(direct, messages) == outcome(jinja, messages), messages


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", POSITIONS)
def test_what_depends_on_positions_is_learnt_for_every_order_of_roles(name, policy, byte_level):
    tokenizer = read_tokenizer_once(byte_level)
    template = ChatTemplate(POSITIONS[name] + PROMPT, tokenizer.special_tokens)
    direct, jinja = (ChatRenderer(template, tokenizer.control_pattern, policy, direct=d) for d in (True, False))
    learnt = 0
    for length in range(1, 5):
        for roles in itertools.product(("system", "user", "assistant"), repeat=length):
            for letter in ("a", "日 b"):
                messages = [{"role": role, "content": f"{letter} {k}"} for k, role in enumerate(roles)]
                assert outcome(direct, messages) == outcome(jinja, messages), messages
            learnt += direct.render_directly(messages) is not None
    expected = {"looks for the letter of the frame": 0, "skips the system": 2 + 4 + 8 + 16}
    assert learnt == expected.get(name, 3 + 9 + 27 + 81)


def test_an_order_that_jinja_did_not_confirm_is_not_tried_again(byte_level, monkeypatch):
    tokenizer = read_tokenizer_once(byte_level)
    template = ChatTemplate(POSITIONS["looks for the letter of the frame"], tokenizer.special_tokens)
    renderer = ChatRenderer(template, tokenizer.control_pattern, MaskPolicy())
    tries = []
    real = ChatTemplate.render_frame
    monkeypatch.setattr(ChatTemplate, "render_frame", lambda *given: tries.append(given) or real(*given))
    for _ in range(3):
        found = renderer.render([{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}], None)
        assert found.literals
    assert len(tries) == 1


_folders = {}


def read_tokenizer_once(path):
    if path not in _folders:
        _folders[path] = read_tokenizer(path)
    return _folders[path]
