"""Turn a checkpoint into a Hugging Face folder: `python train/export.py RUN --out DIR`.

Runs in one process, without the shards and whatever mesh wrote the checkpoint. Tensors are read one at a time, so
memory is one file of the export and one tensor. (The export at the end of a run is `train.hf_write.save_weights`.)
"""

import argparse
import json
import math
import sys
import warnings
from functools import cache
from pathlib import Path

if __name__ == "__main__":
    # A script's own folder comes first on the path, where `train/data.py` would be found as `data`.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata

from train import hf, hf_write
from train.checkpoint import check_model, read_mark, readable, whole_checkpoints
from train.model.decoder import Decoder
from train.outdir import RUN_NAME

GB = 1_000_000_000


def export(
    path: Path, out: Path, *, model: Path | None = None, dtype: torch.dtype | None = None, file_gb: float = 5.0
) -> Path:
    """Write the weights of a checkpoint as the Hugging Face folder `out`, and return the checkpoint.

    `path` is a run's folder, of which the last whole checkpoint is taken, or a checkpoint. Configuration and tokenizer
    come from the folder `model`, by default the run's `--model`. `dtype` is that of the files, by default that of the
    checkpoint; a file holds at most `file_gb` GB, if no tensor alone is larger.

    Raises: ValueError when there is no whole checkpoint, when it is not one of this model, or when `out` holds
    something: what it is cannot be told from outside, and it may be the only copy of a model.
    """
    checkpoint = _find(path)
    mark = read_mark(checkpoint)
    source = model or _model_of(checkpoint)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"--out {out} already holds something; name another folder, or remove it first")
    config = hf.read_config(source)
    check_model(checkpoint, mark.model, config, source)
    with torch.device("meta"):
        described = Decoder(config).state_dict()
    reader = _Reader(checkpoint)
    with readable(checkpoint):
        stored = reader.read_metadata().state_dict_metadata

    def read(name: str) -> Tensor:
        whole = torch.empty(described[name].shape, dtype=stored[f"model.{name}"].properties.dtype)
        with warnings.catch_warnings(), readable(checkpoint):
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as asked for
            dcp.load({"model": {name: whole}}, storage_reader=reader, no_dist=True)
        return whole

    hf_write.write_folder(config, described, read, source, out, dtype=dtype, file_bytes=int(file_gb * GB))
    return checkpoint


class _Reader(dcp.FileSystemReader):
    """Reads the index of a checkpoint once, not once a tensor."""

    @cache  # noqa: B019 (there is one reader)
    def read_metadata(self) -> Metadata:
        return super().read_metadata()


def _find(path: Path) -> Path:
    found = whole_checkpoints(path)
    return found[-1] if found else path  # whether that is a whole checkpoint is read_mark's to say


def _model_of(checkpoint: Path) -> Path:
    record = checkpoint.resolve().parent.parent / RUN_NAME
    try:
        run = json.loads(record.read_bytes())
        folder = Path(run["folder"], run["flags"]["model"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"{record} does not tell which model was trained; name its folder (config.json, tokenizer) by --model"
        ) from None
    if not folder.is_dir():
        raise ValueError(f"{folder}, the model of that run, is not there any more; name its folder by --model")
    return folder


def main(argv: list[str]) -> int:
    """Exit code of the command line."""
    parser = argparse.ArgumentParser(
        prog="train/export.py", description="Write the weights of a checkpoint as a Hugging Face folder."
    )
    parser.add_argument("path", type=Path, metavar="RUN", help="a run's folder (its last checkpoint), or a checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, new or empty")
    parser.add_argument("--model", type=Path, help="folder with config.json and tokenizer (default: the run's --model)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as in the checkpoint")
    parser.add_argument("--file-gb", type=float, default=5.0, help="largest file; several get an index (default: 5)")
    given = parser.parse_args(argv)
    dtype = getattr(torch, given.dtype) if given.dtype else None
    try:
        if not 0 < given.file_gb < math.inf:
            raise ValueError(f"--file-gb must be a number greater than 0, not {given.file_gb}")
        checkpoint = export(given.path, given.out, model=given.model, dtype=dtype, file_gb=given.file_gb)
    except (ValueError, OSError) as error:
        reason = f"{error.filename}: {error.strerror}" if getattr(error, "filename", None) else error
        print(f"export: error: {reason}", file=sys.stderr)
        return 1
    print(f"exported {checkpoint} to {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
