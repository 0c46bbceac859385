"""What is trained of a rendered chat.

A turn of the model reads   header | opening | words … | closing | end of turn   in the rendering. The header is what
the generation prompt writes and is never trained. Words, what the template writes between and after them (the closing
of a tool call), and the end of turn are what the model has to produce: trained. So is the opening, where the words
start with reasoning or a tool call (`<think>`, `<tool_call>` are the model's own) and where no prompt writes it
(gpt-oss: the model names its channel). An empty scaffold of reasoning in front of either is what the prompt of a
non-thinking model carries, so it is not.
"""

import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import NamedTuple

from prep.encode.masks import merge_spans, subtract_spans
from prep.encode.options import ROLES, MaskPolicy
from prep.encode.templates import ASIDE, ChatTemplate, MarkedChat
from prep.encode.turns import TurnMarks


class Trained(NamedTuple):
    """What is trained of a rendered chat."""

    spans: list[tuple[int, int]]
    """Character ranges, ascending and disjoint."""
    facts: dict[str, int]
    """What a user should hear of, for the ledger: name → count."""


class _Words(NamedTuple):
    """The words of one message in a rendering."""

    start: int
    end: int
    """-1 where words of other messages stand between them."""
    opens: bool
    """They begin with reasoning or a tool call, whose opening is the model's own."""
    space: int
    """White space before the first, see `Origin`."""
    pieces: list[tuple[int, int, int]]
    """(part of the content, start, end)."""


def trained_spans(
    chat: MarkedChat, messages: Sequence[Mapping], template: ChatTemplate, turns: TurnMarks, policy: MaskPolicy
) -> Trained:
    """What is trained of a rendered chat, and what could not be.

    The flags of messages and parts (`train`, `weight: 0`) go before the policy, in every mode.

    A turn without words trains nothing, not even its end (unless the template's `{% generation %}` says so): an empty
    answer is a defect of the data, and nobody wants a model that has learnt to stop at once.

    Facts, each a number of turns:
        turns_without_words: trained, but nothing is written of them;
        turns_without_a_trained_end: the template does not close them, or its `{% generation %}` leaves the end out;
        turns_outside_generation: `{% generation %}` says that they are not the model's, so they are not trained;
        turns_of_unknown_roles: not trained, and of no role that is known;
        content_left_out, reasoning_left_out, tool_calls_left_out: the template does not write these, or not all;
        turns_left_out: it writes none of their words.

    Raises:
        ValueError: a trained turn cannot be located.
    """
    words = _words(chat)
    trained = _trained_messages(messages, policy)
    ending = _ending(trained, words if not template.has_generation else range(len(messages)), policy)
    located = _Located(chat, words, turns, lambda: template.render_frame([message["role"] for message in messages]))
    facts = _left_out(chat, words)
    if policy.train_on == "all":
        spans = _all_but(located, len(messages), trained, ending)
    else:
        find = _generation_spans if template.has_generation else _turn_spans
        spans, found = find(located, messages, trained, ending, policy)
        facts.update(found)
        facts["turns_without_words"] = sum(message not in words for message in trained)
        known = {*ROLES, *policy.roles}
        unknown = (i for i, message in enumerate(messages) if message["role"] not in known)
        facts["turns_of_unknown_roles"] = sum(i not in trained for i in unknown)
    spans = _apply_part_flags(spans, located, messages, trained, policy)
    return Trained(spans, {name: count for name, count in facts.items() if count})


def _flag(given: Mapping) -> bool | None:
    """What a message or a part says of itself: it is trained, it is not, or nothing."""
    train, weight = given.get("train"), given.get("weight")
    if (train is not None and not train) or (weight is not None and not weight):
        return False
    return True if train else None


def _trained_messages(messages: Sequence[Mapping], policy: MaskPolicy) -> dict[int, None]:
    """Indices of trained messages, ascending; a dict for a set that keeps its order."""
    flags = list(map(_flag, messages))
    of_role = [policy.train_on == "all" or message["role"] in policy.roles for message in messages]
    chosen = [i for i, flag in enumerate(flags) if of_role[i] and flag is not False]
    if policy.train_on == "last-turn":
        chosen = chosen[-1:]
    elif policy.train_on == "completion":
        last_other = max((i for i, yes in enumerate(of_role) if not yes), default=-1)
        chosen = [i for i in chosen if i > last_other]
    return dict.fromkeys(sorted({*chosen, *(i for i, flag in enumerate(flags) if flag)}))


def _ending(trained: Collection[int], written: Collection[int], policy: MaskPolicy) -> set[int]:
    """Messages whose end of turn is trained, of those that are `written`."""
    last = [message for message in trained if message in written][-1:]
    return set({"turn": trained, "all": written, "last": last, "none": ()}[policy.end_of_turn])


