"""Which characters of a rendered chat are trained, and which tokens that makes targets.

A turn of the model reads   header | opening | words … | closing | end of turn   in the rendering. The header is what
the generation prompt writes and is never trained. Words, what the template writes between and after them (the closing
of a tool call), and the end of turn are what the model has to produce: trained. The opening is trained when the words
start with reasoning or a tool call (`<think>`, `<tool_call>` are the model's own); an empty scaffold before a plain
answer is what the prompt of a non-thinking model carries, so it is not.

A token is a target when at least one of its bytes is trained. Where a merge crosses the start of a turn (a content
that begins with a newline after `assistant\\n`), the crossing token is thus a target, as in transformers.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from prep.encode.templates import ChatTemplate, MarkedChat, TemplateMismatchError

TRAIN_ON = ("assistant", "all", "completion", "last-turn")
END_OF_TURN = ("all", "turn", "last", "none")


@dataclass(frozen=True)
class MaskPolicy:
    """What is trained in a record.

    train_on: `assistant` trains every turn of `roles`; `last-turn` only the last of them; `completion` what follows the
        last message of another role; `all` every token.
    roles: roles whose turns are trained.
    end_of_turn: `turn` trains the end of each trained turn, `all` that of every turn, `last` only the last one, `none` none.
    """

    train_on: str = "assistant"
    roles: tuple[str, ...] = ("assistant",)
    end_of_turn: str = "turn"

    def __post_init__(self):
        if self.train_on not in TRAIN_ON:
            raise ValueError(f"train_on is {self.train_on!r}; choose one of {', '.join(TRAIN_ON)}")
        if self.end_of_turn not in END_OF_TURN:
            raise ValueError(f"end_of_turn is {self.end_of_turn!r}; choose one of {', '.join(END_OF_TURN)}")


@dataclass(frozen=True)
class Rendering:
    """A document as text, before its tokens.

    spans: character ranges that are trained, ascending and disjoint.
    injected: whether a control token stands inside the words of the record, where it must stay text.
    literals: character ranges written by the template: only control tokens in there are real. Used when `injected`.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    injected: bool = False
    literals: tuple[tuple[int, int], ...] = ()
    add_prefix: bool = False
    add_eos: bool = False
    eos_is_target: bool = True
    facts: Mapping[str, int] = field(default_factory=dict)


class TurnMarks(NamedTuple):
    """What a template writes around a model's turn; found by rendering two small chats."""

    header: str
    """The generation prompt, stripped of what stays at its edges; empty when the template has none."""
    ends: tuple[str, ...]
    """End-of-turn texts, the longest first; empty when the template writes none."""


def probe_turns(template: ChatTemplate, control: re.Pattern | None) -> TurnMarks:
    """Learn header and end of turn of a template from what it writes around one-letter messages.

    The end of the last turn is what follows its words, up to the end of the first run of control tokens. The end of an
    earlier turn is the same text, or where a template ends it differently (gpt-oss), the first control token after it.
    """
    user, model = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}
    chat = template.render_marked([user, model, user, model], None, cut_at_tags=False)
    ranges = [(start, end) for _, start, end in chat.words]
    if len(ranges) != 4:
        raise ValueError("the chat template does not write each of four plain messages once; it is not supported")
    ends = []
    tail = chat.text[ranges[3][1] :]
    if control is not None and (run := re.search(f"(?:{control.pattern})+", tail)):
        ends.append(tail[: run.end()])
        between = chat.text[ranges[1][1] : ranges[2][0]]
        if not between.startswith(ends[0]) and (first := control.search(between)):
            ends.append(between[: first.end()])
    before = template.render([user])
    prompt = template.render([user], add_generation_prompt=True)
    header = prompt[len(before) :] if prompt.startswith(before) else ""
    # A turn without reasoning may open with an empty scaffold; the header is what every turn begins with.
    between = chat.text[ranges[0][1] : ranges[1][0]]
    while header and header not in between:
        header = header[:-1]
    return TurnMarks(header, tuple(sorted(ends, key=len, reverse=True)))


def render_chat(
    template: ChatTemplate,
    turns: TurnMarks,
    control: re.Pattern | None,
    messages: Sequence[dict],
    tools: Sequence | None,
    policy: MaskPolicy,
) -> Rendering:
    """Render a chat and find what is trained in it.

    Raises:
        ValueError: the template refuses the chat, or its words cannot be located in the rendering.
    """
    try:
        chat = template.render_marked(messages, tools, cut_at_tags=False)
    except TemplateMismatchError:
        chat = template.render_marked(messages, tools, cut_at_tags=True)
    ranges = _message_ranges(chat)
    literals = _complement([(s, e) for _, s, e in chat.words], len(chat.text))
    injected = control is not None and any(control.search(chat.text, s, e) for _, s, e in chat.words)
    if policy.train_on == "all":
        spans = [(0, len(chat.text))]
    elif template.has_generation:
        spans = chat.generations[-1:] if policy.train_on == "last-turn" else chat.generations
    else:
        spans = _turn_spans(chat, ranges, turns, messages, policy)
    return Rendering(chat.text, tuple(_merge(spans)), injected, tuple(literals))


