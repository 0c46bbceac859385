"""Hugging Face datasets by name or local path, through the `datasets` package: `hf:name[:config]#split`."""

import os
from collections.abc import Iterator
from typing import NamedTuple

import xxhash

from prep.encode import files
from prep.encode.readers import without_nulls

_SAVED = ("state.json", "dataset_dict.json")
"""One of these lies in what `save_to_disk` wrote; `prep.encode.sources` reads it."""


class HubName(NamedTuple):
    """`hf:name[:config]#split`, taken apart."""

    name: str
    config: str | None
    split: str


def parse(path: str) -> HubName:
    """Take an address apart; the split is `train` when none is named."""
    body, _, split = path.removeprefix("hf:").partition("#")
    name, _, config = body.partition(":")
    if not name:
        raise ValueError(f"{path}: expected hf:name[:config]#split")
    return HubName(name, config or None, split or "train")


def _builder(path: str):
    """The `datasets` builder of an address."""
    try:
        import datasets  # a second to import, and only these sources need it
    except ImportError:
        raise ValueError(f"{path}: needs the package datasets; pip install datasets") from None
    name = parse(path)
    if any(os.path.isfile(os.path.join(name.name, saved)) for saved in _SAVED):
        raise ValueError(f"{path}: was written by save_to_disk, not for the hub; name the folder itself, without hf:")
    try:
        return datasets.load_dataset_builder(name.name, name.config)
    except Exception as error:  # anything may come out of there, and none of it is a bug of ours
        raise ValueError(f"{path}: datasets cannot open it ({error})") from None


def describe(path: str) -> tuple[int, str]:
    """(bytes, hash) of a split: of the files that make it up, whose rows are not read.

    A file of this machine is hashed; those of the hub are named by their addresses and revision, which stand for their
    bytes.
    """
    files_of_split, told = _files(path)
    digest, size = xxhash.xxh3_128(), 0
    for file in files_of_split:
        size += files.file_size(file)
        digest.update((repr((file, told)) if files.is_remote(file) else files.file_facts(file)[1]).encode())
    return size, digest.hexdigest()


def stamp(path: str) -> tuple:
    """As `files.file_stamp`: of all files of a split."""
    files_of_split, told = _files(path)
    return tuple((file, told) if files.is_remote(file) else files.file_stamp(file) for file in files_of_split)


def _files(path: str) -> tuple[list[str], str]:
    """The files and addresses that make a split up, and what the hub tells of all that `datasets` looked at: of those
    that are no data too, so the two are no pairs."""
    builder, split = _builder(path), parse(path).split
    if (splits := builder.config.data_files) is not None:
        known, told = {name: list(found) for name, found in splits.items()}, splits
    else:
        known, told = _cached_files(builder), {}
    if split not in known:
        names = ", ".join(map(str, known)) or "none that is made of files"
        raise ValueError(f"{path}: no split {split!r}; name one as hf:NAME#SPLIT, of {names}")
    return known[split], repr(told[split].origin_metadata) if told else ""


def _cached_files(builder) -> dict[str, list[str]]:
    """The Arrow files of every split that `datasets` keeps of a dataset of the hub: what it gives where the hub cannot
    be reached."""
    from datasets.naming import filenames_for_dataset_split  # as in `_builder`

    return {
        split.name: filenames_for_dataset_split(
            builder.cache_dir,
            dataset_name=builder.dataset_name,
            split=split.name,
            filetype_suffix="arrow",
            shard_lengths=split.shard_lengths,
        )
        for split in (builder.info.splits or {}).values()
    }


def read_hub(path: str, first_row: int) -> Iterator[tuple[int, object]]:
    """(row, record) of the whole split, streamed."""
    builder, row = _builder(path), first_row
    try:
        for record in builder.as_streaming_dataset(split=parse(path).split):
            yield row, {name: without_nulls(value) for name, value in record.items()}
            row += 1
    except Exception as error:
        raise ValueError(f"{path}, row {row + 1}: datasets cannot read it ({error})") from None
