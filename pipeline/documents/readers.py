"""Readers of documents: Parquet, JSON lines and plain text, a piece at a time.

``documents.documents`` judges the values. Strings of Parquet come as bytes, so that one broken character spoils one
document and not the file.
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

from softlabel.pipeline.documents.paths import File, find_files, in_bucket
from softlabel.storage.errors import DocumentsError

PIECE_ROWS = 4096
PIECE_BYTES = 32 << 20
READ_AHEAD = 1 << 20
"""Bytes of a stream that are read at a time: of an object, each is a request."""
SAMPLE_ROWS = 1000
SAMPLE_BYTES = 16 << 20
"""Lines of JSON from which columns and their types are read off, and their bytes: whichever are reached first."""
TEXT_COLUMNS = ("id", "text")
"""What a plain text file has: its path below the folder, and what is in it."""

_KINDS = {
    ".parquet": "Parquet",
    ".jsonl": "JSON lines",
    ".ndjson": "JSON lines",
    ".txt": "plain text",
    ".md": "plain text",
    ".rst": "plain text",
}
_COMPRESSED = {".gz": "gzip", ".zst": "zstd"}


class Piece(NamedTuple):
    """Some records, in their order."""

    places: list[str]
    """Where each stands."""
    values: dict[str, list[Any]]
    """Of each column."""
    unreadable: dict[int, str]
    """By its number, why a record has no values; None stands for them."""

    @classmethod
    def empty(cls, columns: list[str]) -> "Piece":
        """One of no record, yet."""
        return cls([], {name: [] for name in columns}, {})


class Source(Protocol):
    """Files of one kind."""

    def __init__(self, files: list[File]) -> None: ...

    def schema(self) -> pa.Schema:
        """Columns and their types, read off the first file or lines."""
        ...

    def read(self, columns: list[str]) -> Iterator[Piece]:
        """All records, always in the same order, ``PIECE_ROWS`` or about ``PIECE_BYTES`` at a time."""
        ...


def find(path: str) -> Source:
    """The files that a path, folder or glob means.

    Raises:
        UsageError: if there is nothing there.
        DocumentsError: if nothing there is of a known kind, or more than one kind is.
    """
    files, is_folder = find_files(path)
    if is_folder:
        files = [file for file in files if _kind(file)] or files
    kinds = {_kind(file) for file in files}
    if len(kinds) != 1 or None in kinds:
        raise DocumentsError(
            "documents can't be read from this path",
            expected=f"files of one kind: {', '.join(_KINDS)}; all but Parquet also with {' or '.join(_COMPRESSED)}",
            found=", ".join([file.name for file in files][:10]) or "an empty folder",
            where=path,
            do="select files of one kind with a glob, such as 'folder/*.parquet'",
        )
    sources: dict[str | None, type[Source]] = {"Parquet": Parquet, "JSON lines": JsonLines, "plain text": PlainText}
    return sources[kinds.pop()](files)


class Parquet:
    """Parquet files; a record is a row."""

    def __init__(self, files: list[File]) -> None:
        self._files = files

    def schema(self) -> pa.Schema:
        """Columns of the first file."""
        with _reading(self._files[0]):
            return pq.read_schema(self._files[0].open())

    def read(self, columns: list[str]) -> Iterator[Piece]:
        """Rows of one file after the other."""
        for file in self._files:
            with _reading(file), pq.ParquetFile(file.open()) as rows:
                _require_each_once(columns, rows.schema_arrow.names, file)
                number = 1
                for batch in rows.iter_batches(_rows_of_a_piece(rows.metadata), columns=columns):
                    places = [f"{file.name}:{number + i}" for i in range(len(batch))]
                    yield Piece(places, {name: _values(batch.column(name)) for name in columns}, {})
                    number += len(batch)


class JsonLines:
    """Files with a JSON object a line; a record is a line."""

    def __init__(self, files: list[File]) -> None:
        self._files = files

    def schema(self) -> pa.Schema:
        """Keys of the first objects and the types of their values, or of most of them."""
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
        named = [key for key in keys if key.encode(errors="ignore").decode() == key]  # no half of a surrogate pair
        return pa.schema([(key, _type_of([record.get(key) for record in sample])) for key in named])

    def read(self, columns: list[str]) -> Iterator[Piece]:
        """Objects of one file after the other."""
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
        """Place and bytes of each line that is not blank, and its object, or why it holds none."""
        for file in self._files:
            with _reading(file), _stream(file) as stream:
                for number, line in enumerate(io.BufferedReader(stream), 1):
                    if line.strip():
                        yield f"{file.name}:{number}", len(line), _object(line)


class PlainText:
    """Text files; each is a record."""

    def __init__(self, files: list[File]) -> None:
        self._files = files

    def schema(self) -> pa.Schema:
        """The path, and the text."""
        return pa.schema([(name, pa.string()) for name in TEXT_COLUMNS])

    def read(self, columns: list[str]) -> Iterator[Piece]:
        """Files, each whole."""
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
    """Say which file it was that could not be read."""
    try:
        with in_bucket():
            yield
    except (pa.ArrowException, OSError, EOFError) as error:
        raise DocumentsError(
            "a file of documents can't be read",
            expected=f"a complete, undamaged file of {_kind(file)}",
            found=f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}",
            where=file.address,
            do="write or copy the file again, or exclude it with a glob",
        ) from None


def _stream(file: File) -> pa.NativeFile:
    """Its bytes from first to last, unpacked."""
    ahead = pa.BufferedInputStream(file.open(), READ_AHEAD)
    compression = _COMPRESSED.get(file.suffixes[-1])
    return pa.CompressedInputStream(ahead, compression) if compression else ahead


def _require_each_once(columns: list[str], found: list[str], file: File) -> None:
    for name in columns:
        if (times := found.count(name)) != 1:
            raise DocumentsError(
                f"a file has {times or 'no'} column{'s' * (times > 1)} {name!r}",
                expected=f"exactly one column {name!r} in every file",
                found=", ".join(islice(found, 40)) or "no columns",
                where=file.address,
                do="rename the file's columns, exclude the file with a glob, or set columns.* to other columns",
            )


def _kind(file: File) -> str | None:
    *_, before, last = ["", "", *file.suffixes]
    if last in _COMPRESSED:
        return None if (kind := _KINDS.get(before)) == "Parquet" else kind
    return _KINDS.get(last)


def _rows_of_a_piece(file: pq.FileMetaData) -> int:
    size = sum(file.row_group(i).total_byte_size for i in range(file.num_row_groups))
    return int(min(PIECE_ROWS, max(1, PIECE_BYTES * file.num_rows // max(1, size))))


def _values(column: pa.Array) -> list[Any]:
    """Python values; strings as bytes, unread."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        column = pc.cast(column, pa.large_binary())
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:  # a broken string inside a list or struct: only its own row is lost
        values = [_value(item) for item in column]
    return values


def _value(item: pa.Scalar) -> Any:
    try:
        return item.as_py()
    except UnicodeDecodeError:
        return b"\xff"  # what is no string to anybody


def _object(line: bytes) -> dict[str, Any] | str:
    if b"\0" in line:
        return "the line is not UTF-8: it contains zero bytes, as UTF-16 does"
    try:
        record = json.loads(line.decode("utf-8-sig"))  # of bytes, json would guess the encoding
    except UnicodeDecodeError as error:
        return f"the line is not valid UTF-8 at byte {error.start}"
    except (ValueError, RecursionError) as error:
        return f"the line is not valid JSON: {error}"
    return record if isinstance(record, dict) else f"the line must be a JSON object, but is {type(record).__name__}"


def _type_of(values: list[Any]) -> pa.DataType:
    try:
        return pa.array(values).type
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):
        kinds = Counter(type(value) for value in values if value is not None)
        if kinds[float]:
            kinds[float] += kinds.pop(int, 0)  # which a column of floats holds too
        [(most, _)] = kinds.most_common(1)
        return {bool: pa.bool_(), int: pa.int64(), float: pa.float64()}.get(most, pa.string())
