"""`prep pack`."""

import os
from pathlib import Path

import click

from prep.encode.command import encode, options_of, resumable, sources_of
from prep.options import Output, Size, as_json, echo_json, given_options, quiet


@click.command(short_help="Pack raw files or a document store into shards for training.")
@click.argument("inputs", nargs=-1)
@click.option(
    "--out",
    required=True,
    type=Output(address=True),
    help="Folder for the shards, or an address (s3://…); must be empty.",
)
@click.option("--tokenizer", help="Folder or address with tokenizer.json and the chat template; for raw input.")
@click.option("--seq-len", required=True, type=int, help="Capacity of a pack in tokens.")
@click.option(
    "--algo",
    default="bfd",
    show_default=True,
    help="greedy, ordered, ffd, bfd, level, best, optimal or split (one stream cut at every capacity).",
)
@click.option("--cp", default=1, show_default=True, help="Align documents for this many context-parallel ranks.")
@click.option(
    "--format", "kind", default="thd", show_default=True, type=click.Choice(["thd", "seqid"]), help="Layout of a row."
)
@click.option(
    "--order",
    default="cost",
    show_default=True,
    type=click.Choice(["cost", "shuffle", "input"]),
    help="Order of the packs; cost: packs of like attention cost side by side, so that no rank waits. Eval is input.",
)
@click.option(
    "--overlong",
    default="error",
    show_default=True,
    type=click.Choice(["error", "drop", "truncate", "split"]),
    help="What happens to documents longer than --seq-len.",
)
@click.option(
    "--max-docs",
    type=click.IntRange(min=1),
    help="At most this many documents a pack; where that binds, --algo best needs far fewer packs than bfd.",
)
@click.option("--drop-last", is_flag=True, help="Leave out the one pack with the fewest tokens, unless it is full.")
@click.option("--seed", default=0, show_default=True, help="Decides order and ties, nothing else.")
@click.option(
    "--eval-fraction",
    default=0.0,
    show_default=True,
    type=click.FloatRange(0, 1, max_open=True),
    help="Share of documents, chosen by hash, held out: makes OUT/train and OUT/eval. Equal ones stay together.",
)
@click.option(
    "--eval-source",
    "eval_sources",
    multiple=True,
    help="Hold out all documents of this source; copies that other sources have of them are left out of both.",
)
@click.option("--shard-size", type=Size(), default="256M", show_default=True, help="Aim of a shard, e.g. 64M or 2G.")
@click.option(
    "--compress", type=click.Choice(["zstd"]), help="For shipping: smaller shards, which cannot be memory-mapped."
)
@click.option(
    "--gate", "gates", multiple=True, help="Exit with 3 unless this holds of the (training) packs: fill>=0.98"
)
@click.option("--no-page", is_flag=True, help="Write no report.html.")
@click.option("--workers", type=click.IntRange(min=1), help="Processes; default: the cores of this machine.")
@click.option("--resume", is_flag=True, help="Finish what an interrupted run with the same options left.")
@quiet
@as_json
@resumable
def pack(
    inputs, out, eval_fraction, eval_sources, shard_size, compress, gates, no_page, workers, resume, quiet, **given
) -> None:
    """Pack INPUTS (anything that `prep encode` reads, or one document store) into OUT.

    Raw input is tokenized into a document store beside OUT (OUT.store), from which other packs can be made without
    tokenizing again. The options from --mix on are those of `prep encode`; a store takes --mix alone of them, for other
    weights, repeats and limits of its sources (the sources that the file does not name are left out). With an address
    as OUT the shards are made in a temporary folder (TMPDIR) and put there, the manifest last; the trainer reads them
    from a local copy.

    \b
    prep pack chats.jsonl --out packed --tokenizer model/ --algo ffd --cp 2 --seq-len 4096 --eval-fraction 0.02
    prep pack packed.store --out packed-8k --algo bfd --seq-len 8192 --gate 'fill>=0.98' --gate 'dropped<=1%'
    prep pack packed.store --out packed-mixed --seq-len 4096 --mix weights.yaml
    prep pack s3://bucket/store --out s3://bucket/packed --seq-len 4096
    """
    from prep.gates import parse_gate
    from prep.pipeline import OutputOptions, pack_inputs
    from prep.plan import PackOptions
    from prep.progress import Progress
    from prep.remote import destination

    wanted = [parse_gate(text) for text in gates]
    planned = ("seq_len", "algo", "cp", "order", "seed", "overlong", "max_docs", "drop_last")
    origin = _origin(inputs, out, given)
    progress = Progress(quiet=quiet)
    with destination(out, resume, progress) as folder:
        folders = pack_inputs(
            origin,
            folder,
            PackOptions(format=given["kind"], **{name: given[name] for name in planned}),
            output=OutputOptions(eval_fraction, eval_sources, shard_size, compress, not no_page),
            workers=workers or len(os.sched_getaffinity(0)),
            resume=resume,
            progress=progress,
        )
        reports = read_reports(folders)
    if compress and not quiet:
        way_back = f"prep convert --to {given['kind']} decompresses"
        click.echo(f"note: compressed shards are for shipping, training cannot map them: {way_back}", err=True)
    names = [out if part == folder else f"{out.rstrip('/')}/{part.name}" for part in folders]
    show(names, reports, as_json=given["as_json"], quiet=quiet)
    _hold(wanted, reports[0])


