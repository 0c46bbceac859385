"""The packing report in a terminal."""

from rich.console import Console
from rich.table import Table


def print_report(console: Console, name: str, facts: dict, ledger: dict) -> None:
    """Print the facts of one packed folder and where its documents and tokens went."""
    per_pack = facts["documents_per_pack"]
    over = facts["packs"] - facts["lower_bound_packs"]
    table = Table(title=f"{name}: packing efficiency", title_justify="left", show_header=False, title_style="bold")
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
