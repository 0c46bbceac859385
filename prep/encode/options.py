"""The options that decide what the document store holds. Everything here, and nothing else, may change its bytes."""

import dataclasses
from dataclasses import dataclass, field
from datetime import date

UNIT_BYTES = 4 << 20
"""Bytes of input a work unit: small enough to balance two workers, large enough to hide the cost of a file."""

TRAIN_ON = ("assistant", "all", "completion", "last-turn")
END_OF_TURN = ("all", "turn", "last", "none")
ENGINES = ("auto", "hf", "fast")
ON_ERROR = ("stop", "skip")
DEDUP = ("none", "exact")

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
"""Roles that are known; turns of others are counted unless they are trained."""


@dataclass(frozen=True)
class MaskPolicy:
    """What is trained in a record.

    What a record says of its messages, parts or segments itself (`train`, `weight: 0`) goes before all of this.

    train_on: `assistant` trains every turn of `roles`; `last-turn` only the last of them; `completion` what follows the
        last message of another role; `all` every token.
    roles: roles whose turns are trained.
    end_of_turn: `turn` trains the end of each trained turn, `all` that of every turn, `last` that of the last trained
        turn, `none` none.
    """

    train_on: str = "assistant"
    roles: tuple[str, ...] = ("assistant",)
    end_of_turn: str = "turn"

    def __post_init__(self):
        check_choice("train_on", self.train_on, TRAIN_ON)
        check_choice("end_of_turn", self.end_of_turn, END_OF_TURN)


@dataclass(frozen=True)
class EncodeOptions:
    """How records become documents.

    tokenizer: tokenizer folder. Its content counts, not its path.
    mask: what is trained.
    chat_template: a file or the name of a built-in template, instead of the tokenizer folder's own.
    template_date: YYYY-MM-DD for templates that write today's date.
    allow_special: control tokens inside the texts of records count as control tokens.
    engine: `hf` encodes with Hugging Face tokenizers; `fast` with fastokens, checked against hf on a sample of every
        unit; `auto` is `fast` where it is installed and the tokenizer allows, else `hf`. All give the same ids.
    on_error: `stop` at the first bad record, or `skip` it, up to `max_errors` (a count, or a percentage like "1%").
    dedup: `exact` keeps the first of equal documents.
    keep_untrained: keep documents without a single target token.
    unit_bytes: bytes of input a work unit.
    """

    tokenizer: str
    mask: MaskPolicy = field(default_factory=MaskPolicy)
    chat_template: str | None = None
    template_date: str | None = None
    allow_special: bool = False
    engine: str = "auto"
    on_error: str = "stop"
    max_errors: str | None = None
    dedup: str = "none"
    keep_untrained: bool = False
    unit_bytes: int = UNIT_BYTES

    def __post_init__(self):
        check_choice("engine", self.engine, ENGINES)
        check_choice("on_error", self.on_error, ON_ERROR)
        check_choice("dedup", self.dedup, DEDUP)
        if self.unit_bytes < 1:
            raise ValueError(f"unit_bytes is {self.unit_bytes}; it must be at least 1")
        if self.max_errors is not None:
            self.error_limit(0)
        if self.template_date is not None:
            try:
                date.fromisoformat(self.template_date)
            except ValueError:
                raise ValueError(f"template_date is {self.template_date!r}; give a day as YYYY-MM-DD") from None

    def error_limit(self, records: int) -> float:
        """How many bad records of so many are allowed."""
        if self.max_errors is None:
            return float("inf")
        text = self.max_errors.strip()
        try:
            limit = float(text[:-1]) / 100 * records if text.endswith("%") else int(text)
        except ValueError:
            limit = -1
        if not 0 <= limit < float("inf"):
            raise ValueError(f"max_errors is {self.max_errors!r}; give a count like 100 or a percentage like 0.5%")
        return limit

    def identity(self) -> dict:
        """The options as JSON-compatible values, without paths."""
        value = dataclasses.asdict(self)
        del value["max_errors"]  # whoever finds it too low goes on with a higher one
        del value["tokenizer"], value["chat_template"]  # what they hold is hashed
        value["mask"]["roles"] = list(self.mask.roles)
        return value


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(choices)}")
