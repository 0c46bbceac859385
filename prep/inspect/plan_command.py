"""`prep plan`."""

import click

from prep.inspect.raw import OPTIONS, raw_input
from prep.options import FOLDER, Listed, as_json, echo_json, quiet

_ABOVE_0 = click.FloatRange(min=0, min_open=True)
_SHARE = click.FloatRange(min=0, max=1, min_open=True)


@click.command(short_help="Forecast what packing and training would take; write nothing.")
@click.argument("inputs", nargs=-1, required=True)
@click.option("--seq-len", "seq_lens", type=Listed(int), required=True, help="Capacities, e.g. 2048,4096,8192.")
@click.option(
    "--algo", "algos", type=Listed(str), default="greedy,ffd,bfd,best", show_default=True, help="As in prep pack."
)
@click.option("--cp", "cps", type=Listed(int), default="1,2,4,8", show_default=True, help="Context-parallel sizes.")
@click.option("--tokenizer", help="Folder with tokenizer.json and the chat template; for raw input.")
@click.option(
    "--sample-mb",
    default=8,
    show_default=True,
    type=click.IntRange(min=1),
    help="Raw input that is read, in MB; of files that cannot be entered in the middle (compressed, CSV, JSON arrays, "
    "hf:) at least four.",
)
@click.option("--model", type=FOLDER, help="Folder with the model's config.json: adds memory, compute and straggler.")
@click.option("--gpus", default=8, show_default=True, type=click.IntRange(min=1), help="GPUs of the training run.")
@click.option(
    "--pp",
    default=1,
    show_default=True,
    type=click.IntRange(min=1),
    help="Pipeline stages, under 1f1b; GPU hours are without its bubble.",
)
@click.option("--dp-replicate", default=1, show_default=True, type=click.IntRange(min=1), help="Replicas (HSDP).")
@click.option("--tp", default=1, show_default=True, type=click.IntRange(min=1), help="Tensor-parallel ranks.")
@click.option("--ep", default=1, show_default=True, type=click.IntRange(min=1), help="Expert-parallel ranks.")
@click.option("--micro-packs", default=1, show_default=True, type=click.IntRange(min=1), help="Packs in a row.")
@click.option(
    "--recompute",
    default="full",
    show_default=True,
    type=click.Choice(["none", "selective", "full"]),
    help="As in train.",
)
@click.option(
    "--dtype",
    default="bfloat16",
    show_default=True,
    type=click.Choice(["float32", "bfloat16"]),
    help="Of forward and backward.",
)
@click.option(
    "--batch-tokens",
    default=1 << 20,
    show_default=True,
    type=click.IntRange(min=1),
    help="Tokens of an optimizer step.",
)
@click.option("--peak-tflops", default=989.0, show_default=True, type=_ABOVE_0, help="Of one GPU, in bf16 (H100).")
@click.option("--mfu", default=0.4, show_default=True, type=_SHARE, help="Share of the peak that is reached.")
@quiet
@as_json
def plan(inputs, seq_lens, algos, cps, tokenizer, sample_mb, model, quiet, as_json, **given) -> None:
    """What packing INPUTS (raw files, a document store or packed shards) would give, without writing anything.

    Raw input is sampled, and the error of the sample stated; the options from --input-format on say how it is read, as
    in prep encode. Documents over the capacity are cut. The last table is the
    training run on the best row of every capacity.

    \b
    prep plan chats.jsonl --tokenizer model/ --seq-len 2048,4096,8192
    prep plan packed.store --seq-len 8192 --algo bfd --cp 8 --model model/ --gpus 64 --tp 2 --batch-tokens 4194304
    """
    import json
    from dataclasses import fields

    from prep.inspect.forecast import Setup
    from prep.inspect.run_plan import make_report, print_report

    config = None
    if model is not None:
        path = model / "config.json"
        if not path.is_file():
            raise click.ClickException(f"{path}: no such file; --model names a folder with the model's config.json")
        try:
            config = json.loads(path.read_bytes())
        except ValueError as error:
            raise click.ClickException(f"{path}: not readable as JSON ({error})") from None
        if not isinstance(config, dict):
            raise click.ClickException(f"{path}: holds no object; it must be the config.json of a model")
    sources, options = raw_input(inputs, tokenizer, given)
    setup = Setup(config=config, **{field.name: given[field.name] for field in fields(Setup) if field.name in given})
    value = make_report(sources, options, sample_mb << 20, algos, seq_lens, cps, setup)
    if as_json:
        echo_json(value)
    elif not quiet:
        from rich.console import Console

        print_report(Console(), value)


plan.params.extend(OPTIONS)