def _origin(inputs: tuple[str, ...], out: str, given: dict):
    """What is packed: a document store, with its new mix, or raw input, with all that says how to encode it."""
    from prep.encode.mix_file import read_mix
    from prep.encode.sources import SourceSpec, check_place, without_tokenizer
    from prep.pipeline import Encoding, Stored, find_store

    place = find_store(inputs)
    if place is not None:
        if useless := [name for name in given_options(_ENCODING) if name != "--mix"]:
            raise click.ClickException(
                f"{place} is encoded already: leave out {', '.join(useless)}, or name the raw files"
            )
        check_place(out, [SourceSpec("store", (place,))])
        return Stored(place, () if given["mix"] is None else read_mix(given["mix"], encoded=True))
    sources = sources_of(inputs, given["mix"], given["columns"], given)
    if not given["tokenizer"]:
        raise without_tokenizer(sources)
    store = f"{out.rstrip('/')}.store" if "://" in out else None
    return Encoding(sources, options_of(given["roles"], given), given["runner"], given["ray_address"], store)


def read_reports(folders: list[Path]) -> list[dict]:
    """The reports of finished folders."""
    import json

    from prep.inspect.report import REPORT_NAME

    return [json.loads((folder / REPORT_NAME).read_bytes()) for folder in folders]


def show(names: list[str], reports: list[dict], *, as_json: bool, quiet: bool) -> None:
    """Print the reports of the folders of these names."""
    import sys

    if as_json:
        echo_json(reports[0] if len(reports) == 1 else {r["split"]: r for r in reports})
    elif not quiet:
        from rich.console import Console

        from prep.inspect.terminal import print_report

        for name, report in zip(names, reports, strict=True):
            print_report(Console(file=sys.stdout), name, report)


def _hold(gates, report: dict) -> None:
    from prep.gates import EXIT_CODE

    broken = [message for message in (gate.check(report) for gate in gates) if message]
    for message in broken:
        click.echo(f"Error: {message}", err=True)
    if broken:
        raise SystemExit(EXIT_CODE)


# Raw input is encoded on the way: the options of `prep encode` that `pack` has not itself are its own, too.
_OWN = {parameter.name for parameter in pack.params} | {"unit_range"}
pack.params.extend(parameter for parameter in encode.params if parameter.name not in _OWN)
_ENCODING = {parameter.name for parameter in encode.params} - _OWN | {"tokenizer"}
