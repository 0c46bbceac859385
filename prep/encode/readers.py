"""The records of a work unit, one after the other, in memory that does not grow with the unit.

A reader yields (position, record). The record is bytes of JSON, what the format gives (a dict), or `Unreadable`. The
position says where it stands; `locate` turns it into words for a message.
"""

import codecs
import csv
import os
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from prep.encode import files
from prep.encode.arrays import array_elements
from prep.encode.sources import SourceSpec, Unit

_BLOCK = 1 << 20
_ROWS, _ROWS_BYTES = 256, 4 << 20  # of a columnar batch that are Python objects at a time, unless one row is larger
_BOM = codecs.BOM_UTF8
_LINE_ENDS = b"\r\n"
_MAX_RECORD = 1 << 30
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"  # Arrow's "Encapsulated message format": continuation, length 0
_BINARY = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}


class Unreadable(NamedTuple):
    """A record that could not be read, between others that can: why, and what stands there as far as it is known."""

    reason: str
    content: str


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
                yield number, line.rstrip(_LINE_ENDS) if number else _clean_bom(line.rstrip(_LINE_ENDS))
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
            # There may be thousands a megabyte: nothing is called that need not be.
            yield position, line.rstrip(_LINE_ENDS) if position else _clean_bom(line.rstrip(_LINE_ENDS))
            position += len(line)


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
        lines = _CsvLines(file)
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
        header = _header(rows, lines, unit)
        number = -1
        while True:
            lines.begin_row()
            number += 1
            try:
                row = next(rows, None)
            except csv.Error as error:
                if lines.ended and len(lines.row) > 1:
                    raise ValueError(
                        f"{unit.path}, row {number + 1}: not readable as {unit.format}: a quote that opens there is "
                        f"never closed, and {len(lines.row) - 1} more lines follow"
                    ) from None
                reason = f"not readable as {unit.format} ({error})"
            else:
                if row is None:
                    return
                if not row:  # a blank line
                    continue
                if len(row) == len(header) and lines.are_utf8:
                    yield number, dict(zip(header, row, strict=True))
                    continue
                reason = f"{len(row)} fields where the header has {len(header)}"
            content = "".join(lines.row).rstrip("\r\n")
            yield number, Unreadable(reason if lines.are_utf8 else "it is not UTF-8", content)


def _header(rows, lines: "_CsvLines", unit: Unit) -> list[str]:
    try:
        header = next((row for row in rows if row), [])
    except csv.Error as error:
        raise ValueError(f"{unit.path}: the header is not readable as {unit.format} ({error})") from None
    if not lines.are_utf8:
        raise ValueError(f"{unit.path}: the header is not UTF-8")
    _check_names(header, unit)
    return header


def _check_names(names: list[str], unit: Unit) -> None:
    """ValueError for two columns of one name: a record would have the last, and nobody would know."""
    if len(set(names)) == len(names):
        return
    for name in names:
        if name and names.count(name) > 1:  # several without a name are what spreadsheets leave behind
            raise ValueError(f"{unit.path}: two columns are called {name!r}; rename one")


class _CsvLines:
    """The lines of a file as text; those of the row that is being read are kept until the next begins."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._first = True
        self.ended = False
        self.begin_row()

    def begin_row(self) -> None:
        self.are_utf8 = True
        self._row: list[bytes] = []

    @property
    def row(self) -> list[str]:
        """The lines of the row for the eye: a byte that is no UTF-8 is written \\xNN."""
        return [line.decode(errors="backslashreplace") for line in self._row]

    def __iter__(self) -> Iterator[str]:
        while line := self._file.readline():
            line = _clean_bom(line) if self._first else line
            self._first = False
            self._row.append(line)
            try:
                yield line.decode()
            except UnicodeDecodeError:
                self.are_utf8 = False
                yield line.decode(errors="replace")
        self.ended = True


def _columnar(unit: Unit) -> Iterator[tuple[int, object]]:
    row = unit.first_row
    try:
        for batch in _batches(unit):
            _check_names(batch.schema.names, unit)
            rows = _rows_at_once(batch.nbytes / max(1, batch.num_rows))
            for start in range(0, batch.num_rows, rows):
                for record in _records(batch.slice(start, rows)):
                    yield row, record
                    row += 1
    except (pa.ArrowException, OSError) as error:
        # Arrow says OSError of damaged pages; those of the system have a number, those of an address name it.
        if isinstance(error, files.AddressError) or getattr(error, "errno", None) is not None:
            raise
        # It reads ahead, to the end of the unit at most.
        raise ValueError(f"{unit.path}, row {row + 1} or soon after: not readable as {unit.format} ({error})") from None


def _rows_at_once(row_bytes: float) -> int:
    return int(max(1, min(_ROWS, _ROWS_BYTES / max(1, row_bytes))))


def _records(batch: pa.RecordBatch) -> list[object]:
    try:
        records = batch.to_pylist()
    except (ValueError, OverflowError):  # a text that is no UTF-8, a date that Python has not: in one of the rows
        return [_record(batch.slice(row, 1)) for row in range(batch.num_rows)]
    for name in (name for name, column in zip(batch.schema.names, batch.columns, strict=True) if _lacks_keys(column)):
        for record in records:
            record[name] = without_nulls(record[name])
    return records


def _lacks_keys(column: pa.Array) -> bool:
    """Whether a struct in a column has a null."""
    if pa.types.is_struct(column.type):
        return any(field.null_count or _lacks_keys(field) for field in column.flatten())
    return (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)) and _lacks_keys(column.flatten())


def without_nulls(value: object) -> object:
    """A value from a column without the keys of its objects that are null: there each has all keys that any row has, so
    that a tool call would be given the arguments of all others."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _record(row: pa.RecordBatch) -> object:
    record, bad = {}, {}
    for name, column in zip(row.schema.names, row.columns, strict=True):
        try:
            record[name] = without_nulls(column[0].as_py())
        except (ValueError, OverflowError) as error:
            bad[name] = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
            is_text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
            record[name] = column.view(_BINARY[column.type])[0].as_py() if is_text else f"a value of {column.type}"
    if not bad:
        return record
    return Unreadable("; ".join(f"column {name}: {reason}" for name, reason in bad.items()), repr(record))


def _batches(unit: Unit) -> Iterator[pa.RecordBatch]:
    if unit.format == "parquet":
        with files.open_binary(unit.path) as file:
            reader = pq.ParquetFile(file)
            groups = [reader.metadata.row_group(g) for g in range(unit.start, unit.stop)]
            row_bytes = max(group.total_byte_size / max(1, group.num_rows) for group in groups)
            yield from reader.iter_batches(_rows_at_once(row_bytes), row_groups=range(unit.start, unit.stop))
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
            file.seek(-len(_END_OF_STREAM), os.SEEK_END)
            if file.read() != _END_OF_STREAM:
                raise ValueError(f"{unit.path}: the Arrow stream is cut off: the mark of its end is missing")
