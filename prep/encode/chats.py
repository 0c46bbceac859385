"""Chats → renderings: through Jinja with marks, or directly where the template is known to be a plain one."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from prep.encode.direct import DirectRenderer, Framed, only_frames
from prep.encode.masks import Rendering, complement
from prep.encode.options import ROLES, MaskPolicy
from prep.encode.templates import FRAME_WORD, ChatTemplate, MarkedChat, TemplateMismatchError
from prep.encode.trained import trained_spans
from prep.encode.turns import TurnMarks, probe_turns

_NO_ROLE = "nobody"  # a role that is in no vocabulary


class ChatRenderer:
    """Renders the chats of one template.

    Args:
        template: the compiled template.
        control: pattern of control tokens, or None.
        policy: what is trained.
        direct: render plain chats without Jinja where the template allows it. `disable_direct` turns it off later.
    """

    def __init__(self, template: ChatTemplate, control: re.Pattern | None, policy: MaskPolicy, direct: bool = True):
        self._template = template
        self._control = control
        self._policy = policy
        self._turns: TurnMarks | None = None
        inspection = only_frames(template) if direct else None
        self._known = DirectRenderer(template, inspection) if inspection is not None else None
        self._direct = self._known  # None while every chat goes through Jinja

    @property
    def turns(self) -> TurnMarks:
        """What the template writes around a turn."""
        if self._turns is None:
            self._turns = probe_turns(self._template, self._control)
        return self._turns

    @property
    def is_direct(self) -> bool:
        """Whether plain chats are rendered without Jinja."""
        return self._direct is not None

    def disable_direct(self) -> None:
        """Render every chat through Jinja, until `enable_direct`."""
        self._direct = None

    def enable_direct(self) -> None:
        """Render plain chats without Jinja again, where the template allows it."""
        self._direct = self._known

    @contextmanager
    def indirectly(self) -> Iterator[None]:
        """Inside, every chat goes through Jinja."""
        direct, self._direct = self._direct, None
        try:
            yield
        finally:
            self._direct = direct

    def render(self, messages: Sequence[dict], tools: Sequence | None, guard: bool = True) -> Rendering | Framed:
        """A chat as text with the spans to train on. `guard`: control tokens in the words of the chat are text.

        Raises:
            ValueError: the template refuses the chat, or its words cannot be located in the rendering.
        """
        rendering = self.render_directly(messages, guard) if tools is None else None
        if rendering is None and tools is None and self._direct is not None and self._learn(messages):
            rendering = self.render_directly(messages, guard)
        return rendering or self.render_marked(messages, tools, guard)

    def check_role(self, role: str) -> None:
        """Refuse a role that nobody knows where the template makes a control token of its name.

        Some write `<|` + role + `|>`, which ends a turn with the role `end`. Roles that are usual, trained, or named by
        the template itself may have a token.

        Raises:
            ValueError: it does so.
        """
        if role in ROLES or role in self._policy.roles or self._control is None or self._template.names(role):
            return
        for before in ([], [{"role": "user", "content": FRAME_WORD}]):  # some templates want a user first
            if self._controls_with(before, role) > self._controls_with(before, _NO_ROLE):
                raise ValueError(
                    f"the chat template makes a control token of the role {role!r}; "
                    "give the role another name, or permit it with --allow-special"
                )

    def _controls_with(self, before: Sequence[dict], role: str) -> int:
        """Control tokens in a chat that ends with a message of this role; 0 where the template refuses it."""
        try:
            text = self._template.render([*before, {"role": role, "content": FRAME_WORD}])
        except ValueError:
            return 0
        return len(self._control.findall(text))

    def _learn(self, messages: Sequence[dict]) -> bool:
        """Learn the frame of an order of roles that is new, and prove it on this chat."""
        header = self.turns.header if self._policy.roles == ("assistant",) else None
        return self._direct.learn(messages, header, self._rendering)

    def _rendering(self, chat: MarkedChat, messages: Sequence[dict]) -> Rendering:
        """A located chat with the spans to train on and the number of control tokens that the template wrote."""
        spans, facts = trained_spans(chat, messages, self._template, self.turns, self._policy)
        literals = complement([(start, end) for _, start, end in chat.words], len(chat.text))
        controls = None
        if self._control is not None:
            # A template writes few different texts, however long the chat.
            counts = Counter([chat.text[start:end] for start, end in literals])
            controls = sum(count * len(self._control.findall(text)) for text, count in counts.items())
        return Rendering(chat.text, spans, controls, literals, facts=facts)

    def render_directly(self, messages: Sequence, guard: bool = True) -> Framed | None:
        """The same without Jinja, for messages that nobody has looked at yet; None where only Jinja can tell."""
        rendering = self._direct.render(messages) if self._direct is not None else None
        if rendering is not None and not guard:
            rendering.controls = None
        return rendering

    def render_marked(self, messages: Sequence[dict], tools: Sequence | None, guard: bool = True) -> Rendering:
        """The same through Jinja, always."""
        # As in transformers: a key without a value is no key (templates would write the word None).
        messages = [{k: v for k, v in message.items() if v is not None} for message in messages]
        for number, message in enumerate(messages, 1):
            if isinstance(message.get("content"), list):
                _check_parts(message["content"], number)
        try:
            chat = self._locate(messages, tools)
        except TemplateMismatchError:
            raise
        except ValueError as error:
            chat, messages = self._locate_with_contents(messages, tools, error)
        if guard:
            self._check_changed(chat)
        rendering = self._rendering(chat, messages)
        if tools and not self._template.reads_tools:
            rendering.facts = {**rendering.facts, "tools_left_out": 1}
        if not guard:
            rendering.controls = None
        return rendering

    def _locate_with_contents(self, messages: Sequence[dict], tools: Sequence | None, refusal: ValueError):
        """(chat, messages) of what a template refuses because a tool call comes without a content: DeepSeek's wants one
        that is there and none, Qwen3's a text."""
        if all("content" in message or "tool_calls" not in message for message in messages):
            raise refusal
        for content in (None, ""):
            given = [{"content": content, **m} if "tool_calls" in m else m for m in messages]
            try:
                return self._locate(given, tools), given
            except ValueError:
                continue
        raise refusal

    def _locate(self, messages: Sequence[dict], tools: Sequence | None) -> MarkedChat:
        join_lists, chat = not self.turns.takes_lists, None
        # What stands between the marks of a word shall be that word: where a template cuts it at a tag and writes
        # something of its own there, each piece is marked by itself.
        tags = self._template.tags
        for cut in (False, True) if tags else (False,):
            try:
                chat = self._template.render_marked(messages, tools, self._control, join_lists, cut_at_tags=cut)
            except TemplateMismatchError as error:
                mismatch = error
                continue
            words = (origin.text for origin, _ in chat.changed() if origin.field in ("content", "reasoning"))
            if tags is None or not any(map(tags.search, words)):
                break
        if chat is None:
            raise mismatch
        return chat

    def _check_changed(self, chat: MarkedChat) -> None:
        """Refuse words that a template turns into control tokens: these would be text."""
        for origin, written in chat.changed() if self._control is not None else ():
            if Counter(self._control.findall(written)) - Counter(self._control.findall(origin.text)):
                raise ValueError(
                    f"the chat template writes control tokens into the words of message {origin.message + 1}, where "
                    "they would be text; --allow-special takes them for control tokens"
                )


def _check_parts(parts: Sequence, number: int) -> None:
    for position, part in enumerate(parts, 1):
        if isinstance(part, str):
            continue
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            kind = part.get("type", "something unknown") if isinstance(part, dict) else type(part).__name__
            raise ValueError(f"content of message {number} holds {kind!r}; only text parts are possible")
        check_flags(part, f"part {position} of message {number}")


def check_flags(given: Mapping, what: str) -> None:
    """Refuse a message or a part whose `train` or `weight` is no flag; `what` names it."""
    for name in ("train", "weight"):
        if given.get(name) is not None and not (isinstance(given[name], (bool, int, float)) and given[name] in (0, 1)):
            value = repr(given[name])[:80]
            raise ValueError(f"{what} has {name} {value}; only true, false, 0 and 1 are possible")
