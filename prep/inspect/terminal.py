"""The packing report in a terminal."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from prep.inspect.visible import visible


def print_report(console: Console, name: str, report: dict) -> None:
    """Print the report of one packed folder (`prep.inspect.facts.write_report`): its facts, and where every document
    and token that was read went."""
    _print_facts(console, name, report)
    _print_ledger(console, name, report["ledger"]["total"])
    if len(report["sources"]) > 1:
        _print_sources(console, name, report["sources"])
    _print_balance(console, name, report["balance"])
    print_lint(console, f"{name}: lint", report["lint"])


def _print_facts(console: Console, name: str, facts: dict) -> None:
    per_pack = facts["documents_per_pack"]
    over = facts["packs"] - facts["lower_bound_packs"]
    console.print(f"\n[bold]{_text(name)}[/bold]: packing efficiency", highlight=False)
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column(style="dim")
    table.add_row("fill", f"{facts['fill']:.2%}", "real tokens / room in all packs")
    table.add_row("packs", f"{facts['packs']:,}", f"{facts['algorithm']}, {facts['capacity']:,} tokens each")
    proof = "optimal: no packing has fewer" if over == 0 else f"{over:,} over it"
    table.add_row("lower bound on packs", f"{facts['lower_bound_packs']:,}", proof)
    pieces = facts["slots"] - facts["documents"]
    table.add_row("documents", f"{facts['documents']:,}", f"{pieces:,} more pieces of cut documents" if pieces else "")
    table.add_row(
        "documents per pack", f"{per_pack['mean']:.1f}", f"{per_pack['min']} to {per_pack['max']}, mean and range"
    )
    table.add_row("tokens", f"{facts['tokens']:,}", f"longest document {facts['longest_document']:,}")
    table.add_row("targets", f"{facts['target_share']:.2%}", f"{facts['target_tokens']:,} tokens are trained")
    aligned = f"slots aligned to {facts['align']} for cp {facts['cp']}" if facts["align"] > 1 else "slots not aligned"
    table.add_row("slot padding", f"{facts['slot_padding_share']:.2%}", f"{facts['slot_padding']:,} tokens, {aligned}")
    table.add_row("tail padding", f"{facts['tail_padding_share']:.2%}", f"{facts['tail_padding']:,} tokens")
    console.print(table)


def _print_ledger(console: Console, name: str, account: dict) -> None:
    console.print(f"[bold]{_text(name)}[/bold]: where everything went", highlight=False)
    table = Table(box=None)
    table.add_column("")
    table.add_column("documents", justify="right")
    table.add_column("tokens", justify="right")
    rows = [("read", account["read"])]
    rows += [
        (f"{book}: {reason}", count) for book in ("dropped", "truncated") for reason, count in account[book].items()
    ]
    rows.append(("kept", account["kept"]))
    for label, count in rows:
        table.add_row(label, f"{count['documents']:,}", f"{count['tokens']:,}")
    console.print(table)


def _print_sources(console: Console, name: str, sources: list[dict]) -> None:
    console.print(f"[bold]{_text(name)}[/bold]: sources", highlight=False)
    table = Table(box=None)
    for column in ("", "documents", "tokens", "share"):
        table.add_column(column, justify="left" if not column else "right")
    for s in sources:
        table.add_row(_text(s["name"]), f"{s['documents']:,}", f"{s['tokens']:,}", f"{s['share']:.2%}")
    console.print(table)


def _print_balance(console: Console, name: str, balance: dict) -> None:
    if not balance["widths"]:
        return
    what = f"slowest rank over mean, attention of a model of {balance['model']}"
    console.print(f"[bold]{_text(name)}[/bold]: {what}", highlight=False)
    table = Table(box=None)
    table.add_column("data-parallel ranks")
    for width in balance["widths"]:
        table.add_column(str(width), justify="right")
    for label, key in (("random order", "straggler_random"), ("this order", "straggler")):
        table.add_row(label, *(f"{value:.3f}" for value in balance[key]))
    console.print(table)


LEVEL_STYLES = {"error": "bold red", "warning": "yellow", "note": "dim"}


def print_lint(console: Console, name: str, result: dict, *, errors_only: bool = False) -> None:
    """Print the findings of `prep.inspect.lint.lint`."""
    shown = [f for f in result["findings"] if f["level"] == "error" or not errors_only]
    if not errors_only:
        summary = f"{result['errors']} errors, {result['warnings']} warnings in {result['documents']:,} documents"
        console.print(f"\n[bold]{_text(name)}[/bold]: {summary}", highlight=False)
    for found in shown:
        style = LEVEL_STYLES[found["level"]]
        head = f"[{style}]{found['level']}[/{style}] {found['check']}: {found['count']:,} ({found['share']:.2%})"
        console.print(f"{head} {_text(found['text'])}", highlight=False)
        if found["examples"]:
            console.print(f"  [dim]e.g. {_text('; '.join(found['examples']))}[/dim]", highlight=False)


def _text(text: str) -> str:
    """Text from data as rich prints it: no markup, nothing that the terminal obeys."""
    return escape(visible(text))
