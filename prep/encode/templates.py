"""Chat templates: Jinja in an immutable sandbox, rendered as transformers renders them, and *marked* rendering.

A marked rendering is the same chat with invisible marks around every word that comes from the messages. When it equals
the plain rendering once the marks are taken out, the marks say where each word went: one pass for the whole chat,
whatever the number of turns, and nothing is guessed.
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import NamedTuple

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.sandbox

from prep.encode.limits import TemplateLimitError, check_output, limited

# Private-use characters that no text in circulation has: word and generation marks, each with an opening and a closing.
_FIRST, _LAST = "\U0010ff00", "\U0010ff03"
_WORD, _WORD_END, _GENERATION, _GENERATION_END = map(chr, range(ord(_FIRST), ord(_LAST) + 1))
# The class in front lets the search run over all other text eight times as fast as alternatives would.
_MARKS = re.compile(
    f"[{_FIRST}-{_LAST}](?:(?<={_WORD})(\\d+);|(?<={_WORD_END})(\\d+);|(?<=({_GENERATION}))|(?<=({_GENERATION_END})))"
)
_ANY_MARK = re.compile(f"[{_FIRST}-{_LAST}]")
_EDGES = re.compile(r"(\s*)(.*?)(\s*)", re.DOTALL)

FRAME_WORD = "x"
"""Each content of `ChatTemplate.render_frame`."""

# Names under which a message's reasoning is passed; templates read one or the other.
_REASONING = ("reasoning_content", "thinking", "reasoning")


class TemplateMismatchError(ValueError):
    """The marked rendering is not the plain one: the template looks inside the words."""


class Marked(NamedTuple):
    """Where the words of a chat stand in its rendering (character positions)."""

    text: str
    words: list[tuple[int, int, int]]
    """(mark number, start, end) in the order of the text. Words that the template left out are missing."""
    generations: list[tuple[int, int]]
    """Ranges of `{% generation %}` blocks."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %} … {% endgeneration %}`: its body, between marks when the rendering is a marked one."""

    tags = {"generation"}  # noqa: RUF012 (jinja's interface)

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_wrap", [jinja2.nodes.ContextReference()])
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _wrap(self, context, caller):
        text = caller()
        return f"{_GENERATION}{text}{_GENERATION_END}" if context.get("_mark_generation") else text


