"""`prep convert`: one packed folder into another form."""

import shutil
from collections.abc import Callable
from pathlib import Path

from formats.dataset import PackedDataset
from formats.manifest import is_compressed
from formats.schema import KINDS
from prep.alone import alone
from prep.convert.megatron import write_bridge, write_megatron
from prep.convert.native import write_native
from prep.convert.saved import write_automodel, write_hf

FOREIGN: dict[str, Callable[[PackedDataset, Path], None]] = {
    "hf": write_hf,
    "automodel": write_automodel,
    "bridge": write_bridge,
    "megatron": write_megatron,
}


def check_place(folder: Path, out: Path) -> None:
    """Refuse an `out` inside the folder that is converted, whose packs would be no longer all that it holds."""
    if out.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"--out {out} lies inside {folder}, which is converted; name a folder outside it")


def convert(folder: Path, out: Path, to: str, workers: int = 1) -> int:
    """Write the packs of `folder` to `out` as one of `KINDS` or `FOREIGN`; returns the number of packs.

    The work is done in a folder beside `out`, which takes its name at the end: `out` is empty until it is whole.
    `workers` share the shards of a native kind. Raises ValueError for a damaged folder, for an `out` that is not empty,
    that lies inside `folder` or that another process writes, and for a conversion to the same kind of shards that are
    not compressed.
    """
    check_place(folder, out)
    dataset = PackedDataset(folder)
    if to == dataset.manifest.kind and not is_compressed(dataset.manifest):
        raise ValueError(f"{folder} is {to} already; name another --to")
    with alone(out):
        if any(out.iterdir()):
            raise ValueError(f"--out {out} already exists; name an empty or new folder")
        unfinished = out.with_name(out.name + ".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            if to in KINDS:
                write_native(dataset, unfinished, to, workers)
            else:
                FOREIGN[to](dataset, unfinished)
            out.rmdir()
            unfinished.rename(out)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return len(dataset)
