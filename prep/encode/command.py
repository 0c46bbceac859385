"""`prep encode`: parse, call, print."""

import functools
import os
import time
from collections.abc import Callable

import click

from prep.encode.options import DEDUP, END_OF_TURN, ENGINES, ON_ERROR, TRAIN_ON, EncodeOptions, MaskPolicy
from prep.options import Output, Size, as_json, echo_json, quiet


def resumable(command: Callable) -> Callable:
    """Ctrl-C at any moment of a command that writes `out` ends with one sentence that says how to go on."""

    @functools.wraps(command)
    def run(*, out: str, **given) -> None:
        try:
            command(out=out, **given)
        except KeyboardInterrupt:
            raise click.ClickException(f"stopped; what is finished is kept in {out}: go on with --resume") from None

    return run


@click.command(short_help="Tokenize text and chats into a document store, with loss masks.")
@click.argument("inputs", nargs=-1)
@click.option(
    "--out",
    required=True,
    type=Output(address=True),
    help="Folder of the document store, or an address such as s3://bucket/store.",
)
@click.option("--tokenizer", required=True, help="Folder or address with tokenizer.json and the chat template.")
@click.option("--mix", type=click.Path(), help="YAML of sources: name, paths, format, template, columns, weight …")
@click.option("--input-format", help="jsonl, json, parquet, arrow, csv, tsv, text; default: by the ending of the name.")
@click.option(
    "--text-by", default="line", show_default=True, help="A plain text's document: line, paragraph, document."
)
@click.option(
    "--column", "columns", multiple=True, metavar="OURS=THEIRS", help="Field of ours = column, e.g. text=body."
)
@click.option("--chat-template", help="A Jinja file or chatml, llama3, gemma, phi, mistral, qwen, deepseek, plain.")
@click.option("--template-date", help="YYYY-MM-DD, for templates that write today's date.")
@click.option(
    "--train-on",
    default="assistant",
    show_default=True,
    type=click.Choice(TRAIN_ON),
    help="Turns that are trained: the assistant's, its last, those behind the last message of others, or all text.",
)
@click.option("--train-role", "roles", multiple=True, help="Roles whose turns are trained; default: assistant.")
@click.option(
    "--end-of-turn",
    default="turn",
    show_default=True,
    type=click.Choice(END_OF_TURN),
    help="Ends that are trained: of each trained turn, of all turns, of the last trained turn, or none.",
)
@click.option("--keep-untrained", is_flag=True, help="Keep documents without a single target token.")
@click.option("--allow-special", is_flag=True, help="Control tokens inside the texts of records count as such.")
@click.option(
    "--tokenizer-engine",
    "engine",
    default="auto",
    show_default=True,
    type=click.Choice(ENGINES),
    help="hf: Hugging Face tokenizers; fast: fastokens, compared with hf on a sample; auto: fast where it can.",
)
@click.option("--on-error", default="stop", show_default=True, type=click.Choice(ON_ERROR), help="At a bad record.")
@click.option("--max-errors", help="Bad records that may be skipped: a count, or a percentage like 0.5%.")
@click.option("--dedup", default="none", show_default=True, type=click.Choice(DEDUP), help="Keep the first of equals.")
@click.option(
    "--unit-bytes", default="4M", show_default=True, type=Size(), help="Input of a work unit, e.g. 4M; 64M for s3://…"
)
@click.option("--workers", type=click.IntRange(min=1), help="Processes; default: the cores of this machine.")
@click.option("--unit-range", metavar="I/N", help="Do only part I (from 1) of N: one task of a Slurm array.")
@click.option(
    "--engine",
    "runner",
    default="local",
    show_default=True,
    type=click.Choice(["local", "ray"]),
    help="Who runs the work units: processes of this machine, or a Ray cluster. The bytes are the same.",
)
@click.option("--ray-address", help="Address of a Ray cluster; default: start one on this machine.")
@click.option("--resume", is_flag=True, help="Go on where an interrupted run with the same options stopped.")
@quiet
@as_json
@resumable
def encode(
    inputs, out, mix, columns, roles, workers, unit_range, runner, ray_address, resume, quiet, as_json, **given
) -> None:
    """Encode INPUTS into a document store OUT that `prep pack` takes: token ids and loss masks, tokenized once.

    An input is a file, a folder, a glob, an address (s3://…, https://…), a folder that `datasets` saved, or
    hf:name[:config]#split. Links are followed, each file is read once. A record has messages, conversations,
    instruction and output, prompt and completion, segments, text, or input_ids. Its flags go before all options:
    `train` and `weight: 0` of messages and of parts of a content, `train` of segments. Control tokens in its texts
    stay text, in segments too, unless --allow-special.

    \b
    prep encode chats.jsonl books/ --out store --tokenizer model/
    prep encode --mix mix.yaml --out store --tokenizer model/ --workers 16
    prep encode s3://bucket/chats/ --out s3://bucket/store --tokenizer model/ --unit-bytes 64M
    """
    # Help is instant: what encodes is imported when it is needed.
    from prep.encode.run import write_store
    from prep.progress import Progress

    sources = sources_of(inputs, mix, columns, given)
    options = options_of(roles, given)
    with Progress(quiet=quiet).stage("encoding", "units") as update:
        begin = time.monotonic()

        def report(p) -> None:
            update(p.units_done, p.units, progress_note(p, time.monotonic() - begin))

        content = write_store(
            sources,
            out,
            options,
            workers=workers or len(os.sched_getaffinity(0)),
            resume=resume,
            progress=report,
            runner=runner,
            ray_address=ray_address,
            unit_range=_part(unit_range),
        )
    if as_json:
        echo_json(_summary(out, content, unit_range))
    elif not quiet and content is None:
        click.echo(f"{out}: part {unit_range} is done; run once more without --unit-range, with --resume, when all are")
    elif not quiet:
        _print_summary(out, content)


