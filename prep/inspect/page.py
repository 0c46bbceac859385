"""report.html: one self-contained page of a packed folder's report, a pure function of it.

No script and nothing from the network. Everything that came from data is escaped by the template.
"""

from importlib.resources import files

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from prep.inspect import charts
from prep.inspect.visible import visible
from prep.ledger import SPLIT_REASONS

BOOKS = ("dropped", "truncated")
REASONS = {
    "to_eval": "held out for evaluation",
    "to_train": "left to training",
    "held_out_copy": "copies of held-out documents",
    "overlong": "longer than the capacity",
    "last_pack": "in the pack that --drop-last left out",
    "no_targets": "without a target token",
    "duplicate": "copies of others",
    "beyond_share": "beyond the share of their source",
    "not_in_mix": "of a source that --mix leaves out",
    "empty": "empty",
}


def render(report: dict) -> str:
    """The page of one report (`prep.inspect.report.make_report`)."""
    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, finalize=_finalize
    )
    environment.filters |= {"n": "{:,}".format, "pct": _percent, "r3": "{:.3f}".format}
    template = environment.from_string(files("prep.inspect").joinpath("page.html").read_text(encoding="utf-8"))
    histograms, balance = report["histograms"], report["balance"]
    pictures = {
        "flow": charts.flow_chart(flow(report)),
        "lengths": charts.length_chart(histograms, report["capacity"]),
        "fill": charts.fill_chart(histograms),
        "documents": charts.documents_chart(histograms),
        "samples": charts.samples_chart(report["samples"], report["capacity"], report["align"]),
    }
    if balance["widths"]:
        pictures |= {"cost": charts.cost_chart(balance), "stragglers": charts.straggler_chart(balance)}
    return template.render(
        r=report,
        over=report["packs"] - report["lower_bound_packs"],
        ledger=ledger_rows(report["ledger"]["total"]),
        ledgers={name: ledger_rows(account) for name, account in sorted(report["ledger"]["sources"].items())},
        lengths=_length_rows(histograms["length"]),
        fills=_fill_rows(histograms["fill"]),
        per_pack=_per_pack_rows(histograms["documents_per_pack"]),
        whatif=whatif_matrix(report),
        errors=report["lint"]["errors"],
        warnings=report["lint"]["warnings"],
        pictures={name: Markup(svg) for name, svg in pictures.items()},
    )


def flow(report: dict) -> list[tuple[str, list[tuple[str, int, str]]]]:
    """The rows of the flow: what was read, what became of it, what the packs hold, what of that is trained."""
    account = report["ledger"]["total"]
    reasons = [(reason, count["tokens"]) for book in BOOKS for reason, count in sorted(account[book].items())]
    lost = [(REASONS.get(r, r), tokens, "d" if r in SPLIT_REASONS else "c") for r, tokens in reasons if tokens]
    kept = account["kept"]["tokens"]
    targets, tokens = report["target_tokens"], report["tokens"]
    return [
        ("read", [("read", account["read"]["tokens"], "a")]),
        ("kept", [("kept", kept, "a"), *lost]),
        (
            "packed",
            [
                ("tokens", tokens, "a"),
                ("slot padding", report["slot_padding"], "c"),
                ("tail padding", report["tail_padding"], "d"),
            ],
        ),
        ("trained", [("targets", targets, "b"), ("context only", tokens - targets, "a")]),
    ]


def ledger_rows(account: dict) -> list[tuple[str, int, int]]:
    """(what, documents, tokens) from read to kept."""
    rows = [("read", account["read"])]
    for book in BOOKS:
        for reason, count in sorted(account[book].items()):
            label = REASONS.get(reason, reason)
            rows.append((label if reason in SPLIT_REASONS else f"{book}: {label}", count))
    rows.append(("kept", account["kept"]))
    return [(what, count["documents"], count["tokens"]) for what, count in rows]


def whatif_matrix(report: dict) -> dict:
    """The what-if table with one row an algorithm and capacity: {"cps", "rows": [{"algo", "seq_len", "packs", "cut",
    "cells": [{"fill" (None where impossible), "here", "best"} by cp]}], "here" (whether any cell is)}; packs and cut
    are those of the first cp."""
    made = {(w["seq_len"], w["algo"], w["cp"]): w for w in report["whatif"]["rows"]}
    cps = sorted({cp for _, _, cp in made})
    best = {n: max(w["fill"] for (seq_len, _, _), w in made.items() if seq_len == n) for n, _, _ in made}
    here = (report["capacity"], report["algorithm"], report["cp"])
    rows = []
    for seq_len, algo in dict.fromkeys((n, algo) for n, algo, _ in made):
        cells = []
        for cp in cps:
            outcome = made.get((seq_len, algo, cp))
            fill = outcome["fill"] if outcome else None
            cells.append({"fill": fill, "here": (seq_len, algo, cp) == here, "best": fill == best[seq_len]})
        first = made.get((seq_len, algo, cps[0]))
        rows.append({"algo": algo, "seq_len": seq_len, "packs": first["packs"], "cut": first["cut"], "cells": cells})
    return {"cps": cps, "rows": rows, "here": here in made}


def _length_rows(histogram: dict) -> list[tuple[int, int, int]]:
    edges = histogram["edges"]
    rows = zip(edges[:-1], edges[1:], histogram["documents"], strict=True)
    return [(low, high - 1, count) for low, high, count in rows if count]


def _fill_rows(histogram: dict) -> list[tuple[int, int, int]]:
    edges = [round(100 * edge) for edge in histogram["edges"]]
    return [row for row in zip(edges[:-1], edges[1:], histogram["packs"], strict=True) if row[2]]


def _per_pack_rows(histogram: dict) -> list[tuple[int, int, int]]:
    first, width = histogram["first"], histogram["width"]
    rows = ((first + i * width, first + (i + 1) * width - 1, n) for i, n in enumerate(histogram["packs"]))
    return [row for row in rows if row[2]]


def _finalize(value: object) -> object:
    """What stands for a value on the page; pictures are markup of our own and stay."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _percent(value: float) -> str:
    return f"{value:.2%}"
