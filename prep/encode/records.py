"""A record as a file gives it → a document as text with the spans to train on."""

import re
from collections.abc import Mapping

from prep.encode.masks import MaskPolicy, Rendering, TurnMarks, probe_turns, render_chat
from prep.encode.templates import ChatTemplate
from prep.encode.tokenizer import TokenizerFolder

_ROLE = re.compile(r"[\w. -]{1,64}")


class RecordReader:
    """Turns records into renderings; one per process.

    Args:
        folder: the tokenizer folder (special tokens, control tokens).
        template: its chat template, or None; then `messages` are refused.
        policy: what is trained.
    """

    def __init__(self, folder: TokenizerFolder, template: ChatTemplate | None, policy: MaskPolicy):
        self._folder = folder
        self._template = template
        self._policy = policy
        self._turns: TurnMarks | None = None

    def read(self, record: object) -> Rendering:
        """One record.

        Raises:
            ValueError: not a record of a known kind, or one that cannot be rendered; the message says why.
        """
        if not isinstance(record, dict):
            raise ValueError(f"a record is an object with named fields, not {_kind(record)}")
        if record.get("messages") is not None:
            return self._chat(record["messages"], record.get("tools"))
        if record.get("completion") is not None or record.get("prompt") is not None:
            return self._prompt(record)
        if record.get("text") is not None:
            return self._text(record["text"])
        fields = ", ".join(sorted(map(str, record))) or "none"
        raise ValueError(f"no known field (messages, prompt and completion, or text); the record has: {fields}")

    def _chat(self, messages, tools) -> Rendering:
        if self._template is None:
            raise ValueError(
                f"the record has messages, but {self._folder.path.name} holds no chat template; "
                "add chat_template.jinja to the tokenizer folder"
            )
        if not isinstance(messages, list) or not messages:
            raise ValueError("messages must be a list with at least one message")
        for number, message in enumerate(messages, 1):
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise ValueError(f"message {number} must be an object with role and content")
            if not _ROLE.fullmatch(message["role"]):
                raise ValueError(f"message {number} has role {message['role'][:80]!r}, which is not a name")
            if not isinstance(message.get("content"), (str, list, type(None))):
                raise ValueError(f"content of message {number} must be text or a list, not {_kind(message['content'])}")
        control = self._folder.control_pattern
        if self._turns is None:
            self._turns = probe_turns(self._template, control)
        return render_chat(self._template, self._turns, control, messages, tools, self._policy)

    def _prompt(self, record: Mapping) -> Rendering:
        prompt, completion = record.get("prompt"), record.get("completion")
        if not isinstance(prompt, str) or not isinstance(completion, str):
            raise ValueError("prompt and completion must both be there and be text")
        text = prompt + completion
        start = 0 if self._policy.train_on == "all" else len(prompt)
        return self._plain(text, ((start, len(text)),))

    def _text(self, text) -> Rendering:
        if not isinstance(text, str):
            raise ValueError(f"text must be text, not {_kind(text)}")
        return self._plain(text, ((0, len(text)),))

    def _plain(self, text: str, spans) -> Rendering:
        control = self._folder.control_pattern
        return Rendering(
            text,
            tuple(span for span in spans if span[0] < span[1]),
            injected=control is not None and control.search(text) is not None,
            add_prefix=True,
            add_eos=bool(text),
            eos_is_target=self._policy.end_of_turn != "none",
        )


def _kind(value: object) -> str:
    names = {type(None): "null", bool: "a truth value", int: "a number", float: "a number", str: "text", list: "a list"}
    return names.get(type(value), "an object")
