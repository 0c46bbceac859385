"""Lengths of documents for planning: exact where they are known, from a sample of raw input else."""

import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from formats.dataset import PackedDataset
from prep.encode.cuts import cut_units
from prep.encode.options import EncodeOptions
from prep.encode.run import encode
from prep.encode.sources import SourceSpec, as_sources, find_inputs, without_tokenizer
from prep.encode.store import DocumentStore
from prep.inspect.documents import read_slots
from prep.inspect.facts import packed_folders
from prep.inspect.subject import is_packed, is_store, place_of

UNIT_BYTES = 64 << 10
"""Input of a sampled unit: small, so that a sample comes from many places …"""
MOST_UNITS = 200_000
"""… but a large input is not cut into more units than this."""
LEAST_UNITS = 4
"""Places of which a sample has at least so many, also where each is a whole file (compressed, CSV): fewer say nothing
of its error."""
SAMPLE_BYTES = 8 << 20
Z_95 = 1.96


class Lengths(NamedTuple):
    """`lengths` int32[N]; the whole has `scale` times as many documents. `error`, `error_documents`: half the width of
    the 95 % interval of its tokens and of its documents, relative; 0 where everything was read. `origin` says where
    they come from."""

    lengths: np.ndarray
    scale: float
    error: float
    error_documents: float
    origin: str


def read_lengths(
    inputs: Sequence[str | SourceSpec], options: EncodeOptions | None, sample_bytes: int = SAMPLE_BYTES
) -> Lengths:
    """Lengths of a packed folder (its training set), a document store, or raw files (encoded with `options`).

    Raw input is sampled: every k-th unit of `UNIT_BYTES` is encoded, and the number of tokens per byte is carried over
    to the rest; the error follows from how much it differs between units.
    """
    if is_packed(inputs):
        folder = packed_folders(Path(place_of(inputs[0])))[0]
        _, lengths = read_slots(PackedDataset(folder)).documents()
        return Lengths(lengths.astype(np.int32), 1.0, 0.0, 0.0, f"the documents packed in {folder}")
    if is_store(inputs):
        store = place_of(inputs[0])
        return Lengths(DocumentStore.open(store).lengths, 1.0, 0.0, 0.0, f"all documents of {store}")
    sources = as_sources(inputs)
    if options is None:
        raise without_tokenizer(sources)
    files, _ = find_inputs(sources)
    unit_bytes = max(UNIT_BYTES, sum(file.bytes for file in files) // MOST_UNITS)
    units = cut_units(files, sources, unit_bytes)
    sizes = np.array([unit.bytes for unit in units], np.int64)
    every = min(math.ceil(sizes.sum() / sample_bytes), len(units) // LEAST_UNITS)
    with tempfile.TemporaryDirectory(prefix="prep-") as folder:
        store = Path(folder) / "store"
        if every <= 1:
            lengths = np.array(encode(sources, store, options).lengths)
            return Lengths(lengths, 1.0, 0.0, 0.0, "all documents of the input")
        encode(sources, store, replace(options, unit_bytes=unit_bytes), unit_range=(1, every))
        read = _read_units(store)
    chosen = sizes[::every]
    tokens = np.array([lengths.sum(dtype=np.int64) for lengths in read], np.float64)
    documents = np.array([len(lengths) for lengths in read], np.float64)
    errors = (_error(values, chosen, len(units)) for values in (tokens, documents))
    origin = f"a sample: {chosen.sum() / sizes.sum():.1%} of the input, {len(tokens)} places"
    return Lengths(np.concatenate(read), float(sizes.sum() / chosen.sum()), *errors, origin)


def _error(values: np.ndarray, sizes: np.ndarray, units: int) -> float:
    """Relative half-width of the 95 % interval of a total estimated as Σ values / Σ sizes from a sample of `units`: the
    ratio estimator (Cochran, Sampling Techniques, chapter 6)."""
    rate, n = values.sum() / sizes.sum(), len(values)
    spread = math.sqrt(((values - rate * sizes) ** 2).sum() / max(1, n - 1) / n)
    return Z_95 * spread / sizes.mean() / rate * math.sqrt(1 - n / units)


def _read_units(store: Path) -> list[np.ndarray]:
    """Lengths of the documents of every unit that was encoded, in the order of the units."""
    found = []
    for path in sorted((store / "units").glob("*.json"), key=lambda path: int(path.stem)):  # 100000 after 99999
        if not json.loads(path.read_bytes())["rows"]:
            found.append(np.empty(0, np.int32))
            continue
        with pa.memory_map(str(path.with_suffix(".arrow"))) as file:
            column = pa.ipc.open_file(file).read_all()["input_ids"]
            found.append(np.concatenate([np.diff(c.offsets.to_numpy()) for c in column.chunks]).astype(np.int32))
    return found
