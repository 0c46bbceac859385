"""The report of `prep plan`: the what-if table and the forecast of training on its best rows."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from formats.layout import slot_alignment
from prep.encode.options import EncodeOptions
from prep.encode.sources import SourceSpec
from prep.inspect.forecast import Setup, forecast, warnings
from prep.inspect.sample import read_lengths
from prep.inspect.whatif import Outcome, table
from prep.plan import PackOptions


def make_report(
    inputs: Sequence[str | SourceSpec],
    options: EncodeOptions | None,
    sample_bytes: int,
    algos: Sequence[str],
    seq_lens: Sequence[int],
    cps: Sequence[int],
    setup: Setup,
) -> dict:
    """JSON-compatible: {"lengths", "rows", "training"}. ValueError for impossible options, before anything is read."""
    for algo in algos:
        PackOptions(max(seq_lens), algo).check()
    for cp in cps:
        PackOptions(slot_alignment(cp), cp=cp).check()
    if not any(n % slot_alignment(cp) == 0 for n in seq_lens for cp in cps):
        raise ValueError(f"no --seq-len of {seq_lens} is a multiple of 2·cp for any --cp of {cps}")
    setup.check_model()
    fitting = [cp for cp in cps if setup.fits(cp)]
    if not fitting:
        setup.width(cps[0])  # says why
    read = read_lengths(inputs, options, sample_bytes)
    rows = table(read.lengths, algos, seq_lens, cps, _cost(setup))
    best = [
        max((r for r in rows if r.seq_len == n and r.cp in fitting), key=lambda r: r.fill, default=None)
        for n in seq_lens
    ]
    training = []
    for row in (r for r in best if r is not None):
        value = forecast(row, read.lengths, read.scale, setup)
        whole = _scaled(row, read.scale)
        training.append({**whole._asdict(), **value, "warnings": warnings(whole, value)})
    tokens = int(read.lengths.sum(dtype="int64"))
    lengths = {
        "origin": read.origin,
        "documents": round(len(read.lengths) * read.scale),
        "tokens": round(tokens * read.scale),
        "relative_error_95": read.error,
        "documents_relative_error_95": read.error_documents,
        "scale": read.scale,
        "longest": int(read.lengths.max()),
    }
    return {"lengths": lengths, "rows": [_scaled(r, read.scale)._asdict() for r in rows], "training": training}


def _scaled(row: Outcome, scale: float) -> Outcome:
    """What a row on a sample means for the whole."""
    return row._replace(**{name: round(getattr(row, name) * scale) for name in ("packs", "lower_bound", "cut")})


def _cost(setup: Setup):
    from formats.cost import Model

    return Model.from_config(setup.config).pack_cost() if setup.config else None


def print_report(console: Console, value: dict) -> None:
    """Print it."""
    read = value["lengths"]
    documents, tokens = (
        f" ± {read[name]:.1%}" if read[name] else "" for name in ("documents_relative_error_95", "relative_error_95")
    )
    counts = f"[bold]{read['documents']:,}[/bold] documents{documents}, [bold]{read['tokens']:,}[/bold] tokens{tokens}"
    console.print(f"{counts}, longest {read['longest']:,} (from {read['origin']})", highlight=False)
    what = _table("what packing would give (slot, tail: padding; wait: slowest rank over mean, at most)")
    for column in ("algo", "capacity", "cp", "packs", "at least", "fill", "slot", "tail", "cut", "wait"):
        what.add_column(column, justify="left" if column == "algo" else "right")
    for r in value["rows"]:
        shares = (f"{r[name]:.2%}" for name in ("fill", "slot_padding", "tail_padding"))
        counts = (f"{r['packs']:,}", f"{r['lower_bound']:,}")
        what.add_row(
            r["algo"], f"{r['seq_len']:,}", str(r["cp"]), *counts, *shares, f"{r['cut']:,}", f"{r['straggler']:.3f}"
        )
    console.print(what)
    run = _table("training on the best row of each capacity")
    run.add_column("")
    for t in value["training"]:
        run.add_column(f"{t['seq_len']:,}", justify="right")
    for label, show in _RUN_ROWS:
        cells = [show(t) for t in value["training"]]
        if any(cells):
            run.add_row(label, *cells)
    console.print(run)
    for t in value["training"]:
        for warning in t["warnings"]:
            console.print(f"[yellow]warning[/yellow] {t['seq_len']:,}: {warning}", highlight=False)


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))


_RUN_ROWS = (
    ("algorithm, cp", lambda t: f"{t['algo']}, {t['cp']}"),
    ("data-parallel ranks", lambda t: f"{t['data_parallel']:,}"),
    ("--batch-packs", lambda t: f"{t['batch_packs']:,}"),
    ("steps an epoch", lambda t: f"{t['steps_per_epoch']:,}"),
    ("tokens a step", lambda t: f"{t['tokens_per_step']:,}"),
    ("padding", lambda t: f"{t['padding_share']:.2%}"),
    ("slowest rank over mean", lambda t: f"{t['straggler']:.3f}" if "straggler" in t else ""),
    ("parameters", lambda t: f"{t['parameters'] / 1e9:.3f} B" if "parameters" in t else ""),
    (
        "memory a GPU at its highest (estimate)",
        lambda t: f"{t['memory_gib']['total']:.1f} GiB" if "memory_gib" in t else "",
    ),
    *(
        (f"  {name}", lambda t, name=name: f"{t['memory_gib'][name]:.1f} GiB" if "memory_gib" in t else "")
        for name in ("parameters", "optimizer", "gradients", "gathered", "activations", "working")
    ),
    ("PFLOPs an epoch", lambda t: f"{t['petaflops_per_epoch']:,.1f}" if "petaflops_per_epoch" in t else ""),
    ("GPU hours an epoch", lambda t: f"{t['gpu_hours_per_epoch']:,.2f}" if "gpu_hours_per_epoch" in t else ""),
    ("shards on disk", lambda t: f"{t['shard_bytes'] / 1e9:,.3f} GB"),
    ("document store on disk", lambda t: f"{t['store_bytes'] / 1e9:,.3f} GB"),
)
