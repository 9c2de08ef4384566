"""Readers for Parquet, JSON lines and plain text, a piece at a time.

The values are checked by ``documents.documents``. Parquet strings are read as bytes, so that one invalid character
costs one document and not the whole file.
"""

import io
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any, NamedTuple, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from softlabel.pipeline.documents.paths import File, bucket_errors, find_files
from softlabel.storage.errors import DocumentsError

PIECE_ROWS = 4096
PIECE_BYTES = 32 << 20
READ_AHEAD = 1 << 20
"""Bytes of a stream that are read at a time; for an object in a bucket, each read is a request."""
SAMPLE_ROWS = 1000
SAMPLE_BYTES = 16 << 20
"""Lines of JSON, or bytes of them if that is less, from which columns and their types are inferred."""
TEXT_COLUMNS = ("id", "text")
"""Columns of a plain text file: its path below the folder, and its content."""

_COMPRESSED = {".gz": "gzip", ".zst": "zstd"}


class Piece(NamedTuple):
    """Some records, in their order."""

    places: list[str]
    """Where each record is: its file and line or row."""
    values: dict[str, list[Any]]
    """The values of each column."""
    unreadable: dict[int, str]
    """By index, why a record can't be read; its values are None."""

    @classmethod
    def empty(cls, columns: list[str]) -> "Piece":
        """A piece without records."""
        return cls([], {name: [] for name in columns}, {})


class Reader(Protocol):
    """Files of one kind."""

    kind: str
    """Name of the format, for messages."""

    def __init__(self, files: list[File]) -> None: ...

    def schema(self) -> pa.Schema:
        """Columns and their types, from the first file or the first lines."""
        ...

    def read(self, columns: list[str]) -> Iterator[Piece]:
        """All records, always in the same order, ``PIECE_ROWS`` or about ``PIECE_BYTES`` at a time."""
        ...


def find(path: str) -> Reader:
    """The files that a path, folder or glob names.

    Raises:
        UsageError: if there is nothing there.
        DocumentsError: if no file is of a known kind, or the files are of several kinds.
    """
    files, is_folder = find_files(path)
    if is_folder:
        files = [file for file in files if _reader(file)] or files
    readers = {_reader(file) for file in files}
    if len(readers) != 1 or None in readers:
        raise DocumentsError(
            "documents can't be read from this path",
            expected=f"files of one kind: {', '.join(_READERS)}; all but Parquet also with {' or '.join(_COMPRESSED)}",
            found=", ".join([file.name for file in files][:10]) or "an empty folder",
            where=path,
            do="convert the files, or select files of one kind with a glob, such as 'folder/*.parquet'",
        )
    (reader,) = readers
    assert reader
    return reader(files)


class Parquet:
    """Parquet files; each row is a record."""

    kind = "Parquet"

    def __init__(self, files: list[File]) -> None:
        self._files = files

    def schema(self) -> pa.Schema:
        """Columns of the first file."""
        with _reading(self._files[0]):
            return pq.read_schema(self._files[0].open())

    def read(self, columns: list[str]) -> Iterator[Piece]:
        """The rows of all files, file by file."""
        for file in self._files:
            with _reading(file), pq.ParquetFile(file.open()) as rows:
                _require_each_once(columns, rows.schema_arrow.names, file)
                number = 1
                for batch in rows.iter_batches(_rows_of_a_piece(rows.metadata), columns=columns):
                    places = [f"{file.name}:{number + i}" for i in range(len(batch))]
                    yield Piece(places, {name: _values(batch.column(name)) for name in columns}, {})
                    number += len(batch)


class JsonLines:
    """Files with one JSON object per line; each line is a record."""

    kind = "JSON lines"

    def __init__(self, files: list[File]) -> None:
        self._files = files

    def schema(self) -> pa.Schema:
        """Keys of the first objects and the types of their values; the most common type if they differ."""
        sample, held, reason = list[dict[str, Any]](), 0, "no lines"
        for place, size, record in self._lines():
            if isinstance(record, str):
                reason = f"{place}: {record}" if reason == "no lines" else reason
                continue
            sample.append(record)
            held += size
            if len(sample) == SAMPLE_ROWS or held >= SAMPLE_BYTES:
                break
        if not sample:
            raise DocumentsError(
                "there are no documents",
                expected="one JSON object per line, in UTF-8",
                found=reason,
                where=", ".join(file.address for file in self._files[:3]),
                do="check that these are the right files and that they are complete",
            )
        keys = dict.fromkeys(chain.from_iterable(sample))
        named = [key for key in keys if key.encode(errors="ignore").decode() == key]  # without half a surrogate pair
        return pa.schema([(key, _type_of([record.get(key) for record in sample])) for key in named])

    def read(self, columns: list[str]) -> Iterator[Piece]:
        """The objects of all files, file by file."""
        piece, held = Piece.empty(columns), 0
        for place, _, record in self._lines():
            if isinstance(record, str):
                piece.unreadable[len(piece.places)] = record
                record = {}
            piece.places.append(place)
            for name in columns:
                piece.values[name].append(value := record.get(name))
                held += len(value) if isinstance(value, str) else 100
            if len(piece.places) == PIECE_ROWS or held > PIECE_BYTES:
                yield piece
                piece, held = Piece.empty(columns), 0
        yield piece

    def _lines(self) -> Iterator[tuple[str, int, dict[str, Any] | str]]:
        """Place and size in bytes of each line that is not blank, and its object or why it has none."""
        for file in self._files:
            with _reading(file), _stream(file) as stream:
                for number, line in enumerate(io.BufferedReader(stream), 1):
                    if line.strip():
                        yield f"{file.name}:{number}", len(line), _object(line)


