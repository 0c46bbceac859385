"""Plain chats without Jinja: the text a template writes between the words, learnt once for each order of roles.

Most templates only frame the words. For such a template the rendering of a chat is fixed text between the contents,
and that fixed text depends on the order of the roles alone. It is learnt for every new order from one rendering with
one-letter contents, and proven by Jinja on the chat at hand. `only_frames` reads the template's syntax tree to see that
nothing else can matter: what it compares, searches or cuts decides which contents must go through Jinja, and any
construct that is not understood decides that all must. Work units check a sample of their chats against Jinja on top.
"""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, product
from operator import itemgetter
from typing import ClassVar

import numpy as np
from jinja2 import nodes

from prep.encode.masks import Rendering
from prep.encode.templates import FRAME_WORD, ChatTemplate, MarkedChat

_MAX_ORDERS = 4096
_ROLE_OF, _CONTENT_OF = itemgetter("role"), itemgetter("content")

# Filters and methods that look at nothing of a content but its edges, and those meant for lists and objects.
_EDGE_FILTERS = {"trim", "string", "safe"}
_LIST_FILTERS = {"length", "count", "list", "first", "last", "reverse"}
_EDGE_METHODS = {"strip", "lstrip", "rstrip"}
_SEARCH_METHODS = {"startswith", "endswith", "split", "replace", "find", "rsplit", "partition"}
_ITEM_METHODS = {"items", "keys", "values", "get", "append"}
_PLAIN_TESTS = {"defined", "undefined", "none", "string", "mapping", "iterable", "sequence", "true", "false", "boolean"}
_TOOL_NAMES = {
    "tool",
    "tools",
    "tool_call",
    "tool_calls",
    "function",
    "arguments",
    "parameters",
    "name",
    "builtin_tools",
}


@dataclass(slots=True)
class Inspection:
    """What a template looks at in a content: one that equals one of `equal` or holds one of `inside` is not plain."""

    equal: frozenset[str]
    inside: tuple[str, ...]


@dataclass(slots=True)
class _Frame:
    """The fixed text of one order of roles."""

    pieces: list[str]
    """Literals before, between and behind the contents, at even places; the odd ones are for the contents."""
    sizes: np.ndarray
    """UTF-8 bytes of each literal, int64[contents + 1]."""
    spans: np.ndarray
    """int64[S, 4] of each trained span: contents that end before its start, bytes from there; the same for its end."""
    controls: int | None
    facts: Mapping[str, int]
    """See `Rendering`."""
    header: str | None
    """What stands before the turns of the model, if only these are trained."""
    strips: list[bool | None] | None = None
    """For each content whether it loses the white space at its edges; None: only Jinja can tell. Found when needed."""


