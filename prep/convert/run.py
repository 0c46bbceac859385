"""`prep convert`: one packed folder into another form."""

import shutil
from collections.abc import Callable
from pathlib import Path

from formats.dataset import PackedDataset
from formats.schema import KINDS
from prep.convert.megatron import write_bridge, write_megatron
from prep.convert.native import write_native
from prep.convert.saved import write_automodel, write_hf

FORMATS: dict[str, Callable[[PackedDataset, Path], None]] = {
    "thd": lambda dataset, out: write_native(dataset, out, "thd"),
    "seqid": lambda dataset, out: write_native(dataset, out, "seqid"),
    "hf": write_hf,
    "automodel": write_automodel,
    "bridge": write_bridge,
    "megatron": write_megatron,
}


def convert(folder: Path, out: Path, to: str) -> int:
    """Write the packs of `folder` to `out` as one of `FORMATS`; returns the number of packs.

    The work is done in a folder beside `out`, which takes its name at the end: `out` exists only when it is whole.
    Raises ValueError for a damaged folder, for an `out` that is not empty, and for a conversion to the same kind.
    """
    dataset = PackedDataset(folder)
    if to in KINDS and to == dataset.manifest.kind:
        raise ValueError(f"{folder} is {to} already; name another --to")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} already exists; name an empty or new folder")
    unfinished = out.with_name(out.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    try:
        FORMATS[to](dataset, unfinished)
        if out.exists():
            out.rmdir()
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return len(dataset)
