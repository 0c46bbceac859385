"""The turns of a rendered chat: where each begins and ends, and what of it is trained.

A turn of the model reads   header | opening | words … | closing | end of turn   in the rendering. The header is what
the generation prompt writes and is never trained. Words, what the template writes between and after them (the closing
of a tool call), and the end of turn are what the model has to produce: trained. The opening is trained when the words
start with reasoning or a tool call (`<think>`, `<tool_call>` are the model's own); an empty scaffold before a plain
answer is what the prompt of a non-thinking model carries, so it is not.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from prep.encode.masks import merge_spans, subtract_spans
from prep.encode.options import MaskPolicy
from prep.encode.templates import ChatTemplate, MarkedChat


class TurnMarks(NamedTuple):
    """What a template writes around a model's turn; found by rendering small chats."""

    header: str
    """The generation prompt, as far as every turn begins with it; empty when the template has none."""
    ends: tuple[str, ...]
    """End-of-turn texts, the longest first; empty when the template writes none."""
    takes_lists: bool
    """Whether the template writes the text of a content list itself."""


class _Words(NamedTuple):
    """The words of one message in a rendering."""

    start: int
    end: int
    opens: bool
    """They begin with reasoning or a tool call, whose opening is the model's own."""
    pieces: list[tuple[int, int, int]]
    """(part of the content, start, end)."""


