"""The `prep` command: parse, call, print. What a command needs is imported when it runs, so that help is instant."""

import os
import re
import sys
from pathlib import Path

import click


class OneSentence(click.Group):
    """Turns the errors a user can mend into one sentence and exit code 1; anything else keeps its traceback."""

    def invoke(self, ctx: click.Context):
        try:
            return super().invoke(ctx)
        except (ValueError, OSError) as error:
            if os.environ.get("MESHPACK_TRACEBACK"):
                raise
            raise click.ClickException(str(error)) from None


class Size(click.ParamType):
    """A number of bytes: 65536, 64K, 256M, 2G (powers of 1024)."""

    name = "size"

    def convert(self, value, param, ctx) -> int:
        found = re.fullmatch(r"(\d+)([KMG]?)i?B?", str(value), re.IGNORECASE)
        if not found or not int(found[1]):
            self.fail(f"{value!r} is not a size like 65536, 64K, 256M or 2G")
        return int(found[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[found[2].upper()]


@click.group(cls=OneSentence, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="meshpack")
def main() -> None:
    """Pack tokenized documents into Arrow shards, offline and once, for training on any mesh."""


@main.command()
@click.argument("inputs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the shards; must be empty.")
@click.option("--tokenizer", type=click.Path(path_type=Path), help="Folder with tokenizer.json and the chat template.")
@click.option("--seq-len", required=True, type=int, help="Capacity of a pack in tokens.")
@click.option("--algo", default="bfd", show_default=True, help="Packing algorithm: greedy, ffd, bfd, best, optimal …")
@click.option("--cp", default=1, show_default=True, help="Align documents for this many context-parallel ranks.")
@click.option(
    "--format", "kind", default="thd", show_default=True, type=click.Choice(["thd", "seqid"]), help="Layout of a row."
)
@click.option(
    "--order", default="shuffle", show_default=True, type=click.Choice(["shuffle", "input"]), help="Order of the packs."
)
@click.option(
    "--overlong",
    default="error",
    show_default=True,
    type=click.Choice(["error", "drop", "truncate", "split"]),
    help="What happens to documents longer than --seq-len.",
)
@click.option("--max-docs", type=click.IntRange(min=1), help="At most this many documents a pack.")
@click.option("--seed", default=0, show_default=True, help="Decides order and ties, nothing else.")
@click.option(
    "--eval-fraction",
    default=0.0,
    show_default=True,
    type=click.FloatRange(0, 1, max_open=True),
    help="Share of documents, chosen by hash, held out: makes OUT/train and OUT/eval.",
)
@click.option("--shard-size", type=Size(), default="256M", show_default=True, help="Aim of a shard, e.g. 64M or 2G.")
@click.option("--workers", type=click.IntRange(min=1), help="Processes; default: the cores of this machine.")
@click.option("--resume", is_flag=True, help="Finish what an interrupted run with the same options left.")
@click.option("--quiet", is_flag=True, help="No progress and no report; errors only.")
def pack(inputs, out, tokenizer, eval_fraction, shard_size, workers, resume, quiet, **options) -> None:
    """Pack INPUTS (JSONL files of messages, prompt/completion or text; or one document store) into OUT.

    Raw input is tokenized into a document store beside OUT (OUT.store), from which other packs can be made without
    tokenizing again.

    \b
    prep pack chats.jsonl --out packed --tokenizer model/ --algo ffd --cp 2 --seq-len 4096 --eval-fraction 0.02
    prep pack packed.store --out packed-8k --algo bfd --seq-len 8192
    """
    from prep.pipeline import pack_inputs
    from prep.plan import PackOptions
    from prep.progress import Progress

    options["format"] = options.pop("kind")
    folders = pack_inputs(
        inputs,
        out,
        PackOptions(**options),
        tokenizer=tokenizer,
        eval_fraction=eval_fraction,
        shard_size=shard_size,
        workers=workers or len(os.sched_getaffinity(0)),
        resume=resume,
        progress=Progress(quiet=quiet),
    )
    for folder in folders:
        _show(folder, as_json=False, quiet=quiet)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the facts as JSON instead of tables.")
@click.option("--quiet", is_flag=True, help="Print nothing, only write report.json.")
def report(folder, as_json, quiet) -> None:
    """Print the packing efficiency of FOLDER (or of its train and eval) and write it to report.json beside the shards.

    \b
    prep report packed
    prep report packed/train --json
    """
    from prep.inspect.facts import packed_folders

    for part in packed_folders(folder):
        _show(part, as_json=as_json, quiet=quiet)


def _show(folder: Path, *, as_json: bool, quiet: bool) -> None:
    from rich.console import Console

    from prep.inspect.facts import write_report
    from prep.inspect.terminal import print_report

    value = write_report(folder)
    if as_json:
        import json

        click.echo(json.dumps(value, indent=2, sort_keys=True))
    elif not quiet:
        print_report(Console(file=sys.stdout), str(folder), value)


if __name__ == "__main__":
    main()
