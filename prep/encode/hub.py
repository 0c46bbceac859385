"""Hugging Face datasets by name or local path, through the `datasets` package: `hf:name[:config]#split`."""

from collections.abc import Iterator
from typing import NamedTuple

import xxhash


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


def _load(path: str):
    try:
        import datasets  # a second to import, and only these sources need it
    except ImportError:
        raise ValueError(f"{path}: needs the package datasets; pip install datasets") from None
    name = parse(path)
    try:
        return datasets.load_dataset(name.name, name.config, split=name.split, streaming=True)
    except Exception as error:  # anything may come out of there, and none of it is a bug of ours
        raise ValueError(f"{path}: datasets cannot open it ({error})") from None


def describe(path: str) -> tuple[int, str]:
    """(bytes, hash) of a dataset: what `datasets` knows of its size, and a hash over its rows, read once."""
    digest, size = xxhash.xxh3_128(), 0
    for _, record in read_hub(path, 0):
        row = repr(sorted(record.items())).encode()
        digest.update(row)
        size += len(row)
    return size, digest.hexdigest()


def read_hub(path: str, first_row: int) -> Iterator[tuple[int, object]]:
    """(row, record) of the whole split, streamed."""
    yield from enumerate(_load(path), first_row)
