"""Files → work units.

A unit is a part of one file: a range of bytes of line-based text (a line belongs to the unit its first byte lies in),
a range of row groups of Parquet or record batches of Arrow, or a whole file where it cannot be entered in the middle
(compressed, a JSON array, CSV with its quoted newlines). The cut depends on the files and `unit_bytes` alone, so it is
the same for any number of workers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from formats.schema import METADATA_KEY
from prep.encode import files
from prep.encode.sources import InputFile, SourceSpec, Unit


@dataclass(frozen=True)
class _Cut:
    start: int
    stop: int
    bytes: int
    first_row: int = 0


def cut_units(inputs: Sequence[InputFile], specs: Sequence[SourceSpec], unit_bytes: int) -> list[Unit]:
    """Work units of all files, in order.

    Raises:
        ValueError: a file whose structure cannot be read.
    """
    units: list[Unit] = []
    for file in inputs:
        cut = _cutter(file, specs[file.source])
        for part in cut(file, unit_bytes):
            units.append(
                Unit(
                    len(units),
                    file.source,
                    file.path,
                    file.name,
                    file.format,
                    part.start,
                    part.stop,
                    part.bytes,
                    part.first_row,
                    file.stamp,
                )
            )
    return units


def _cutter(file: InputFile, spec: SourceSpec) -> Callable[[InputFile, int], list[_Cut]]:
    if file.format == "hf":
        return _whole
    if files.bare(file.path).lower().endswith(files.COMPRESSIONS):
        return _whole
    if file.format == "jsonl" or (file.format == "text" and spec.text_by == "line"):
        return _by_bytes if files.is_seekable(file.path) else _whole
    return {"parquet": _by_row_groups, "arrow": _by_batches}.get(file.format, _whole)


def _whole(file: InputFile, unit_bytes: int) -> list[_Cut]:
    return [_Cut(0, 0, file.bytes)]


def _by_bytes(file: InputFile, unit_bytes: int) -> list[_Cut]:
    return [
        _Cut(start, min(start + unit_bytes, file.bytes), min(unit_bytes, file.bytes - start))
        for start in range(0, file.bytes, unit_bytes)
    ]


def _by_row_groups(file: InputFile, unit_bytes: int) -> list[_Cut]:
    try:
        with files.open_binary(file.path) as stream:
            metadata = pq.ParquetFile(stream).metadata
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file.path}: not readable as Parquet ({error})") from None
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    return _gather([(g.total_byte_size, g.num_rows) for g in groups], unit_bytes)


def _by_batches(file: InputFile, unit_bytes: int) -> list[_Cut]:
    """Arrow IPC files by record batches; a stream (what `datasets` writes) is read as a whole."""
    try:
        with files.open_binary(file.path) as stream:
            if stream.read(6) != b"ARROW1":
                return _whole(file, unit_bytes)
        if files.is_remote(file.path):
            return _whole(file, unit_bytes)
        with pa.memory_map(file.path) as source:
            reader = pa.ipc.open_file(source)
            if METADATA_KEY in (reader.schema.metadata or {}):
                raise ValueError(
                    f"{file.path}: is a packed shard, whose rows are several documents each; name the raw files, or "
                    "pack the document store that it was made of"
                )
            batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
            return _gather([(b.nbytes, b.num_rows) for b in batches], unit_bytes)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file.path}: not readable as Arrow ({error})") from None


def _gather(parts: Sequence[tuple[int, int]], unit_bytes: int) -> list[_Cut]:
    """Consecutive parts of (bytes, rows) up to about `unit_bytes` together."""
    cuts, start, size, row, first_row = [], 0, 0, 0, 0
    for index, (nbytes, rows) in enumerate(parts):
        if size and size + nbytes > unit_bytes:
            cuts.append(_Cut(start, index, size, first_row))
            start, size, first_row = index, 0, row
        size += nbytes
        row += rows
    if start < len(parts):
        cuts.append(_Cut(start, len(parts), size, first_row))
    return cuts
