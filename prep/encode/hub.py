"""Hugging Face datasets by name or local path, through the `datasets` package: `hf:name[:config]#split`."""

from collections.abc import Iterator
from typing import NamedTuple

import xxhash

from prep.encode import files
from prep.encode.readers import without_nulls


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
    try:
        return datasets.load_dataset_builder(name.name, name.config)
    except Exception as error:  # anything may come out of there, and none of it is a bug of ours
        raise ValueError(f"{path}: datasets cannot open it ({error})") from None


def describe(path: str) -> tuple[int, str]:
    """(bytes, hash) of a split: of the files that make it up, whose rows are not read.

    A file of this machine is hashed; one of the hub is named by its address and revision, which stand for its bytes.
    """
    digest, size = xxhash.xxh3_128(), 0
    for file, origin in _files(path):
        size += files.file_size(file)
        digest.update((repr((file, origin)) if files.is_remote(file) else files.file_facts(file)[1]).encode())
    return size, digest.hexdigest()


def stamp(path: str) -> tuple:
    """As `files.file_stamp`: of all files of a split."""
    return tuple(
        (file, str(origin)) if files.is_remote(file) else files.file_stamp(file) for file, origin in _files(path)
    )


def _files(path: str) -> list[tuple[str, object]]:
    """(path or address, what the hub tells of it) of the files that make a split up."""
    splits, split = _builder(path).config.data_files or {}, parse(path).split
    if split not in splits:
        known = ", ".join(map(str, splits)) or "none that is made of files"
        raise ValueError(f"{path}: no split {split!r}; name one as hf:NAME#SPLIT, of {known}")
    return list(zip(splits[split], splits[split].origin_metadata, strict=True))


def read_hub(path: str, first_row: int) -> Iterator[tuple[int, object]]:
    """(row, record) of the whole split, streamed."""
    builder, row = _builder(path), first_row
    try:
        for record in builder.as_streaming_dataset(split=parse(path).split):
            yield row, {name: without_nulls(value) for name, value in record.items()}
            row += 1
    except Exception as error:
        raise ValueError(f"{path}, row {row + 1}: datasets cannot read it ({error})") from None