def progress_note(p, seconds: float) -> str:
    """What stands behind the bar: how much is done, how fast, and what was left out."""
    seconds = max(seconds, 1e-3)
    note = f"{p.bytes_done / 1e6:,.0f} of {p.bytes / 1e6:,.0f} MB, {p.bytes_done / 1e6 / seconds:,.1f} MB/s"
    note += f", {p.documents:,} documents, {p.tokens:,} tokens, {p.tokens / seconds:,.0f} tokens/s"
    note += f", {p.dropped - p.rejected:,} dropped" if p.dropped > p.rejected else ""
    return note + (f", {p.rejected:,} bad records skipped" if p.rejected else "")


def sources_of(inputs: tuple, mix: str | None, columns: tuple[str, ...], given: dict) -> list:
    """The sources that INPUTS or --mix, --column, --input-format and --text-by name."""
    from prep.encode.sources import as_sources

    if bool(inputs) == bool(mix):
        raise click.UsageError("give either INPUTS or --mix")
    if mix:
        from prep.encode.mix_file import read_mix

        if columns or given["input_format"] or given["text_by"] != "line":
            raise click.UsageError("with --mix each source has its own columns, format and text_by, in the file")
        return read_mix(mix)
    return as_sources(inputs, format=given["input_format"], text_by=given["text_by"], columns=_columns(columns))


def options_of(roles: tuple[str, ...], given: dict) -> EncodeOptions:
    """The options that decide the store, from those of the command line that the command has."""
    names = ("tokenizer", "chat_template", "template_date", "allow_special", "engine", "on_error", "max_errors")
    names += ("dedup", "keep_untrained", "unit_bytes")
    mask = MaskPolicy(given["train_on"], tuple(roles) or ("assistant",), given["end_of_turn"])
    options = EncodeOptions(mask=mask, **{name: given[name] for name in names if name in given})
    if options.max_errors is not None and options.on_error != "skip":
        raise click.UsageError("--max-errors is for --on-error skip; without it the first bad record ends the run")
    return options


def _columns(pairs: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    for pair in pairs:
        if "=" not in pair:
            raise click.UsageError(f"--column {pair}: expected OURS=THEIRS, e.g. text=body")
    return tuple(sorted(tuple(pair.split("=", 1)) for pair in pairs))


def _part(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise click.UsageError(f"--unit-range {text}: expected I/N with I from 1 to N")
    return int(part), int(parts)


def _summary(out: str, content: dict | None, unit_range: str | None) -> dict:
    """What `--json` prints: `finished` is false for a part, which has nothing else to tell."""
    if content is None:
        return {"store": out, "finished": False, "unit_range": unit_range}
    names = ("rows", "tokens", "target_tokens", "engine", "sources", "ledger", "template_hash", "tokenizer_hash")
    names += ("left_out",)
    return {"store": out, "finished": True, "units": len(content["units"]), **{name: content[name] for name in names}}


def _print_summary(out: str, content: dict) -> None:
    total = content["ledger"]["total"]
    share = 100 * content["target_tokens"] / max(1, content["tokens"])
    notes = {name: count for name, count in total["notes"].items() if name != "files_of_unknown_format"}
    compared = notes.pop("compared_with_hf", 0)
    click.echo(
        f"{out}: {content['rows']:,} documents, {content['tokens']:,} tokens, {share:.1f} % of them targets; "
        f"tokenizer engine {content['engine']}" + (f", {compared:,} pieces compared with hf" if compared else "")
    )
    for reason, count in sorted(total["dropped"].items()):
        click.echo(f"  dropped, {reason}: {count['documents']:,} documents, {count['tokens']:,} tokens")
    for name, count in sorted(notes.items()):
        click.echo(f"  {name.replace('_', ' ')}: {count:,}")
    for source, others in sorted(content.get("left_out", {}).items()):
        count = content["ledger"]["sources"][source]["notes"]["files_of_unknown_format"]
        more = f" and {count - len(others):,} more" if count > len(others) else ""
        click.echo(f"  left out of {source}, of unknown format: {', '.join(others)}{more}")