@dataclass(slots=True)
class Framed:
    """A chat rendered directly: a `Rendering` whose trained spans are worked out for many chats at once."""

    text: str
    frame: _Frame
    sizes: list[int]
    """UTF-8 bytes of each content."""
    controls: int | None
    literals: ClassVar[None] = None
    around: ClassVar[bool] = False
    eos_is_target: ClassVar[bool] = True

    @property
    def facts(self) -> Mapping[str, int]:
        """What the ledger notes of it: name → count."""
        return self.frame.facts

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Character ranges that are trained, ascending and disjoint."""
        bounds = framed_spans([self], np.zeros(1, np.int64))
        return list(map(tuple, bounds.tolist() if self.text.isascii() else _characters(self.text, bounds)))


def framed_spans(chats: Sequence[Framed], bases: np.ndarray) -> np.ndarray:
    """Byte ranges that are trained, int64[S, 2], ascending, of chats that begin at `bases` (int64[N]) on one axis."""
    counts = np.fromiter((len(chat.sizes) for chat in chats), np.int64, len(chats))
    contents = np.fromiter(chain.from_iterable(chat.sizes for chat in chats), np.int64, int(counts.sum()))
    # Places of a chat on one flat list: its begin, then the end of each content.
    first = np.cumsum(counts + 1) - (counts + 1)
    is_content = np.ones(len(contents) + len(chats), bool)
    is_content[first] = False
    literals = np.concatenate([chat.frame.sizes for chat in chats])
    steps = np.zeros(len(literals), np.int64)
    before = np.flatnonzero(is_content)
    steps[before] = literals[before - 1] + contents
    places = np.cumsum(steps)
    places += np.repeat(bases - places[first], counts + 1)
    spans = np.concatenate([chat.frame.spans for chat in chats])
    shift = np.repeat(first, [len(chat.frame.spans) for chat in chats])
    return np.stack([places[spans[:, 0] + shift] + spans[:, 1], places[spans[:, 2] + shift] + spans[:, 3]], axis=1)


def _characters(text: str, bounds: np.ndarray) -> np.ndarray:
    """Byte ranges → character ranges."""
    data = np.frombuffer(text.encode(), np.uint8)
    return np.concatenate([[0], np.cumsum((data & 0xC0) != 0x80)])[bounds].tolist()


class DirectRenderer:
    """Renders chats of an order of roles that it has learnt."""

    def __init__(self, template: ChatTemplate, inspection: Inspection):
        self._template = template
        self._frames: dict[tuple, _Frame] = {}
        self._refused: set[tuple] = set()
        self._inspection = inspection

    def render(self, messages: Sequence[dict]) -> Framed | None:
        """The rendering, or None where these are no plain messages or their order of roles is new."""
        # Chats may be of thousands of short messages: no step here runs Python code for each.
        try:
            frame = self._frames.get(tuple(map(_ROLE_OF, messages)))
            contents = list(map(_CONTENT_OF, messages))
        except (KeyError, TypeError):
            return None
        if frame is None or (bare := self._bare(messages, contents)) is None:
            return None
        if bare != contents:
            if frame.strips is None:
                frame.strips = self._strips(frame, messages, bare)
            for k, (stripped, content) in enumerate(zip(bare, contents, strict=True)):
                if stripped != content:
                    if frame.strips[k] is None:
                        return None
                    if frame.strips[k]:
                        contents[k] = stripped
        text = _framed(frame, contents)
        sizes = list(map(len, contents if text.isascii() else map(str.encode, contents)))
        return Framed(text, frame, sizes, frame.controls)

    def _bare(self, messages: Sequence[dict], contents: Sequence) -> list[str] | None:
        """The contents without white space at their edges; None unless all are plain."""
        try:
            bare = list(map(str.strip, contents))
        except TypeError:  # one is no text
            return None
        # Each message has a role and a content, and nothing else.
        if not all(bare) or sum(map(len, messages)) != 2 * len(contents):
            return None
        seen = self._inspection
        if seen.equal and not seen.equal.isdisjoint(contents):
            return None
        if seen.inside and any(map("\0".join(contents).__contains__, seen.inside)):
            return None
        return bare

    def _strips(self, frame: _Frame, messages: Sequence[dict], bare: Sequence[str]) -> list[bool | None]:
        literals = frame.pieces[::2]
        plain = [{**message, "content": content} for message, content in zip(messages, bare, strict=True)]
        strips = _stripping(plain, literals, self._template)
        for k, message in enumerate(messages):
            # White space at the edges of words is trained with them right after a header; elsewhere words are bare.
            trained = message["role"] == "assistant"
            if not strips[k] and not (frame.header and (not trained or literals[k].endswith(frame.header))):
                strips[k] = None
        return strips

    def learn(
        self,
        messages: Sequence[dict],
        header: str | None,
        located: Callable[[MarkedChat, Sequence[dict]], Rendering],
    ) -> bool:
        """Learn the fixed text of the order of roles that these messages have; True when that is known now.

        The fixed text is what the template writes around one-letter contents. It is kept when it gives, around the
        contents of these messages, exactly what Jinja writes for them; else every chat of this order goes through
        Jinja with marks.

        Args:
            messages: a chat, its messages looked at.
            header: what stands before the turns of the model, if only these are trained.
            located: gives the trained spans of a located chat, and the control tokens the template wrote.
        """
        roles = tuple(message["role"] for message in messages)
        if roles in self._frames or roles in self._refused or len(self._frames) + len(self._refused) >= _MAX_ORDERS:
            return False
        bare = self._bare(messages, [message.get("content") for message in messages])
        if bare is None:
            return False
        try:
            frame = self._frame(self._template.render_frame(roles), roles, header, located)
            plain = [{"role": role, "content": content} for role, content in zip(roles, bare, strict=True)]
            proven = frame is not None and _framed(frame, bare) == self._template.render(plain)
        except ValueError:
            proven = False
        if proven:
            self._frames[roles] = frame
        else:
            self._refused.add(roles)
        return proven

    def _frame(self, chat: MarkedChat, roles: tuple[str, ...], header: str | None, located: Callable) -> _Frame | None:
        """A chat of one-letter contents → its fixed text; None where that is not all there is."""
        if [number for number, _, _ in chat.words] != list(range(len(roles))):
            return None
        starts = [start for _, start, _ in chat.words]
        ends = [end for _, _, end in chat.words]
        literals = [chat.text[end:start] for end, start in zip([0, *ends], [*starts, len(chat.text)], strict=True)]
        rendering = located(chat, [{"role": role, "content": FRAME_WORD} for role in roles])
        spans = []
        for border in chain.from_iterable(rendering.spans):
            # A span may begin at a word's first character: count it from the end of the word before.
            k = bisect_right(ends, border)
            distance = border - (ends[k - 1] if k else 0)
            spans += [k, len(literals[k][:distance].encode())]
        pieces = [""] * (2 * len(roles) + 1)
        pieces[::2] = literals
        sizes = np.array([len(literal.encode()) for literal in literals], np.int64)
        return _Frame(
            pieces, sizes, np.array(spans, np.int64).reshape(-1, 4), rendering.controls, rendering.facts, header
        )


def _framed(frame: _Frame, contents: Sequence[str]) -> str:
    pieces = frame.pieces.copy()
    pieces[1::2] = contents
    return "".join(pieces)


def _stripping(messages: Sequence[dict], literals: Sequence[str], template: ChatTemplate) -> list[bool | None]:
    """For each content whether the template strips its edges, found by padding all contents in three ways."""
    found: list[set] = [set() for _ in messages]
    # What may be left of the padding: any end of it before the content, any beginning of it behind; all or nothing is
    # what nearly every template leaves.
    left = sorted(product(range(4), repeat=2), key=lambda ij: ij not in ((0, 3), (3, 0)))
    for pad in ("\n \t", " \t\n", "\t\n "):  # every kind of white space once outermost
        forms = [(pad[i:], pad[::-1][:j]) for i, j in left]
        padded = [f"{pad}{message['content']}{pad[::-1]}" for message in messages]
        try:
            text = template.render([{**m, "content": c} for m, c in zip(messages, padded, strict=True)])
        except ValueError:  # it refuses what it takes without the padding
            return [None] * len(messages)
        at = len(literals[0])
        for k, message in enumerate(messages):
            for before, behind in forms:
                written = before + message["content"] + behind
                if text.startswith(written + literals[k + 1], at):
                    found[k].add({6: False, 0: True}.get(len(before) + len(behind)))
                    at += len(written) + len(literals[k + 1])
                    break
            else:
                return [None] * len(messages)
    return [choices.pop() if len(choices) == 1 else None for choices in found]


def only_frames(template: ChatTemplate) -> Inspection | None:
    """What a template looks at inside contents; None when that cannot be told from its syntax tree."""
    reading = _Reading()
    return reading.result() if reading.understands(template.syntax_tree) else None


class _Reading:
    """One reading of a syntax tree."""

    def __init__(self):
        self._equal: set[str] = set()
        self._inside: set[str] = set()

    def result(self) -> Inspection:
        return Inspection(frozenset(self._equal), tuple(sorted(self._inside)))

    def understands(self, node: nodes.Node) -> bool:
        check = getattr(self, f"_{type(node).__name__.lower()}", None)
        if isinstance(node, (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends, nodes.FilterBlock)):
            return False
        if check is not None and not check(node):
            return False
        children = node.iter_child_nodes()
        if _is_list_text(node):
            # `content[0]['text']` is written for content lists; on a text it gives nothing.
            children = node.node.iter_child_nodes()
        return all(self.understands(child) for child in children)

    def _compare(self, node: nodes.Compare) -> bool:
        for operand in node.ops:
            if operand.op in ("in", "notin"):
                # `"x" in content` searches; `role in ["a", "b"]` compares.
                found = _constants(node.expr)
                self._inside |= found
                if any(not text.strip() for text in found):
                    return False
            elif operand.op not in ("eq", "ne") and not _is_position(node):
                return False
        self._equal |= _constants(node)
        return True

    def _call(self, node: nodes.Call) -> bool:
        if isinstance(node.node, (nodes.Name, nodes.ExtensionAttribute)):
            return True  # a macro, raise_exception, namespace …: their bodies are read as well
        if not isinstance(node.node, nodes.Getattr):
            return False
        method, found = node.node.attr, set().union(*map(_constants, node.args))
        if method in _EDGE_METHODS:
            return all(not text.strip() for text in found)
        if method in _SEARCH_METHODS:
            self._inside |= found
            return bool(found) and all(text.strip() for text in found)
        return method in _ITEM_METHODS

    def _filter(self, node: nodes.Filter) -> bool:
        if node.name in _EDGE_FILTERS:
            return not node.args
        if _names(node.node) <= {"message", "role"}:
            return True
        if node.name == "tojson":
            return _names(node.node) <= _TOOL_NAMES
        return node.name in _LIST_FILTERS and isinstance(node.node, nodes.Name) and "messages" in node.node.name

    def _test(self, node: nodes.Test) -> bool:
        if node.name in ("equalto", "eq", "=="):
            self._equal |= _constants(node)
            return True
        return node.name in _PLAIN_TESTS

    def _getitem(self, node: nodes.Getitem) -> bool:
        if isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str):
            return True
        if isinstance(node.node, nodes.Call) and getattr(node.node.node, "attr", None) in _SEARCH_METHODS:
            return True  # a piece of a text that was searched: decided with the search
        return bool(_names(node.node) & {"messages", "loop_messages"}) or "role" in _names(node.arg)


def _is_list_text(node: nodes.Node) -> bool:
    key = node.attr if isinstance(node, nodes.Getattr) else getattr(getattr(node, "arg", None), "value", None)
    return key == "text" and isinstance(getattr(node, "node", None), nodes.Getitem)


def _walk(node: nodes.Node):
    yield node
    for child in node.iter_child_nodes():
        yield from _walk(child)


def _constants(node: nodes.Node) -> set[str]:
    """Texts written out under a node, but for the keys of items."""
    keys = {id(n.arg) for n in _walk(node) if isinstance(n, nodes.Getitem)}
    return {
        n.value for n in _walk(node) if isinstance(n, nodes.Const) and isinstance(n.value, str) and id(n) not in keys
    }


def _names(node: nodes.Node) -> set[str]:
    """Variables, attributes and keys under a node."""
    found = {n.name for n in _walk(node) if isinstance(n, nodes.Name)}
    found |= {n.attr for n in _walk(node) if isinstance(n, nodes.Getattr)}
    return found | {n.value for n in _walk(node) if isinstance(n, nodes.Const) and isinstance(n.value, str)}


def _is_position(node: nodes.Compare) -> bool:
    """A comparison by size is one of positions in the list of messages, never of a content."""
    return bool(_names(node) & {"loop", "index", "index0", "messages", "length"}) and "content" not in _names(node)
