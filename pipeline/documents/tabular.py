"""Reads Parquet, Arrow and CSV; each row is a record.

Strings are read as bytes, so that one invalid character costs one document and not the whole file. Rows are taken by
their decoded size: a file of a few kilobytes can hold gigabytes, if many rows refer to one entry of a dictionary.
"""

import csv
import io
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from softlabel.pipeline.documents.paths import File
from softlabel.pipeline.documents.reading import (
    PIECE_BYTES,
    PIECE_ROWS,
    RECORD_BYTES,
    Piece,
    Record,
    pieces,
    reading,
    stream,
)
from softlabel.storage.errors import DocumentsError, printable

_ROWS = 256
"""Most rows of a Parquet file that are decoded at once."""
_DECODED_BYTES = 4 * PIECE_BYTES
"""Most bytes that they can decode to, if each of them holds the largest value that a dictionary may have."""
_DELIMITERS = {".csv": ",", ".tsv": "\t"}


class Parquet:
    """Parquet files."""

    kind = "Parquet"

    def __init__(self, files: list[File]) -> None:
        self._files = files

    def schema(self) -> pa.Schema:
        """Columns of the first file."""
        with reading(self._files[0], self.kind):
            return pq.read_schema(self._files[0].open())

    def read(self, columns: list[str]) -> Iterator[Piece]:
        """The rows of all files, file by file."""
        for file in self._files:
            with reading(file, self.kind), file.open() as content, pq.ParquetFile(content) as rows:
                _require_each_once(columns, rows.schema_arrow.names, file)
                yield from _pieces_of(_parquet_batches(content, rows, columns), file, columns)


class Arrow:
    """Arrow files, as ``datasets`` saves them, in either of Arrow's two formats."""

    kind = "Arrow"

    def __init__(self, files: list[File]) -> None:
        self._files = files

    def schema(self) -> pa.Schema:
        """Columns of the first file."""
        with reading(self._files[0], self.kind), self._files[0].mapped() as content:
            return _arrow_batches(content)[0]

    def read(self, columns: list[str]) -> Iterator[Piece]:
        """The rows of all files, file by file."""
        for file in self._files:
            with reading(file, self.kind), file.mapped() as content:
                schema, batches = _arrow_batches(content)
                _require_each_once(columns, schema.names, file)
                yield from _pieces_of((_validated(batch.select(columns)) for batch in batches), file, columns)


class Csv:
    """CSV files with a line of column names, separated by commas or, in .tsv, by tabs; every value is a string.

    An empty value is null. A value in quotes may contain line ends, and a quote if it is doubled.
    """

    kind = "CSV"

    def __init__(self, files: list[File]) -> None:
        self._files = files

    def schema(self) -> pa.Schema:
        """Columns of the first file."""
        with reading(self._files[0], self.kind), stream(self._files[0]) as content:
            names = next(_csv_rows(content, self._files[0]), [])
            if any(name.encode(errors="ignore").decode() != name for name in names):
                raise ValueError("the line of column names is not UTF-8")
        return pa.schema([(name, pa.string()) for name in names])

    def read(self, columns: list[str]) -> Iterator[Piece]:
        """The rows of all files, file by file."""
        return pieces(self._records(columns), columns)

    def _records(self, columns: list[str]) -> Iterator[Record]:
        for file in self._files:
            with reading(file, self.kind), stream(file) as content:
                rows = _csv_rows(content, file)
                names = next(rows, [])
                _require_each_once(columns, names, file)
                for number, row in enumerate(rows, 1):
                    place, size = f"{file.name}:{number}", sum(map(len, row))
                    values: dict[str, Any] | str = {n: value or None for n, value in zip(names, row, strict=False)}
                    if len(row) != len(names):
                        values = f"the row has {len(row)} values for {len(names)} columns"
                    yield Record(place, size, values)