def probe_turns(template: ChatTemplate, control: re.Pattern | None) -> TurnMarks:
    """Learn header and end of turn of a template from what it writes around one-letter messages.

    The end of the last turn is what follows its words, up to the end of the first run of control tokens. The end of an
    earlier turn is the same text, or where a template ends it differently (gpt-oss), the first control token after it.

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
    return TurnMarks(header, tuple(sorted(set(ends), key=len, reverse=True)), _takes_lists(template, user, model))


def _header(template: ChatTemplate, user: Mapping) -> str:
    try:
        before = template.render([user])
        prompt = template.render([user], add_generation_prompt=True)
    except ValueError:  # a template may refuse a chat without an answer
        return ""
    return prompt[len(before) :] if prompt.startswith(before) else ""


def _takes_lists(template: ChatTemplate, user: Mapping, model: Mapping) -> bool:
    as_list = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in (user, model)]
    try:
        return template.render(as_list) == template.render([user, model])
    except ValueError:
        return False


class Trained(NamedTuple):
    """What is trained of a rendered chat."""

    spans: list[tuple[int, int]]
    """Character ranges, ascending and disjoint."""
    facts: dict[str, int]
    """What a user should hear of, for the ledger: name → count."""


def trained_spans(
    chat: MarkedChat, messages: Sequence[Mapping], template: ChatTemplate, turns: TurnMarks, policy: MaskPolicy
) -> Trained:
    """What is trained of a rendered chat, and what could not be.

    A turn without words trains nothing, not even its end (unless the template's `{% generation %}` says so): an empty
    answer is a defect of the data, and nobody wants a model that has learnt to stop at once. Such turns are counted as
    `turns_without_words`; trained turns that the template does not close, or whose end its `{% generation %}` leaves
    out, as `turns_without_a_trained_end`.

    Raises:
        ValueError: a trained turn cannot be located.
    """
    if policy.train_on == "all":
        return Trained([(0, len(chat.text))] if chat.text else [], {})
    words = _words(chat)
    trained = _trained_messages(messages, policy)
    find = _generation_spans if template.has_generation else _turn_spans
    spans, endless = find(chat, words, trained, turns, policy)
    wordless = sum(message not in words for message in trained)
    facts = {"turns_without_words": wordless, "turns_without_a_trained_end": endless}
    spans = _apply_part_flags(spans, words, messages, trained)
    return Trained(spans, {name: count for name, count in facts.items() if count})


def _trained_messages(messages: Sequence[Mapping], policy: MaskPolicy) -> list[int]:
    trained = [i for i, message in enumerate(messages) if _is_trained(message, policy)]
    if policy.train_on == "last-turn":
        return trained[-1:]
    if policy.train_on == "completion":
        others = [i for i, message in enumerate(messages) if message["role"] not in policy.roles]
        return [i for i in trained if not others or i > others[-1]]
    return trained


def _is_trained(message: Mapping, policy: MaskPolicy) -> bool:
    if message.get("train") is False or message.get("weight") == 0:
        return False
    return message.get("train") is True or message["role"] in policy.roles


def _words(chat: MarkedChat) -> dict[int, _Words]:
    found: dict[int, _Words] = {}
    previous = None
    for number, start, end in chat.words:
        origin = chat.origins[number]
        if origin.message not in found:
            opens = origin.field != "content" or not origin.leads
            found[origin.message] = _Words(start, end, opens, [(origin.part, start, end)])
        else:
            words = found[origin.message]
            words.pieces.append((origin.part if origin.field == "content" else -1, start, end))
            # What lies between the words of one message counts as its own, so nothing foreign may.
            found[origin.message] = words._replace(end=end if previous == origin.message else -1)
        previous = origin.message
    return found


def _turn_spans(chat, words, trained, turns, policy):
    """(spans, trained turns that have no end, where they should have one)."""
    spans, endless = [], 0
    order = sorted((found.start, message) for message, found in words.items())
    limits = {message: start for (_, message), (start, _) in pairwise(order)}
    floors = {message: words[before].end for (_, before), (_, message) in pairwise(order)}
    ending = {"turn": trained, "all": list(words), "last": trained[-1:], "none": []}[policy.end_of_turn]
    for message in sorted({*trained, *ending}):
        if message < 0 or message not in words:
            continue  # a message without words has nothing to train
        start, end, opens, _ = words[message]
        if end < 0:
            raise ValueError(
                f"the chat template scatters the words of message {message + 1}, so they cannot be located; "
                "give a template with {% generation %} blocks"
            )
        begin, stop = _end_of_turn(chat.text, end, limits.get(message, len(chat.text)), turns.ends)
        if message in trained:
            header = chat.text.rfind(turns.header, floors.get(message, 0), start) if turns.header else -1
            if header >= 0:
                # White space between header and words is the words' own, which the template kept.
                opening = chat.text[header + len(turns.header) : start]
                start -= len(opening) if opens or opening.isspace() else 0
            spans.append((start, begin))
        if message in ending:
            spans.append((begin, stop))
            endless += begin == stop and message in trained
    return merge_spans(spans), endless


def _end_of_turn(text: str, end: int, limit: int, ends: Sequence[str]) -> tuple[int, int]:
    """(where the end of turn begins, where it ends) after words that end at `end`; `limit` is the next word.

    The end of turn follows at once, or after the closing of a tool call. Without one, both are `end`.
    """
    for candidate in ends:
        if text.startswith(candidate, end):
            return end, end + len(candidate)
    found = [(text.find(candidate, end, limit), candidate) for candidate in ends]
    found = [(position, candidate) for position, candidate in found if position >= 0]
    if not found:
        return end, end
    position, candidate = min(found)
    return position, position + len(candidate)


def _generation_spans(chat, words, trained, turns, policy):
    """The template's own `{% generation %}` blocks, but for those of messages that are not trained; and how many of
    them leave out an end of turn that the policy wants trained."""
    spans = []
    for start, end in chat.generations:
        inside = {m for m, found in words.items() if any(start <= s and e <= end for _, s, e in found.pieces)}
        if inside and not inside & set(trained):
            continue
        if not inside and policy.train_on != "assistant":
            continue
        spans.append((start, end))
    cut = {"none": spans, "last": spans[:-1]}.get(policy.end_of_turn, [])
    holes = []
    for start, end in cut:
        body = chat.text[start:end].rstrip()
        holes += [(start + len(body) - len(e), end) for e in turns.ends if body.endswith(e)]
    ending = {"none": [], "last": spans[-1:]}.get(policy.end_of_turn, spans)
    endless = sum(not chat.text[start:end].rstrip().endswith(turns.ends) for start, end in ending)
    return subtract_spans(spans, holes), endless


def _apply_part_flags(spans, words, messages, trained):
    """`train` on the parts of a content list: what lies between two parts belongs to the earlier one."""
    holes, extra = [], []
    for message, found in words.items():
        content = messages[message].get("content") if message >= 0 else None
        if not isinstance(content, list):
            continue
        for k, (part, start, end) in enumerate(found.pieces):
            flag = content[part].get("train") if part >= 0 and isinstance(content[part], dict) else None
            if flag is False and message in trained:
                first = min(start, *(s for s, e in spans if s <= start < e)) if k == 0 and spans else start
                holes.append((first, found.pieces[k + 1][1] if k + 1 < len(found.pieces) else end))
            elif flag is True:
                extra.append((start, end))
    if not holes and not extra:
        return spans
    return merge_spans([*subtract_spans(spans, holes), *extra])
