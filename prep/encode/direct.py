"""Plain chats without Jinja: the text a template writes between the words, learnt once for each order of roles.

Most templates only frame the words. For such a template the rendering of a chat is fixed text between the contents,
and that fixed text depends on the order of the roles alone. It is learnt from the first chat of every order, which
Jinja renders with marks. `only_frames` reads the template's syntax tree to see that nothing else can matter: what it
compares, searches or cuts decides which contents must go through Jinja, and any construct that is not understood
decides that all must. Work units check a sample of their chats against Jinja on top.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from jinja2 import nodes

from prep.encode.masks import Rendering
from prep.encode.templates import ChatTemplate, MarkedChat

_MAX_ORDERS = 4096
_PLAIN_KEYS = {"role", "content"}

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
    """The fixed text of one order of roles: `literals` before, between and behind the contents."""

    literals: list[str]
    spans: list[tuple[int, int, int, int]]
    """(content after which the start counts, characters from there, the same for the end) of each trained span."""
    controls: int | None
    strips: list[bool | None]
    """For each content whether it loses the white space at its edges; None: only Jinja can tell."""
    facts: Mapping[str, int]
    """See `Rendering`."""


class DirectRenderer:
    """Renders chats of an order of roles that it has learnt."""

    def __init__(self, inspection: Inspection):
        self._frames: dict[tuple, _Frame] = {}
        self._inspection = inspection

    def render(self, messages: Sequence[dict]) -> Rendering | None:
        """The rendering, or None where the chat is not plain or its order of roles is new."""
        roles, contents = [], []
        for message in messages:
            content = message.get("content")
            if len(message) != 2 or type(content) is not str:
                return None
            roles.append(message["role"])
            contents.append(content)
        frame = self._frames.get(tuple(roles))
        if frame is None:
            return None
        equal, inside = self._inspection.equal, self._inspection.inside
        for k, content in enumerate(contents):
            if not content or content.isspace() or content in equal:
                return None
            if content[0].isspace() or content[-1].isspace():
                strips = frame.strips[k]
                if strips is None:
                    return None
                if strips:
                    contents[k] = content.strip()
            for text in inside:
                if text in content:
                    return None
        literals = frame.literals
        pieces = [literals[0]]
        for content, literal in zip(contents, literals[1:], strict=True):
            pieces.append(content)
            pieces.append(literal)
        # ends[k]: where content k ends
        ends = list(accumulate(map(len, pieces)))[1::2]
        spans = [(ends[a] + b if a >= 0 else b, ends[c] + d if c >= 0 else d) for a, b, c, d in frame.spans]
        return Rendering("".join(pieces), spans, frame.controls, None, facts=frame.facts)

    def _is_plain(self, content: str) -> bool:
        seen = self._inspection
        return content not in seen.equal and not any(text in content for text in seen.inside)

    def learn(
        self,
        messages: Sequence[dict],
        rendering: Rendering,
        chat: MarkedChat,
        template: ChatTemplate,
        header: str | None,
    ) -> None:
        """Take the fixed text of a plain chat that Jinja has rendered.

        `header`: what stands before the turns of the model, if only these are trained.
        """
        if len(self._frames) >= _MAX_ORDERS or any(message.keys() != _PLAIN_KEYS for message in messages):
            return
        contents = [message["content"] for message in messages]
        found = [(chat.origins[number].message, chat.text[start:end]) for number, start, end in chat.words]
        if found != list(enumerate(contents)) or not all(map(self._is_plain, contents)):
            return
        literals, last = [], 0
        for _, start, end in chat.words:
            literals.append(chat.text[last:start])
            last = end
        literals.append(chat.text[last:])
        ends = [end for _, _, end in chat.words]
        spans = []
        for start, end in rendering.spans:
            # A span may begin at a word's first character: count it from the end of the word before.
            a = sum(e <= start for e in ends) - 1
            c = sum(e <= end for e in ends) - 1
            spans.append((a, start - (ends[a] if a >= 0 else 0), c, end - (ends[c] if c >= 0 else 0)))
            inside = [s for _, s, e in chat.words if s < start < e or s < end < e]
            if inside:
                return  # a border inside a word moves with the word
        strips = _stripping(messages, literals, template)
        for k, message in enumerate(messages):
            # White space at the edges of words is trained with them right after a header; elsewhere words are bare.
            trained = message["role"] == "assistant"
            if not strips[k] and not (header and (not trained or literals[k].endswith(header))):
                strips[k] = None
        frame = _Frame(literals, spans, rendering.controls, strips, rendering.facts)
        self._frames[tuple(message["role"] for message in messages)] = frame


def _stripping(messages: Sequence[dict], literals: Sequence[str], template: ChatTemplate) -> list[bool | None]:
    """For each content whether the template strips its edges, found by padding all contents in three ways."""
    found: list[set] = [set() for _ in messages]
    for pad in ("\n \t", " \t\n", "\t\n "):  # every kind of white space once outermost
        padded = [f"{pad}{message['content']}{pad[::-1]}" for message in messages]
        text = template.render([{**m, "content": c} for m, c in zip(messages, padded, strict=True)])
        at = len(literals[0])
        for k, message in enumerate(messages):
            # What may be left of the padding: any end of it before the content, any beginning of it behind.
            forms = [(pad[i:], pad[::-1][:j]) for i in range(4) for j in range(4)]
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