def _csv_rows(content: pa.NativeFile, file: File) -> Iterator[list[str]]:
    """The rows that are not empty; invalid UTF-8 becomes half of a surrogate pair, which no document may contain."""
    csv.field_size_limit(RECORD_BYTES)
    delimiter = _DELIMITERS.get(file.format, ",")
    text = io.TextIOWrapper(io.BufferedReader(content), "utf-8-sig", "surrogateescape", newline="")
    rows = csv.reader(text, delimiter=delimiter, strict=True)
    try:
        yield from filter(None, rows)
    except csv.Error as error:
        raise ValueError(f"line {rows.line_num}: {error}") from None


def _parquet_batches(content: pa.NativeFile, rows: pq.ParquetFile, columns: list[str]) -> Iterator[pa.RecordBatch]:
    for number in range(rows.num_row_groups):
        count = _rows_at_once(content, rows.metadata.row_group(number), columns)
        yield from rows.iter_batches(count, row_groups=[number], columns=columns)


def _rows_at_once(content: pa.NativeFile, group: pq.RowGroupMetaData, columns: list[str]) -> int:
    """How many rows of a row group can be decoded at once.

    A plain value is in the file as it is. But a value of a dictionary is there only once, and a delta-encoded value
    only where it differs from the one before: each may be repeated in every row.
    """
    plain, repeated = 0, 0.0
    for chunk in map(group.column, range(group.num_columns)):
        if any(chunk.path_in_schema == name or chunk.path_in_schema.startswith(f"{name}.") for name in columns):
            plain += chunk.total_uncompressed_size
            repeated += _largest_repeated(content, chunk) * max(1, chunk.num_values / max(1, group.num_rows))
    by_size = PIECE_BYTES * group.num_rows // max(1, plain)
    return int(min(_ROWS, max(1, by_size), max(1, _DECODED_BYTES // max(1, repeated))))


def _largest_repeated(content: pa.NativeFile, chunk: pq.ColumnChunkMetaData) -> int:
    """A size in bytes that no value of the chunk exceeds that may be repeated without being in the file again."""
    size: int = chunk.total_uncompressed_size
    if any("DELTA_BYTE_ARRAY" in encoding for encoding in chunk.encodings):
        return size
    if not any("DICTIONARY" in encoding for encoding in chunk.encodings):
        return 0
    if size * chunk.num_values <= _DECODED_BYTES:
        return size
    # A page's header, in Thrift's compact form, starts with two integers: the kind (2: dictionary), and the size.
    content.seek(chunk.dictionary_page_offset or chunk.data_page_offset)
    header = iter(content.read(16))
    kind, decoded = (_integer(header) for _ in range(2))
    return min(size, decoded) if kind == 2 else size


def _integer(header: Iterator[int]) -> int:
    """The next field of a Thrift header: its type, then a zigzag-encoded integer, seven bits a byte."""
    next(header, 0)
    value = shift = 0
    for byte in header:
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            break
    return value >> 1


def _arrow_batches(content: pa.NativeFile) -> tuple[pa.Schema, Iterable[pa.RecordBatch]]:
    is_file = content.read(6) == b"ARROW1"
    content.seek(0)
    if not is_file:
        reader = pa.ipc.open_stream(content)
        return reader.schema, reader
    file = pa.ipc.open_file(content)
    return file.schema, map(file.get_batch, range(file.num_record_batches))


def _validated(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch, if its values can be read: Arrow trusts the offsets in a file, and would read beyond its end."""
    for column in batch.columns:
        column.view(_with_bytes(column.type)).validate(full=True)
    return batch


def _with_bytes(kind: pa.DataType) -> pa.DataType:
    """The same type with bytes instead of strings, which need not be valid UTF-8."""
    if pa.types.is_string(kind):
        return pa.binary()
    if pa.types.is_large_string(kind):
        return pa.large_binary()
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_with_bytes(field.type)) for field in kind])
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_with_bytes(kind.value_type)))
    if pa.types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_with_bytes(kind.value_type)))
    return kind


def _pieces_of(batches: Iterable[pa.RecordBatch], file: File, columns: list[str]) -> Iterator[Piece]:
    """The rows of a file, gathered into pieces by their decoded size."""
    piece, held, number = _empty(columns), 0.0, 1
    for batch in batches:
        ends = np.cumsum(_row_bytes(batch))
        start = 0
        while start < len(batch):
            before = ends[start - 1] if start else 0.0
            fitting = int(np.searchsorted(ends, before + PIECE_BYTES - held, side="right"))
            stop = min(max(fitting, start + 1), start + PIECE_ROWS - len(piece.places))
            part = batch.slice(start, stop - start)
            piece.places.extend(f"{file.name}:{number + i}" for i in range(len(part)))
            for name in columns:
                piece.values[name].extend(_values(part.column(name)))
            held += ends[stop - 1] - before
            start, number = stop, number + len(part)
            if start < len(batch) or len(piece.places) == PIECE_ROWS or held >= PIECE_BYTES:
                yield piece
                piece, held = _empty(columns), 0.0
    yield piece


def _empty(columns: list[str]) -> Piece:
    return Piece.empty(columns)._replace(padded=True)


def _row_bytes(batch: pa.RecordBatch) -> NDArray[np.float64]:
    """(R,) decoded size of each row."""
    return sum(map(_value_bytes, batch.columns), start=np.zeros(len(batch)))


def _value_bytes(column: pa.Array) -> NDArray[np.float64]:
    """(R,) decoded size of each value; of other types than strings and what contains them, the mean."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        return _floats(pa.array(_value_bytes(column.dictionary)).take(column.indices))
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind):
        return _floats(pc.binary_length(column))
    if pa.types.is_struct(kind):
        return sum(map(_value_bytes, column.flatten()), start=np.zeros(len(column)))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        ends = np.concatenate([[0.0], np.cumsum(_value_bytes(column.values))])
        return np.diff(ends[column.offsets.to_numpy()])
    return np.full(len(column), column.nbytes / max(1, len(column)))


def _floats(sizes: pa.Array) -> NDArray[np.float64]:
    floats: NDArray[np.float64] = sizes.fill_null(0).to_numpy(zero_copy_only=False).astype(np.float64)
    return floats


def _require_each_once(columns: list[str], found: list[str], file: File) -> None:
    for name in columns:
        if (times := found.count(name)) != 1:
            raise DocumentsError(
                f"a file has {times or 'no'} column{'s' * (times > 1)} named {name!r}",
                expected=f"exactly one column named {name!r} in every file",
                found=printable(", ".join(islice(found, 40))) or "no columns",
                where=printable(file.address),
                do="rename the file's columns, exclude the file with a glob, or set columns.* to other columns",
            )


def _values(column: pa.Array) -> list[Any]:
    """Python values; strings as bytes, not decoded, and timestamps in microseconds."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        return _values(column.dictionary_decode())
    if pa.types.is_timestamp(kind):
        return _timestamps(column)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        column = pc.cast(column, pa.large_binary())
    try:
        values: list[Any] = column.to_pylist()
    except (ValueError, OverflowError):  # an invalid string in a list, or no date: only its own row is lost
        values = [_value(item) for item in column]
    return values


def _timestamps(column: pa.Array) -> list[Any]:
    """Timestamps as tables store them; as a number, which no table takes, if they are finer than a microsecond."""
    rounded = column.cast(pa.timestamp("us", column.type.tz and "UTC"), safe=False)
    exact = pc.equal(rounded.cast(column.type, safe=False), column).to_pylist()
    numbers = column.cast(pa.int64()).to_pylist()
    return [_value(rounded[i]) if exact[i] is not False else numbers[i] for i in range(len(column))]


def _value(item: pa.Scalar) -> Any:
    try:
        return item.as_py()
    except (ValueError, OverflowError):
        return b"\xff"  # invalid UTF-8, so that this record is rejected