class PlainText:
    """Text files; each is a record."""

    kind = "plain text"

    def __init__(self, files: list[File]) -> None:
        self._files = files

    def schema(self) -> pa.Schema:
        """The columns id and text."""
        return pa.schema([(name, pa.string()) for name in TEXT_COLUMNS])

    def read(self, columns: list[str]) -> Iterator[Piece]:
        """All files, each as one record."""
        piece, held = Piece.empty(columns), 0
        for file in self._files:
            with _reading(file), _stream(file) as stream:
                content = stream.read()
            piece.places.append(file.name)
            for name in columns:
                piece.values[name].append(dict(zip(TEXT_COLUMNS, (file.name, content), strict=True))[name])
            held += len(content)
            if len(piece.places) == PIECE_ROWS or held > PIECE_BYTES:
                yield piece
                piece, held = Piece.empty(columns), 0
        yield piece


@contextmanager
def _reading(file: File) -> Iterator[None]:
    """Turn read errors into an error that names the file."""
    try:
        with bucket_errors():
            yield
    except (pa.ArrowException, OSError, EOFError) as error:
        reader = _reader(file)
        raise DocumentsError(
            "a file of documents can't be read",
            expected=f"a complete, undamaged {f'{reader.kind} file' if reader else 'file of documents'}",
            found=f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}",
            where=file.address,
            do="write or copy the file again, or exclude it with a glob",
        ) from None


def _stream(file: File) -> pa.NativeFile:
    """The file's bytes from start to end, decompressed."""
    ahead = pa.BufferedInputStream(file.open(), READ_AHEAD)
    compression = _COMPRESSED.get(file.suffixes[-1])
    return pa.CompressedInputStream(ahead, compression) if compression else ahead


def _require_each_once(columns: list[str], found: list[str], file: File) -> None:
    for name in columns:
        if (times := found.count(name)) != 1:
            raise DocumentsError(
                f"a file has {times or 'no'} column{'s' * (times > 1)} named {name!r}",
                expected=f"exactly one column named {name!r} in every file",
                found=", ".join(islice(found, 40)) or "no columns",
                where=file.address,
                do="rename the file's columns, exclude the file with a glob, or set columns.* to other columns",
            )


_READERS: dict[str, type[Reader]] = {
    ".parquet": Parquet,
    ".jsonl": JsonLines,
    ".ndjson": JsonLines,
    ".txt": PlainText,
    ".md": PlainText,
    ".rst": PlainText,
}
"""Which class reads a file, by the ending of its name."""


def _reader(file: File) -> type[Reader] | None:
    *_, before, last = ["", "", *file.suffixes]
    if last in _COMPRESSED:
        return None if (reader := _READERS.get(before)) is Parquet else reader
    return _READERS.get(last)


def _rows_of_a_piece(file: pq.FileMetaData) -> int:
    size = sum(file.row_group(i).total_byte_size for i in range(file.num_row_groups))
    return int(min(PIECE_ROWS, max(1, PIECE_BYTES * file.num_rows // max(1, size))))


def _values(column: pa.Array) -> list[Any]:
    """Python values; strings as bytes, not decoded."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        column = pc.cast(column, pa.large_binary())
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:  # an invalid string inside a list or struct: only its own row is lost
        values = [_value(item) for item in column]
    return values


def _value(item: pa.Scalar) -> Any:
    try:
        return item.as_py()
    except UnicodeDecodeError:
        return b"\xff"  # invalid UTF-8, so that this record is rejected


def _object(line: bytes) -> dict[str, Any] | str:
    if b"\0" in line:
        return "the line is not UTF-8: it contains zero bytes, as UTF-16 does"
    try:
        record = json.loads(line.decode("utf-8-sig"))  # given bytes, json would guess the encoding
    except UnicodeDecodeError as error:
        return f"the line is not valid UTF-8 at byte {error.start}"
    except json.JSONDecodeError as error:
        return f"the line is not valid JSON: {error.msg} at column {error.colno}"
    except (ValueError, RecursionError) as error:
        return f"the line is not valid JSON: {error}"
    return record if isinstance(record, dict) else f"the line must be a JSON object, but is {type(record).__name__}"


def _type_of(values: list[Any]) -> pa.DataType:
    try:
        return pa.array(values).type
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):
        kinds = Counter(type(value) for value in values if value is not None)
        if kinds[float]:
            kinds[float] += kinds.pop(int, 0)  # a column of floats can hold these, too
        [(most, _)] = kinds.most_common(1)
        return {bool: pa.bool_(), int: pa.int64(), float: pa.float64()}.get(most, pa.string())
