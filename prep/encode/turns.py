"""What a chat template writes around the words of a turn, learnt from small chats.

A turn of the model reads   header | opening | words … | closing | end of turn   in a rendering.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from prep.encode.templates import ChatTemplate, MarkedChat


class TurnMarks(NamedTuple):
    """What a template writes around a model's turn."""

    header: str
    """The generation prompt, as far as every turn begins with it; empty when the template has none."""
    start: str
    """The control token that a header begins with, which begins a message thus; empty when it begins with none."""
    scaffolds: tuple[str, ...]
    """Openings of plain turns that a prompt may hold (`<think>\\n\\n</think>\\n\\n`), the longest first."""
    openings: tuple[str, ...]
    """Openings of plain turns that the model writes itself (gpt-oss: its channel)."""
    ends: tuple[str, ...]
    """End-of-turn texts, the longest first; empty when the template writes none."""
    takes_lists: bool
    """Whether the template writes the text of a content list itself."""


def probe_turns(template: ChatTemplate, control: re.Pattern | None) -> TurnMarks:
    """Learn what a template writes around one-letter messages.

    The end of the last turn is what follows its words, up to the end of the first run of control tokens. The end of an
    earlier turn is the same text, or where a template ends it differently (gpt-oss), the first control token after it;
    that of a tool call may be yet another.

    Raises:
        ValueError: the template does not write a plain chat as a chat.
    """
    user, model = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}
    chat = template.render_marked([user, model, user, model], None)
    ranges = [(start, end) for _, start, end in chat.words]
    if [chat.origins[number].message for number, _, _ in chat.words] != [0, 1, 2, 3]:
        raise ValueError("the chat template does not write each of four plain messages once; it is not supported")
    ends = []
    tail = chat.text[ranges[3][1] :]
    if control is not None and (run := re.search(f"(?:{control.pattern})+", tail)):
        ends.append(tail[: run.end()])
        between = chat.text[ranges[1][1] : ranges[2][0]]
        if not between.startswith(ends[0]) and (first := control.search(between)):
            ends.append(between[: first.end()])
    header = _header(template, user)
    between = chat.text[ranges[0][1] : ranges[1][0]]
    while header and header not in between:
        header = header[:-1]  # a generation prompt may end in a scaffold that a turn does not have
    first = control.match(header) if control is not None else None
    start = first.group() if first and first.group() not in ends else ""
    if start and (call_end := _end_of_call(template, user, control, start)):
        ends.append(call_end)
    scaffolds, openings = _openings(template, user, chat, ranges, header, control)
    ends = tuple(sorted(set(ends), key=len, reverse=True))
    return TurnMarks(header, start, scaffolds, openings, ends, _takes_lists(template, user, model))


def _header(template: ChatTemplate, user: Mapping) -> str:
    try:
        before = template.render([user])
        prompt = template.render([user], add_generation_prompt=True)
    except ValueError:  # a template may refuse a chat without an answer
        return ""
    return prompt[len(before) :] if prompt.startswith(before) else ""


def _end_of_call(template: ChatTemplate, user: Mapping, control: re.Pattern, start: str) -> str:
    """The control token between a tool call and the `start` of the next message; empty where there is none."""
    for arguments in ({"k": "v"}, '{"k": "v"}'):
        call = {"id": "call00001", "type": "function", "function": {"name": "f", "arguments": arguments}}
        model = {"role": "assistant", "content": "", "tool_calls": [call]}
        tool = {"role": "tool", "name": "f", "tool_call_id": "call00001", "content": "t"}
        try:
            chat = template.render_marked([user, model, tool], None)
        except ValueError:  # it knows no tool calls, or none with such arguments
            continue
        first = {number: span for number, *span in reversed(chat.words)}  # a later message may repeat a word
        owners = [(chat.origins[number].message, *span) for number, span in first.items()]
        ends = [end for message, _, end in owners if message == 1]
        nexts = [begin for message, begin, _ in owners if message == 2]
        between = chat.text[max(ends) : min(nexts)] if ends and nexts else ""
        before, _, _ = between.partition(start) if start in between else ("", "", "")
        tokens = list(control.finditer(before))
        if tokens and not before[tokens[-1].end() :].strip():
            return tokens[-1].group()
    return ""


def _openings(template, user, chat: MarkedChat, ranges: Sequence[tuple[int, int]], header: str, control):
    """(scaffolds, openings of the model's own) of plain turns."""
    found = set()
    for before, word in ((ranges[0], ranges[1]), (ranges[2], ranges[3])):
        at = chat.text.rfind(header, before[1], word[0]) if header else -1
        if at >= 0:
            found.add(chat.text[at + len(header) : word[0]])
    found = {opening for opening in found if opening.strip()}
    scaffolds, own = [], []
    for opening in sorted(found, key=len, reverse=True):
        # Control tokens choose a channel, unless a prompt can choose it: there is no third kind of opening in use.
        is_own = control is not None and control.search(opening) and not _prompts(template, user, header + opening)
        (own if is_own else scaffolds).append(opening)
    return tuple(scaffolds), tuple(own)


def _prompts(template: ChatTemplate, user: Mapping, text: str) -> bool:
    """Whether the prompt of a model that shall not think ends so."""
    try:
        return template.render([user], add_generation_prompt=True, enable_thinking=False).endswith(text)
    except ValueError:
        return False


def _takes_lists(template: ChatTemplate, user: Mapping, model: Mapping) -> bool:
    as_list = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in (user, model)]
    try:
        return template.render(as_list) == template.render([user, model])
    except ValueError:
        return False
