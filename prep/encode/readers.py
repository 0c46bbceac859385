"""The records of a work unit, one after the other, in memory that does not grow with the unit.

A reader yields (position, record). The record is bytes of JSON, or what the format gives: a dict or a text. The
position says where it stands; `locate` turns it into words for a message.
"""

import codecs
import csv
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from prep.encode import files
from prep.encode.arrays import array_elements
from prep.encode.sources import SourceSpec, Unit

_BLOCK = 1 << 20
_ROWS = 256  # rows of a columnar batch that are Python objects at a time
_BOM = codecs.BOM_UTF8
_MAX_RECORD = 1 << 30


def read_unit(unit: Unit, spec: SourceSpec) -> Iterator[tuple[int, object]]:
    """The records of a unit.

    Raises:
        ValueError: the file itself is damaged; the message names it. (A bad record is the caller's to find.)
        OSError: the file cannot be read.
    """
    if unit.format == "hf":
        from prep.encode.hub import read_hub  # imports `datasets`

        return read_hub(unit.path, unit.first_row)
    if unit.format == "jsonl":
        return _lines(unit)
    if unit.format == "json":
        return _json_array(unit)
    if unit.format in ("csv", "tsv"):
        return _csv(unit)
    if unit.format == "text":
        return _text(unit, spec.text_by)
    return _columnar(unit)


def locate(unit: Unit, position: int) -> str:
    """`file, line 12` of a position; reads the file up to there where it must, so only for messages."""
    if unit.format in ("jsonl", "text") and unit.stop:
        return f"{unit.path}, line {_line_number(unit.path, position)}"
    word = "line" if unit.format in ("jsonl", "text") else "row"
    return f"{unit.path}, {word} {position + 1}"


def _lines(unit: Unit) -> Iterator[tuple[int, bytes]]:
    """Positions are byte offsets in a plain file, line numbers (from 0) in a compressed one."""
    if unit.stop == 0:
        number = 0
        with files.open_decompressed(unit.path) as file:
            while line := file.readline():
                yield number, _clean(line, number == 0)
                number += 1
        return
    with files.open_binary(unit.path) as file:
        position = unit.start
        if position > 0:
            file.seek(position - 1)
            # The line that reaches into this range began in an earlier one.
            position += _skip_line(file) - 1
        while position < unit.stop:
            line = file.readline()
            if not line:
                return
            yield position, _clean(line, position == 0)
            position += len(line)


def _clean(line: bytes, first: bool) -> bytes:
    if first and line.startswith(_BOM):
        line = line[len(_BOM) :]
    return line.rstrip(b"\r\n")


def _skip_line(file) -> int:
    skipped = 0
    while block := file.readline(_BLOCK):
        skipped += len(block)
        if block.endswith(b"\n"):
            break
    return skipped


def _line_number(path: str, offset: int) -> int:
    lines, left = 1, offset
    with files.open_binary(path) as file:
        while left and (block := file.read(min(_BLOCK, left))):
            lines += block.count(b"\n")
            left -= len(block)
    return lines


def _text(unit: Unit, by: str) -> Iterator[tuple[int, object]]:
    if by == "line":
        for position, line in _lines(unit):
            yield position, {"text": _decode(line)}
        return
    with files.open_decompressed(unit.path) as file:
        if by == "document":
            yield 0, {"text": _decode(_clean_bom(file.read()))}
            return
        lines: list[bytes] = []
        number = begin = 0
        while line := file.readline():
            line = _clean_bom(line) if number == 0 else line
            if line.strip():
                begin = number if not lines else begin
                lines.append(line)
            elif lines:
                yield begin, {"text": _decode(b"".join(lines).rstrip(b"\r\n"))}
                lines = []
            number += 1
        if lines:
            yield begin, {"text": _decode(b"".join(lines).rstrip(b"\r\n"))}


def _clean_bom(data: bytes) -> bytes:
    return data[len(_BOM) :] if data.startswith(_BOM) else data


def _decode(data: bytes) -> str | bytes:
    """Text; the bytes themselves where they are no UTF-8, for the caller to report with their place."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def _json_array(unit: Unit) -> Iterator[tuple[int, bytes]]:
    with files.open_decompressed(unit.path) as file:
        yield from enumerate(array_elements(file, unit.path))


def _csv(unit: Unit) -> Iterator[tuple[int, object]]:
    csv.field_size_limit(_MAX_RECORD)
    delimiter = "\t" if unit.format == "tsv" else ","
    with files.open_decompressed(unit.path) as file:
        rows = csv.reader(_text_lines(file, unit.path), delimiter=delimiter, strict=True)
        try:
            header = next(rows, [])
            for number, row in enumerate(rows):
                if len(row) != len(header):
                    if not row:
                        continue
                    raise ValueError(
                        f"{unit.path}, row {number + 1}: {len(row)} fields where the header has {len(header)}"
                    )
                yield number, dict(zip(header, row, strict=True))
        except csv.Error as error:
            raise ValueError(f"{unit.path}, line {rows.line_num}: not readable as {unit.format} ({error})") from None


def _text_lines(file, path: str) -> Iterator[str]:
    number = 0
    while line := file.readline():
        number += 1
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}, line {number}: not UTF-8 ({error.reason})") from None


def _columnar(unit: Unit) -> Iterator[tuple[int, object]]:
    row = unit.first_row
    try:
        for batch in _batches(unit):
            for start in range(0, batch.num_rows, _ROWS):
                for record in batch.slice(start, _ROWS).to_pylist():
                    yield row, record
                    row += 1
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(f"{unit.path}, row {row + 1}: not readable as {unit.format} ({error})") from None


def _batches(unit: Unit) -> Iterator[pa.RecordBatch]:
    if unit.format == "parquet":
        with files.open_binary(unit.path) as file:
            reader = pq.ParquetFile(file)
            yield from reader.iter_batches(_ROWS, row_groups=range(unit.start, unit.stop))
        return
    with files.open_binary(unit.path) as file:
        if unit.stop:
            reader = pa.ipc.open_file(pa.memory_map(unit.path))
            for index in range(unit.start, unit.stop):
                yield reader.get_batch(index)
            return
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        if is_file:
            reader = pa.ipc.open_file(file)
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            yield from pa.ipc.open_stream(file)