def _words(chat: MarkedChat) -> dict[int, _Words]:
    found: dict[int, _Words] = {}
    previous, seen = None, set()
    for number, start, end in chat.words:
        origin = chat.origins[number]
        # A word that comes again is quoted by the template: gpt-oss names the tool in the message of its result.
        if origin.field != ASIDE and number not in seen:
            part = origin.part if origin.field == "content" else -1
            if origin.message not in found:
                opens = origin.field != "content" or not origin.leads
                found[origin.message] = _Words(start, end, opens, origin.space, [(part, start, end)])
            else:
                words = found[origin.message]
                words.pieces.append((part, start, end))
                # What lies between the words of one message counts as its own, so nothing foreign may.
                found[origin.message] = words._replace(end=end if previous == origin.message else -1)
        seen.add(number)
        previous = origin.message
    return found


class _Located:
    """Where the turns of a chat stand in its rendering."""

    def __init__(
        self, chat: MarkedChat, words: Mapping[int, _Words], turns: TurnMarks, frame: Callable[[], MarkedChat]
    ):
        self.chat, self.words, self.turns = chat, words, turns
        self._frame = frame
        order = sorted((found.start, message) for message, found in words.items())
        self._limits = {message: start for (_, message), (start, _) in pairwise(order)}
        self._floors = {message: max(begin, words[before].end) for (begin, before), (_, message) in pairwise(order)}
        self.frame = _without_words(chat)

    def turn(self, message: int) -> tuple[int, int, int]:
        """(where what the model writes of a turn begins, where its end of turn begins, where that ends).

        Raises:
            ValueError: the words of the message are scattered.
        """
        start, end, opens, space, _ = self.words[message]
        if end < 0:
            raise ValueError(
                f"the chat template scatters the words of message {message + 1}, so they cannot be located; "
                "give a template with {% generation %} blocks"
            )
        turns = self.turns
        header = self.frame.rfind(turns.header, self._floors.get(message, 0), start) if turns.header else -1
        opening = self.frame[header + len(turns.header) : start] if header >= 0 else ""
        if opening:
            scaffolds = (_with_any_space(scaffold).match(opening) for scaffold in turns.scaffolds)
            opening = opening[next((found.end() for found in scaffolds if found), 0) :]
        # White space between header and words is the words' own, which the template kept.
        if opening and (opens or opening.isspace() or opening.startswith(turns.openings)):
            start -= len(opening)
        elif space and (opening or header < 0):  # else they stand right behind the header
            own = _space_before(self.chat.text, start) - self._usual_space.get(message, start)
            start -= own if 0 < own <= space else 0
        return start, *self.end_of_turn(message, end)

    @cached_property
    def _usual_space(self) -> dict[int, int]:
        """White space that the template writes before each message's words itself, where these have none."""
        try:
            frame = self._frame()
        except ValueError:  # it refuses such a chat
            return {}
        return {message: _space_before(frame.text, start) for message, start, _ in frame.words}

    def end_of_turn(self, message: int, end: int) -> tuple[int, int]:
        """(where the end of turn begins, where it ends) after words that end at `end`.

        It follows at once, or after the closing of a tool call, and before the next message. Without one, both are
        `end`.
        """
        ends, frame = self.turns.ends, self.frame
        for candidate in ends:
            if frame.startswith(candidate, end):
                return end, end + len(candidate)
        limit = self._limits.get(message, len(frame))
        if self.turns.start:
            begin = frame.find(self.turns.start, end, limit)
            limit = limit if begin < 0 else begin
        found = [(frame.find(candidate, end, limit), candidate) for candidate in ends]
        found = [(position, candidate) for position, candidate in found if position >= 0]
        if not found:
            return end, end
        position, candidate = min(found)
        return position, position + len(candidate)


@lru_cache(64)
def _with_any_space(scaffold: str) -> re.Pattern:
    """Matches a scaffold, also one whose reasoning is white space."""
    body = scaffold.rstrip()
    return re.compile(r"\s*".join(map(re.escape, body.split())) + re.escape(scaffold[len(body) :]))


def _space_before(text: str, at: int) -> int:
    size = 0
    while at - size > 0 and text[at - size - 1].isspace():
        size += 1
    return size


def _without_words(chat: MarkedChat) -> str:
    """The rendering with a blank of the same length for every word, so that only the template's own is found in it."""
    pieces, last = [], 0
    for _, start, end in chat.words:
        pieces += [chat.text[last:start], "\0" * (end - start)]
        last = end
    return "".join([*pieces, chat.text[last:]])


def _turn_spans(located: _Located, messages: Sequence[Mapping], trained, ending: Collection[int], policy: MaskPolicy):
    """(spans, facts) from the places of the words."""
    spans, endless = [], 0
    for message in sorted({*trained, *ending} & set(located.words)):
        start, begin, stop = located.turn(message)
        if message in trained:
            spans.append((start, begin))
        if message in ending:
            spans.append((begin, stop))
            endless += begin == stop and message in trained
    return merge_spans(spans), {"turns_without_a_trained_end": endless}


def _all_but(located: _Located, messages: int, trained: Collection[int], ending: Collection[int]):
    """All of the text, but for turns that are not trained and for ends that are not."""
    holes = []
    for message in located.words:
        if message not in trained or message not in ending:
            start, begin, stop = located.turn(message)
            holes += [(start, begin)] * (message not in trained) + [(begin, stop)] * (message not in ending)
    return subtract_spans([(0, len(located.frame))], holes)


