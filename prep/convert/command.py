"""`prep convert`."""

from pathlib import Path

import click

from prep.options import FOLDER, Output, as_json, echo_json, quiet
from prep.options import workers as workers_option

TO = ("thd", "seqid", "hf", "automodel", "bridge", "megatron")

HINTS = {
    "thd": "train with: torchrun train/main.py --shards {out}",
    "seqid": "readers must take attention_mask as document numbers, 0 being padding",
    "hf": "datasets.load_from_disk({out!r}); TRL: SFTConfig(padding_free=True), the model with use_cache=False",
    "automodel": "datasets.load_from_disk({out!r}), collated by packed_sequence_thd_collater",
    "bridge": "Megatron-Bridge: packed_train_data_path={out}/packed.idx.parquet",
    "megatron": "Megatron-LM: --data-path {out}/documents (texts only: it knows no packs and no loss mask)",
}


@click.command(short_help="Write packs in another layout or in another trainer's format.")
@click.argument("folder", type=FOLDER)
@click.option("--to", required=True, type=click.Choice(TO), help="Whose format.")
@click.option("--out", required=True, type=Output(), help="Folder to write; must be empty or new.")
@workers_option
@quiet
@as_json
def convert(folder, to, out, workers, quiet, as_json) -> None:
    """Write the packs of FOLDER (or of its train and eval) in the format of another trainer.

    \b
    thd, seqid  the two layouts of this project, exactly into each other; shards of prep pack --compress are
                decompressed. The workers share the shards (the other formats are one stream, one process writes it)
    hf          a datasets folder for TRL's SFTTrainer and Axolotl
    automodel   a datasets folder for NVIDIA NeMo AutoModel's packed collater
    bridge      packed Parquet of NVIDIA Megatron-Bridge
    megatron    indexed documents (.bin/.idx) of Megatron-LM

    \b
    prep convert packed --to hf --out packed-hf
    prep convert packed-seqid --to thd --out packed-thd
    """
    from formats.manifest import read_manifest
    from prep.convert.run import check_place
    from prep.convert.run import convert as run
    from prep.inspect.facts import packed_folders

    out, written = Path(out), {}
    check_place(folder, out)
    parts = packed_folders(folder)
    for part in parts:
        read_manifest(part)  # before anything is written: all of them or none
    for part in parts:
        target = out if part == folder else out / part.name
        written[str(target)] = {"packs": run(part, target, to, workers), "format": to}
        if not quiet and not as_json:
            packs = written[str(target)]["packs"]
            click.echo(f"{target}: {packs:,} packs; {HINTS[to].format(out=str(target))}")
    if as_json:
        echo_json(written)