def is_trained(message: Mapping, policy: MaskPolicy) -> bool:
    """Whether a message's own flags and role ask for training."""
    if message.get("train") is False or message.get("weight") == 0:
        return False
    return message.get("train") is True or message["role"] in policy.roles


def _trained_messages(messages: Sequence[Mapping], policy: MaskPolicy) -> list[int]:
    trained = [i for i, message in enumerate(messages) if is_trained(message, policy)]
    if policy.train_on == "last-turn":
        return trained[-1:]
    if policy.train_on == "completion":
        others = [i for i, message in enumerate(messages) if message["role"] not in policy.roles]
        return [i for i in trained if not others or i > others[-1]]
    return trained


def _message_ranges(chat: MarkedChat) -> dict[int, tuple[int, int, bool]]:
    """Message → (start of its first word, end of its last, whether the first word needs an opening of its own)."""
    ranges: dict[int, tuple[int, int, bool]] = {}
    previous = None
    for number, start, end in chat.words:
        origin = chat.origins[number]
        if origin.message in ranges:
            first, _, opens = ranges[origin.message]
            # A message's words must stand together, else what lies between would be taken for its own.
            ranges[origin.message] = (first, end if previous == origin.message else -1, opens)
        else:
            ranges[origin.message] = (start, end, origin.field != "content" or not origin.leads)
        previous = origin.message
    return ranges


def _turn_spans(chat, ranges, turns, messages, policy):
    spans = []
    trained = _trained_messages(messages, policy)
    order = sorted((start, message) for message, (start, _, _) in ranges.items())
    following = {message: order[k + 1][0] for k, (_, message) in enumerate(order[:-1])}
    preceding = {order[k + 1][1]: ranges[message][1] for k, (_, message) in enumerate(order[:-1])}
    ending = set(trained if policy.end_of_turn in ("turn", "all") else trained[-1:] * (policy.end_of_turn == "last"))
    for message in ranges if policy.end_of_turn == "all" else trained:
        if message not in ranges or message < 0:
            continue
        start, end, opens = ranges[message]
        if end < 0:
            raise ValueError(
                f"the chat template scatters the words of message {message + 1}, so they cannot be located; "
                "give a template with {% generation %} blocks"
            )
        stop = _end_of_turn(chat.text, end, following.get(message, len(chat.text)), turns.ends)
        if message not in trained:
            spans.append((stop[0], stop[1]))
            continue
        if opens and turns.header:
            header = chat.text.rfind(turns.header, preceding.get(message, 0), start)
            start = start if header < 0 else header + len(turns.header)
        spans.append((start, stop[1] if message in ending else stop[0]))
    return spans


def _end_of_turn(text: str, end: int, limit: int, ends: Sequence[str]) -> tuple[int, int]:
    """(where the end of turn begins, where it ends) after the words that end at `end`; `limit` is the next word.

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


def _complement(ranges, length):
    out, last = [], 0
    for start, end in ranges:
        if start > last:
            out.append((last, start))
        last = end
    if length > last:
        out.append((last, length))
    return out


def _merge(spans):
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if start >= end:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def byte_spans(text: str, spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Character ranges → byte ranges of the UTF-8 text, in one pass."""
    if text.isascii():
        return list(spans)
    out, position, at = [], 0, 0
    for start, end in spans:
        at += len(text[position:start].encode())
        stop = at + len(text[start:end].encode())
        out.append((at, stop))
        position, at = end, stop
    return out


def target_mask(starts: np.ndarray, ends: np.ndarray, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """Tokens that hold at least one byte of a span: uint8[T].

    Args:
        starts, ends: byte range of each token, int64[T], both ascending; an empty range is never a target.
        spans: byte ranges, ascending and disjoint.
    """
    if not spans:
        return np.zeros(len(starts), np.uint8)
    bounds = np.array(spans, np.int64)
    # The first span that ends behind the token's start is the only one that can begin before the token's end.
    candidate = np.searchsorted(bounds[:, 1], starts, side="right")
    span_starts = np.append(bounds[:, 0], np.iinfo(np.int64).max)
    return ((span_starts[candidate] < ends) & (starts < ends)).astype(np.uint8)
