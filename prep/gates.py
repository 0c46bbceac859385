"""Gates: conditions on the report of a packing, such as `fill>=0.98` or `dropped<=1%`."""

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from prep.ledger import SPLIT_REASONS

EXIT_CODE = 3
"""Of `prep pack` when everything was written but a gate is not met."""

_COMPARISONS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt, "==": operator.eq}
_PATTERN = re.compile(r"\s*([a-z_]+)\s*(<=|>=|==|<|>)\s*((?:\d+\.?\d*|\.\d+)(?:e-?[0-9]+)?)\s*(%?)\s*")


def _share(book: str, unit: str) -> Callable[[Mapping], float]:
    def of(report: Mapping) -> float:
        total = report["ledger"]["total"]
        lost = sum(count[unit] for reason, count in total[book].items() if reason not in SPLIT_REASONS)
        return lost / max(1, total["read"][unit])

    return of


METRICS: dict[str, Callable[[Mapping], float]] = {
    "fill": lambda r: r["fill"],
    "dropped": _share("dropped", "tokens"),
    "dropped_documents": _share("dropped", "documents"),
    "truncated": _share("truncated", "tokens"),
    "slot_padding": lambda r: r["slot_padding_share"],
    "tail_padding": lambda r: r["tail_padding_share"],
    "targets": lambda r: r["target_share"],
    "over_bound": lambda r: r["packs"] / r["lower_bound_packs"] - 1,
    "straggler": lambda r: max(r["balance"]["straggler"], default=1.0),
    "packs": lambda r: r["packs"],
    "documents": lambda r: r["documents"],
    "tokens": lambda r: r["tokens"],
    "lint_errors": lambda r: r["lint"]["errors"],
    "lint_warnings": lambda r: r["lint"]["warnings"],
}
"""What a gate can ask of a report. Shares are fractions (of what was read, for what was lost; of all room, for
padding), also written in per cent."""


@dataclass(frozen=True)
class Gate:
    """One condition; `check(report)` is None when it holds, else the sentence that says what was found."""

    text: str
    metric: str
    comparison: str
    limit: float

    def check(self, report: Mapping) -> str | None:
        found = METRICS[self.metric](report)
        if _COMPARISONS[self.comparison](found, self.limit):
            return None
        return f"gate {self.text} is not met: {self.metric} is {found:.6g}"


def parse_gate(text: str) -> Gate:
    """A gate from its text. ValueError says which metrics there are."""
    found = _PATTERN.fullmatch(text)
    if not found or found[1] not in METRICS:
        raise ValueError(
            f"--gate {text!r}: write METRIC<=NUMBER (or >=, <, >, ==; % allowed), with a metric of {', '.join(METRICS)}"
        )
    return Gate(text, found[1], found[2], float(found[3]) / (100 if found[4] else 1))
