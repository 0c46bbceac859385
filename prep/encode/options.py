"""The options that decide what the document store holds. Everything here, and nothing else, may change its bytes."""

import dataclasses
from dataclasses import dataclass, field

from prep.encode.masks import MaskPolicy

UNIT_BYTES = 4 << 20
"""Bytes of input a work unit: small enough to balance two workers, large enough to hide the cost of a file."""


@dataclass(frozen=True)
class EncodeOptions:
    """How records become documents.

    tokenizer: tokenizer folder. Its content counts, not its path.
    mask: what is trained.
    template_date: YYYY-MM-DD for templates that write today's date.
    unit_bytes: bytes of input a work unit.
    """

    tokenizer: str
    mask: MaskPolicy = field(default_factory=MaskPolicy)
    template_date: str | None = None
    unit_bytes: int = UNIT_BYTES

    def __post_init__(self):
        if self.unit_bytes < 1:
            raise ValueError(f"unit_bytes is {self.unit_bytes}; it must be at least 1")

    def identity(self) -> dict:
        """The options as JSON-compatible values, without the paths."""
        value = dataclasses.asdict(self)
        del value["tokenizer"]
        value["mask"]["roles"] = list(self.mask.roles)
        return value