def _raise_exception(message):
    raise jinja2.exceptions.TemplateError(message)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    # Jinja's own filter escapes HTML characters, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox, which is asked once about an attribute of a kind of object: it looks at nothing else."""

    def __init__(self, **options):
        super().__init__(**options)
        self._safe: dict[tuple[type, str], bool] = {}

    def is_safe_attribute(self, obj, attr, value):
        safe = self._safe.get((type(obj), attr))
        if safe is None:
            safe = self._safe[type(obj), attr] = super().is_safe_attribute(obj, attr, value)
        return safe


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: Jinja text.
        special_tokens: named tokens (`bos_token` …) that the template may write.
        date: what `strftime_now` formats, as YYYY-MM-DD. Without it a template that asks for today's date is refused,
            because the same input must give the same bytes tomorrow.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], date: str | None = None):
        self.source = source
        self.special_tokens = dict(special_tokens)
        self._date = datetime.fromisoformat(date) if date else None
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
        environment.filters["tojson"] = _to_json
        del environment.globals["lipsum"], environment.filters["random"]  # another text each time, and any amount of it
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = self._strftime_now
        try:
            with limited():
                self.syntax_tree = environment.parse(source)
                self._template = environment.from_string(source)
        except jinja2.exceptions.TemplateSyntaxError as error:
            raise ValueError(f"the chat template is not valid Jinja: line {error.lineno}: {error.message}") from None
        except Exception as error:  # constants are worked out here, and whatever that raises is the template's
            raise ValueError(f"the chat template cannot be compiled: {error}") from None

    def _strftime_now(self, pattern):
        if self._date is None:
            raise jinja2.exceptions.TemplateError(
                "the template writes today's date; fix it with --template-date YYYY-MM-DD"
            )
        return self._date.strftime(pattern)

    @cached_property
    def has_generation(self) -> bool:
        """Whether the template says itself which parts the model generates."""
        return re.search(r"\{%-?\s*generation\s*-?%\}", self.source) is not None

    @cached_property
    def reads_tools(self) -> bool:
        """Whether the template looks at the tools that it is given."""
        return "tools" in jinja2.meta.find_undeclared_variables(self.syntax_tree)

    def names(self, role: str) -> bool:
        """Whether the template itself speaks of this role."""
        return f"'{role}'" in self.source or f'"{role}"' in self.source

    @cached_property
    def tags(self) -> re.Pattern | None:
        """Tags such as <think> that the template itself names and may look for inside a content."""
        tags = sorted(set(re.findall(r"</?\w+>", self.source)) - set(self.special_tokens.values()))
        return re.compile("(" + "|".join(map(re.escape, tags)) + ")") if tags else None

    def render(
        self, messages: Sequence[dict], tools: Sequence | None = None, add_generation_prompt: bool = False, **options
    ) -> str:
        """The chat as text. `options` are variables that some templates read, such as `enable_thinking`.

        Raises:
            ValueError: the template refuses the chat; the message carries its words.
        """
        return self._render(_with_reasoning(messages), tools, add_generation_prompt, mark=False, **options)

    def _render(self, messages, tools, add_generation_prompt, mark, **options):
        try:
            with limited():
                text = self._template.render(
                    messages=messages,
                    tools=tools,
                    documents=None,
                    add_generation_prompt=add_generation_prompt,
                    _mark_generation=mark,
                    **self.special_tokens,
                    **options,
                )
            check_output(text, messages, tools)
            return text
        except TemplateLimitError as error:
            raise ValueError(f"the chat template ran away on this chat: {error}") from None
        except Exception as error:  # a template is foreign code: whatever it raises is its refusal
            raise ValueError(f"the chat template refuses this chat: {error}") from None

    def render_marked(
        self,
        messages: Sequence[dict],
        tools: Sequence | None,
        control: re.Pattern | None = None,
        join_lists: bool = False,
        cut_at_tags: bool = False,
    ) -> "MarkedChat":
        """Render plainly and with marks, and prove that both are the same text.

        Args:
            control: matches control tokens. Where one stands in a text that is no word of a message (tools, names, ids,
                keys), that text is marked too, so that it is told from what the template writes.
            join_lists: give the texts of a content list as one text, for templates that know no lists.
            cut_at_tags: leave tags that the template names (<think> …) outside the marks and mark the pieces between.

        Raises:
            TemplateMismatchError: they are not the same.
            ValueError: the template refuses the chat.
        """
        plain = [_joined(message) for message in messages] if join_lists else messages
        text = self.render(plain, tools)
        if not text.isascii() and _ANY_MARK.search(text):
            raise ValueError("the chat holds private-use characters U+10FF00–U+10FF03, which mark words here")
        marker = _Marker(self.tags, cut_at_tags, join_lists and not cut_at_tags, control)
        chat = [marker.message(i, message) for i, message in enumerate(messages)]
        chat = [_joined(message) for message in chat] if join_lists else chat
        marked_tools = None if tools is None else marker.aside(tools, -1)
        marked = _read_marks(self._render(_with_reasoning(chat), marked_tools, False, mark=True))
        if marked is None or marked.text != text:
            raise TemplateMismatchError("the chat template rewrites the words of this chat, so they cannot be located")
        return MarkedChat(marked.text, marked.words, marked.generations, marker.origins)

    def render_frame(self, roles: Sequence[str]) -> "MarkedChat":
        """Render a chat of one-letter contents with marks: what the template writes around any words, for half the work
        of `render_marked`. Which contents the template treats like these is the caller's to know.

        Raises:
            TemplateMismatchError: it tears the contents apart.
            ValueError: the template refuses the chat.
        """
        chat = [{"role": role, "content": f"{_WORD}{k};{FRAME_WORD}{_WORD_END}{k};"} for k, role in enumerate(roles)]
        marked = _read_marks(self._render(chat, None, False, mark=True))
        if marked is None:
            raise TemplateMismatchError("the chat template tears the words of a chat apart")
        origins = [Origin(k, "content", 0, True, FRAME_WORD, 0) for k in range(len(roles))]
        return MarkedChat(marked.text, marked.words, marked.generations, origins)


ASIDE = "aside"
"""Field of a text that is no word: a mark keeps the control tokens in it from being the template's."""


class Origin(NamedTuple):
    """Where a mark's word comes from."""

    message: int
    """Index of the message; -1 for tools."""
    field: str
    """`content`, `reasoning`, `tool_calls` or ASIDE."""
    part: int
    """Index in a content list; 0 for a plain content."""
    leads: bool
    """Nothing of the same content stands before it: no tag, nor one that is left to the template (`plan</think>`)."""
    text: str
    """The word as the record has it."""
    space: int
    """Characters of white space before it, which the template may strip."""


class MarkedChat(NamedTuple):
    """A `Marked` with the origin of every mark."""

    text: str
    words: list[tuple[int, int, int]]
    generations: list[tuple[int, int]]
    origins: list[Origin]

    def changed(self) -> list[tuple[Origin, str]]:
        """Words that the template does not write as they are, each with what stands in its place."""
        found = ((self.origins[number], start, end) for number, start, end in self.words)
        return [
            (origin, self.text[start:end])
            for origin, start, end in found
            if len(origin.text) != end - start or not self.text.startswith(origin.text, start)
        ]


