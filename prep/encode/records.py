"""A record as a file gives it → a document: text with the spans to train on, or token ids that are there already.

Kinds, by the fields a record has (the first that fits):

    input_ids                 token ids; with labels (-100 is not trained) or loss_mask, else all is trained
    chosen, rejected          preference pairs: refused
    messages | conversations  a chat: role and content, or ShareGPT's from and value
    instruction, output       alpaca: a chat of one turn
    segments | input_output   template-free: [{text, train}] as it stands
    prompt, completion        two texts, or two lists of messages
    text                      a text

Control tokens in any of these are text, unless they are allowed.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from prep.encode.chats import ChatRenderer, check_flags
from prep.encode.direct import Framed
from prep.encode.masks import Rendering
from prep.encode.numbers import parse_exactly
from prep.encode.options import MaskPolicy
from prep.encode.tokenizer import TokenizerFolder

_ROLE = re.compile(r"[\w. -]{1,64}")
_MAX_DEPTH = 64
"""Levels of lists and objects in a message or in tools; JSON can be nested until a program that walks it dies."""
_SHAREGPT = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}
_ABSENT = (None, "")  # an empty cell of CSV, where a list is expected
_BEFORE_TEXT = frozenset(
    {
        *("input_ids", "chosen", "messages", "conversations", "instruction", "segments", "input_output"),
        *("completion", "prompt"),
    }
)
"""Fields that make a record something else than a text, whatever text it has."""
_OF_PACKS = ("seq_lens", "seq_lengths", "seq_start_id")
"""Fields by which packed datasets (of this program, NeMo AutoModel, TRL, Megatron-Bridge) say where documents begin."""
KNOWN = "input_ids; messages or conversations; instruction and output; segments; prompt and completion; text"


@dataclass(slots=True)
class Tokens:
    """A document that came as token ids: ids int32[L], mask uint8[L]; `removed` tokens were padding."""

    ids: np.ndarray
    mask: np.ndarray
    removed: int = 0


class RecordReader:
    """Turns records into documents; one per source and process.

    Args:
        folder: the tokenizer folder.
        chats: renders chats, or None where the tokenizer has no chat template; then chats are refused.
        policy: what is trained.
        columns: our field → the record's.
        allow_special: control tokens inside texts count as control tokens.
    """

    def __init__(
        self,
        folder: TokenizerFolder,
        chats: ChatRenderer | None,
        policy: MaskPolicy,
        columns: Mapping[str, str] | None = None,
        allow_special: bool = False,
    ):
        self._folder = folder
        self._chats = chats
        self._policy = policy
        self._columns = dict(columns or {})
        self._allow_special = allow_special
        self._trains_eos = policy.end_of_turn != "none"
        self._roles: set[str] = set()  # names that were looked at

    def read(self, record: object) -> Rendering | str | Framed | Tokens:
        """One record. A `str` is a text between bos and eos, all of it trained, eos too: the kind of record of which
        there may be thousands a megabyte.

        Raises:
            ValueError: not a record of a known kind, or one that cannot be rendered; the message says why.
        """
        if type(record) is not dict:
            raise ValueError(f"a record is an object with named fields, not {kind_of(record)}")
        if self._columns:
            record = self._mapped(record)
        get = record.get
        # Most records are texts: one look at the names instead of ten.
        if self._trains_eos and type(text := get("text")) is str and text and _BEFORE_TEXT.isdisjoint(record):
            return text
        if get("input_ids") not in _ABSENT:
            return self._tokens(record)
        if get("chosen") not in _ABSENT and get("rejected") not in _ABSENT:
            raise ValueError("a preference pair (chosen, rejected) is no training example for this program yet")
        if get("messages") not in _ABSENT:
            return self._chat(get("messages"), get("tools"))
        if get("conversations") not in _ABSENT:
            return self._chat(_from_sharegpt(get("conversations"), get("system")), get("tools"))
        if get("instruction") is not None:
            return self._alpaca(record)
        segments = get("input_output") if get("segments") in _ABSENT else get("segments")
        if segments not in _ABSENT:
            return self._segments(segments)
        if get("completion") is not None or get("prompt") is not None:
            return self._prompt(record)
        if get("text") is not None:
            return self._text(get("text"))
        fields = ", ".join(sorted(str(k) for k, v in record.items() if v is not None)) or "none"
        raise ValueError(f"no known field ({KNOWN}); the record has: {fields}")

    def _mapped(self, record: dict) -> dict:
        missing = [name for name in self._columns.values() if name not in record]
        if missing:
            fields = ", ".join(sorted(map(str, record))) or "none"
            raise ValueError(f"column {missing[0]}, which --column names, is missing; the record has: {fields}")
        taken = set(self._columns.values())
        mapped = {name: value for name, value in record.items() if name not in taken}
        return mapped | {ours: record[theirs] for ours, theirs in self._columns.items()}

    def _chat(self, messages, tools=None, train_from: int = 0) -> Rendering | Framed:
        if self._chats is None:
            raise ValueError(
                f"the record is a chat, but {self._folder.path.name} holds no chat template; "
                "add chat_template.jinja to it or give --chat-template"
            )
        messages = _parsed(messages, "messages")
        if type(messages) is not list or not messages:
            raise ValueError("messages must be a list with at least one message")
        if not tools and not train_from:
            rendering = self._chats.render_directly(messages, guard=not self._allow_special)
            if rendering is not None:
                return rendering
        for number, message in enumerate(messages, 1):
            role = message.get("role") if type(message) is dict else None
            if type(role) is not str:
                raise ValueError(f"message {number} must be an object with role and content")
            if len(message) == 2 and role in self._roles and type(message.get("content")) is str:
                continue
            if not _ROLE.fullmatch(role):
                raise ValueError(f"message {number} has role {role[:80]!r}, which is not a name")
            if type(message.get("content")) not in (str, list, type(None)):
                raise ValueError(
                    f"content of message {number} must be text or a list, not {kind_of(message['content'])}"
                )
            if message.get("tool_calls") not in _ABSENT:
                calls = _objects(message["tool_calls"], f"tool_calls of message {number}")
                if calls is not message["tool_calls"]:
                    messages = [*messages[: number - 1], {**message, "tool_calls": calls}, *messages[number:]]
            check_flags(message, f"message {number}")
            _check_depth(message, f"message {number}")
            if not self._allow_special and role not in self._roles:
                self._chats.check_role(role)
            self._roles.add(role)
        if train_from:
            messages = [{**m, "train": False} for m in messages[:train_from]] + messages[train_from:]
        tools = None if tools in _ABSENT else _objects(tools, "tools") or None
        _check_depth(tools, "tools")
        return self._chats.render(messages, tools, guard=not self._allow_special)

    def _alpaca(self, record: Mapping) -> Rendering:
        instruction, given, output = record["instruction"], record.get("input") or "", record.get("output")
        if not (isinstance(instruction, str) and isinstance(given, str) and isinstance(output, str)):
            raise ValueError("instruction, input and output must be text, and instruction and output must be there")
        if self._chats is None:
            above = "Below is an instruction that describes a task"
            if given:
                head = f"{above}, paired with an input that provides further context. "
                body = f"### Instruction:\n{instruction}\n\n### Input:\n{given}\n\n### Response:\n"
            else:
                head, body = f"{above}. ", f"### Instruction:\n{instruction}\n\n### Response:\n"
            prompt = f"{head}Write a response that appropriately completes the request.\n\n{body}"
            return self._pair(prompt, output)
        messages = [{"role": "system", "content": record["system"]}] if record.get("system") else []
        question = f"{instruction}\n\n{given}" if given else instruction
        return self._chat([*messages, {"role": "user", "content": question}, {"role": "assistant", "content": output}])

    def _segments(self, segments) -> Rendering:
        segments = _parsed(segments, "segments")
        if type(segments) is not list:
            raise ValueError("segments must be a list of objects with text and train")
        pieces, spans, length = [], [], 0
        for number, segment in enumerate(segments, 1):
            flag = segment.get("train", segment.get("label")) if isinstance(segment, dict) else None
            if flag not in (0, 1) or not isinstance(segment.get("text"), str):
                raise ValueError(f"segment {number} must be an object with text and train (true or false)")
            pieces.append(segment["text"])
            if flag and segment["text"]:
                spans.append((length, length + len(segment["text"])))
            length += len(segment["text"])
        return Rendering("".join(pieces), spans, None if self._allow_special else 0)

    def _prompt(self, record: Mapping) -> Rendering:
        prompt, completion = record.get("prompt"), record.get("completion")
        if isinstance(prompt, list) and isinstance(completion, list):
            train_from = 0 if self._policy.train_on == "all" else len(prompt)
            return self._chat([*prompt, *completion], record.get("tools"), train_from)
        if not isinstance(prompt, str) or not isinstance(completion, str):
            raise ValueError("prompt and completion must both be there, both text or both lists of messages")
        return self._pair(prompt, completion)

    def _pair(self, prompt: str, completion: str) -> Rendering:
        text = prompt + completion
        start = 0 if self._policy.train_on == "all" else len(prompt)
        return self._plain(text, start, eos_is_target=self._policy.end_of_turn != "none" and bool(completion))

    def _text(self, text) -> Rendering:
        if not isinstance(text, str):
            reason = f"it is {kind_of(text)}"
            if isinstance(text, bytes):  # a line that is no UTF-8, or what a column of binary type holds
                reason = "it is bytes; cast the column to text" if _is_utf8(text) else "it is not UTF-8"
            raise ValueError(f"text must be text, but {reason}")
        return self._plain(text, 0, eos_is_target=self._trains_eos)

    def _plain(self, text: str, start: int, eos_is_target: bool) -> Rendering:
        spans = [(start, len(text))] if start < len(text) else []
        controls = None if self._allow_special else 0
        return Rendering(text, spans, controls, around=bool(text), eos_is_target=eos_is_target)

    def _tokens(self, record: Mapping) -> Tokens:
        try:
            ids = np.asarray(_parsed(record["input_ids"], "input_ids"))
            if ids.ndim != 1 or not (ids.size == 0 or np.issubdtype(ids.dtype, np.integer)):
                raise TypeError
        except (TypeError, ValueError):
            raise ValueError("input_ids must be a list of whole numbers") from None
        real = self._real(record, ids.size)
        if ids.size and (ids.min() < 0 or ids.max() >= self._folder.vocab_size):
            bad = int(ids.min() if ids.min() < 0 else ids.max())
            raise ValueError(f"input_ids holds {bad}, outside the tokenizer's vocabulary of {self._folder.vocab_size}")
        if record.get("loss_mask") not in _ABSENT:
            given = self._beside(record, "loss_mask", ids.size)
            mask = given == 1
            if not (mask | (given == 0)).all():
                raise ValueError(f"loss_mask holds {given[~mask & (given != 0)][0]}; only 0 and 1 are possible")
        elif record.get("labels") not in _ABSENT:
            mask = self._beside(record, "labels", ids.size) != -100
            wrong = mask & (self._beside(record, "labels", ids.size) != ids)
            if wrong.any():
                raise ValueError(
                    f"labels differ from input_ids at position {int(wrong.argmax())}; give them unshifted, "
                    "with -100 where nothing is trained"
                )
        else:
            mask = np.ones(ids.size, bool)
        ids, mask = ids[real], mask[real]
        return Tokens(ids.astype(np.int32), mask.astype(np.uint8), int(real.size - real.sum()))

    def _real(self, record: Mapping, length: int) -> np.ndarray:
        """bool[length]: which token ids are no padding. ValueError when they are several documents."""
        real = np.ones(length, bool)
        if record.get("attention_mask") not in _ABSENT:
            numbers = self._beside(record, "attention_mask", length)
            real = numbers != 0
            _refuse_pack("attention_mask", numbers.max(initial=0) > 1)
        for name in _OF_PACKS:
            _refuse_pack(name, record.get(name) not in _ABSENT and np.size(_parsed(record[name], name)) > 1)
        if record.get("position_ids") not in _ABSENT:
            _refuse_pack("position_ids", not self._beside(record, "position_ids", length)[real][1:].all())
        return real

    @staticmethod
    def _beside(record: Mapping, name: str, length: int) -> np.ndarray:
        given = _parsed(record[name], name)
        try:
            values = np.asarray(given)
        except ValueError:  # lists of several lengths in it
            values = np.empty((0, 0))
        if values.shape != (length,) or (not np.issubdtype(values.dtype, np.number) and values.dtype != bool):
            raise ValueError(f"{name} must be a list of {length} numbers, as long as input_ids")
        return values


def _refuse_pack(field: str, several: bool) -> None:
    """ValueError when a field shows that token ids are several documents: as one they would see each other."""
    if several:
        raise ValueError(
            f"the record is a pack of several documents, as {field} says; give each as a record of its own"
        )


def _parsed(value, name: str):
    """CSV and some Parquet files hold lists as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return parse_exactly(value)
    except ValueError as error:
        raise ValueError(f"{name} is text that is not JSON: {error}") from None