def _generation_spans(located: _Located, messages: Sequence[Mapping], trained, ending, policy: MaskPolicy):
    """(spans, facts) from the template's own `{% generation %}` blocks; messages of roles that have none of these are
    located by their words."""
    blocks, owners = _owned_blocks(located, messages, trained)
    inside = set().union(*owners)
    roles = {"assistant", *(messages[message]["role"] for message in inside)}
    outside = [message for message in trained if message in located.words and message not in inside]
    by_words = {m for m in outside if messages[m]["role"] not in roles or _flag(messages[m])}
    every_end = policy.end_of_turn == "all"
    others = {m for m in ending if m not in inside and (m in by_words or every_end)}
    spans, facts = _turn_spans(located, messages, by_words, others, policy)
    endless, holes = facts["turns_without_a_trained_end"], []
    for (start, end), owner in zip(blocks, owners, strict=True):
        body = located.frame[start:end].rstrip()
        mark = next(filter(body.endswith, located.turns.ends), "")
        stop = start + len(body)
        is_trained = not owner.isdisjoint(trained)
        ends_here = not owner.isdisjoint(ending)
        if is_trained:
            spans.append((start, end))
            holes += [(stop - len(mark), end)] * (not ends_here and bool(mark))
            endless += ends_here and not mark
        elif ends_here and every_end:
            spans.append((stop - len(mark), stop))
    facts = {"turns_without_a_trained_end": endless, "turns_outside_generation": len(outside) - len(by_words)}
    return subtract_spans(spans, holes), facts


def _owned_blocks(located: _Located, messages: Sequence[Mapping], trained: Collection[int]):
    """(`{% generation %}` blocks, the messages in each)."""
    blocks = []
    for start, end in sorted(located.chat.generations, key=lambda block: (block[0], -block[1])):
        if not blocks or start >= blocks[-1][1]:  # the outermost only
            blocks.append((start, end))
    starts = [start for start, _ in blocks]
    owners: list[set[int]] = [set() for _ in blocks]
    for message, found in located.words.items():
        for _, start, end in found.pieces:
            k = bisect_right(starts, start) - 1
            if k >= 0 and end <= blocks[k][1]:
                owners[k].add(message)
    # A block without words is that of an empty message, one of those between the messages before and after it.
    order = sorted((found.start, message) for message, found in located.words.items())
    gaps: dict[tuple[int, int], list[int]] = defaultdict(list)
    for k, (start, _) in enumerate(blocks):
        if not owners[k]:
            at = bisect_right(order, (start, len(messages)))
            before = order[at - 1][1] if at else -1
            gaps[before, order[at][1] if at < len(order) else len(messages)].append(k)
    roles = {"assistant", *(messages[message]["role"] for owner in owners for message in owner)}
    for (before, after), empty in gaps.items():
        found = [m for m in range(before + 1, after) if messages[m]["role"] in roles]
        # With none between them it is one more block of a message with words.
        found = found or [m for m in (before, after) if 0 <= m < len(messages) and messages[m]["role"] in roles][:1]
        if len(found) != len(empty):
            if len({m in trained for m in found}) > 1:
                raise ValueError(
                    f"the chat template has {len(empty)} {{% generation %}} blocks for the empty messages between "
                    f"messages {before + 1} and {after + 1}, so which of them are trained cannot be told"
                )
            found = found[:1] * len(empty)
        for k, message in zip(empty, found, strict=False):
            owners[k].add(message)
    return blocks, owners


def _left_out(chat: MarkedChat, words: Collection[int]) -> Counter:
    """Turns of which the template writes nothing, or not all."""
    written = {number for number, _, _ in chat.words}
    missing: dict[int, set[str]] = defaultdict(set)
    for number, origin in enumerate(chat.origins):
        if number not in written and origin.field != ASIDE:
            missing[origin.message].add(origin.field)
    facts: Counter = Counter()
    for message, fields in missing.items():
        facts.update([f"{field}_left_out" for field in fields])
        facts["turns_left_out"] += message not in words
    return facts


def _apply_part_flags(spans, located: _Located, messages, trained, policy):
    """Flags on the parts of a content list: what lies between two parts belongs to the earlier one, and what lies
    between the last and the end of turn to that."""
    holes, extra = [], []
    for message, found in located.words.items():
        content = messages[message].get("content")
        if not isinstance(content, list):
            continue
        for k, (part, start, end) in enumerate(found.pieces):
            flag = _flag(content[part]) if part >= 0 and isinstance(content[part], dict) else None
            is_last = k + 1 == len(found.pieces)
            if flag is False and message in trained:
                first = start
                if k == 0 and policy.train_on != "all":
                    first = min(start, *(s for s, e in spans if s <= start < e), start)
                stop = located.end_of_turn(message, end)[0] if is_last else found.pieces[k + 1][1]
                holes.append((first, stop))
            elif flag is True:
                first = located.turn(message)[0] if k == 0 else start
                extra.append((first, located.end_of_turn(message, end)[0] if is_last else end))
    if not holes and not extra:
        return spans
    return merge_spans([*subtract_spans(spans, holes), *extra])