class _Marker:
    """Copies messages with marks around their words."""

    def __init__(self, tags: re.Pattern | None, cut: bool, join: bool, control: re.Pattern | None):
        self._tags = tags
        self._cut = cut
        self._join = join
        self._control = control
        self.origins: list[Origin] = []

    def message(self, index: int, message: dict) -> dict:
        content, calls = message.get("content"), message.get("tool_calls")
        marked = {k: v if k in ("role", "content") else self.aside(v, index) for k, v in message.items()}
        if isinstance(content, str):
            marked["content"] = self._text(content, index, "content", 0)
        elif isinstance(content, list):
            solid = [k for k, part in enumerate(content) if _text_of(part).strip()] if self._join else []
            # No template strips white space inside the one text that it is given.
            first, last = min(solid, default=0), max(solid, default=0)
            inner = [(first < k <= last, first <= k < last) for k in range(len(content))]
            marked["content"] = [self._part(part, index, k, inner[k]) for k, part in enumerate(content)]
        # All names of the reasoning carry the same marks: a template reads one of them.
        reasoning = next((message[name] for name in _REASONING if isinstance(message.get(name), str)), None)
        if reasoning is not None:
            text = self._text(reasoning, index, "reasoning", 0)
            marked.update({name: text for name in _REASONING if message.get(name) == reasoning})
        if isinstance(calls, list):
            marked["tool_calls"] = self._leaves(calls, index, "tool_calls")
        return marked

    def _part(self, part, index, k, inner):
        text = self._text(_text_of(part), index, "content", k, inner)
        return text if isinstance(part, str) else {**self.aside(part, index), "text": text}

    def _leaves(self, value, index: int, field: str):
        """Marks every string inside lists and objects; `type` and `id`, which templates compare, and keys, which they
        look up, only as `aside` does."""
        if isinstance(value, str):
            return self._text(value, index, field, 0)
        if isinstance(value, list):
            return [self._leaves(item, index, field) for item in value]
        if isinstance(value, dict):
            return {
                self.aside(k, index): self.aside(v, index) if k in ("type", "id") else self._leaves(v, index, field)
                for k, v in value.items()
            }
        return value

    def aside(self, value, index: int):
        """Marks the strings with control tokens inside lists and objects, keys too. No template looks for those."""
        if self._control is None:
            return value
        if isinstance(value, str):
            return self._text(value, index, ASIDE, 0) if self._control.search(value) else value
        if isinstance(value, list):
            return [self.aside(item, index) for item in value]
        if isinstance(value, dict):
            return {self.aside(k, index): self.aside(v, index) for k, v in value.items()}
        return value

    def _text(self, text: str, index: int, field: str, part: int, inner: tuple[bool, bool] = (False, False)) -> str:
        """`inner`: the white space before it, and behind it, is a part of the word."""
        pieces = self._tags.split(text) if self._tags and self._cut else [text]
        out = []
        first = self._tags.search(text) if self._tags and "</" in text else None
        leads = first is None or not first.group().startswith("</")
        for position, piece in enumerate(pieces):
            is_tag = position % 2 == 1 and not (self._control and self._control.search(piece))
            # White space stays outside, so that a template may strip it; an empty word has nothing to mark.
            before, core, after = _EDGES.fullmatch(piece).groups()
            if inner[0]:
                before, core = "", before + core
            if inner[1]:
                core, after = core + after, ""
            if is_tag or not core:
                out.append(piece)
                leads = leads and not is_tag
                continue
            number = len(self.origins)
            self.origins.append(Origin(index, field, part, leads, core, len(before)))
            out.append(f"{before}{_WORD}{number};{core}{_WORD_END}{number};{after}")
            leads = False
        return "".join(out)


def _read_marks(rendered: str) -> Marked | None:
    """Take the marks out; None when they are torn or nested."""
    pieces, words, generations, open_generations = [], [], [], []
    open_word = None
    length = last = 0
    for match in _MARKS.finditer(rendered):
        pieces.append(rendered[last : match.start()])
        length += match.start() - last
        last = match.end()
        start, end, generation, _ = match.groups()
        if start is not None:
            if open_word is not None:
                return None
            open_word = (int(start), length)
        elif end is not None:
            if open_word is None or open_word[0] != int(end):
                return None
            words.append((*open_word, length))
            open_word = None
        elif generation:
            open_generations.append(length)
        elif open_generations:
            generations.append((open_generations.pop(), length))
        else:
            return None
    if open_word is not None or open_generations:
        return None
    pieces.append(rendered[last:])
    text = "".join(pieces)
    return None if _ANY_MARK.search(text) else Marked(text, words, generations)


def _joined(message: dict) -> dict:
    """The message with a content list as one text."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": "".join(map(_text_of, content))}


def _text_of(part: str | Mapping) -> str:
    """The text of a part of a content list."""
    return part if isinstance(part, str) else part["text"]


def _with_reasoning(messages: Sequence[dict]) -> list[dict]:
    """Give a message's reasoning every name that templates read, as transformers does."""
    out = []
    for message in messages:
        reasoning = next((message[name] for name in _REASONING if message.get(name) is not None), None)
        if reasoning is not None:
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        out.append(message)
    return out