def _objects(value, name: str) -> list[dict]:
    """A list of objects, as it is or as JSON text."""
    given = _parsed(value, name)
    if type(given) is not list or not all(type(item) is dict for item in given):
        raise ValueError(f"{name} must be a list of objects")
    return given


def _from_sharegpt(turns, system) -> list[dict]:
    turns = _parsed(turns, "conversations")
    if type(turns) is not list:
        raise ValueError("conversations must be a list of objects with from and value")
    messages = [{"role": "system", "content": system}] if isinstance(system, str) and system else []
    for number, turn in enumerate(turns, 1):
        if isinstance(turn, dict) and isinstance(turn.get("role"), str):
            messages.append({**turn, "role": _sharegpt_role(turn["role"])})
        elif isinstance(turn, dict) and isinstance(turn.get("from"), str) and isinstance(turn.get("value"), str):
            rest = {name: turn[name] for name in ("train", "weight") if name in turn}
            messages.append({"role": _sharegpt_role(turn["from"]), "content": turn["value"], **rest})
        else:
            raise ValueError(f"turn {number} of conversations must be an object with from and value")
    return messages


def _sharegpt_role(name: str) -> str:
    """`user` or `assistant` for `human`, `GPT` and the like; roles of templates as they are, any other name too."""
    plain = name.lower()
    return _SHAREGPT.get(plain, plain if plain in ("system", "user", "assistant", "tool") else name)


def _check_depth(value: object, name: str) -> None:
    level = [value]
    for _ in range(_MAX_DEPTH + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return
    raise ValueError(f"{name} is nested more than {_MAX_DEPTH} levels deep")


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def kind_of(value: object) -> str:
    """A value's type in the words of JSON."""
    names = {type(None): "null", bool: "a truth value", int: "a number", float: "a number", str: "text", list: "a list"}
    return names.get(type(value), "an object")
