"""What all readers of documents share: the pieces that they yield, the streams that they read, and their errors."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import pyarrow as pa

from softlabel.pipeline.documents.paths import File, store_errors
from softlabel.storage.errors import DocumentsError, printable

PIECE_ROWS = 4096
PIECE_BYTES = 32 << 20
RECORD_BYTES = 1 << 30
"""Most bytes of one record: what is longer is a file without line ends or closing quotes, and would fill the memory."""
READ_AHEAD = 1 << 20
"""Bytes of a stream that are read at a time; for an object in a bucket, each read is a request."""

BOM = b"\xef\xbb\xbf"
"""Bytes at the start of a file that say that it is UTF-8; they are no part of its text."""
ZERO_BYTES = "is not UTF-8: it contains zero bytes, as UTF-16 and compressed files do"

COMPRESSED = {".gz": "gzip", ".zst": "zstd"}


class Piece(NamedTuple):
    """Some records, in their order."""

    places: list[str]
    """Where each record is: its file and line or row."""
    values: dict[str, list[Any]]
    """The values of each column."""
    unreadable: dict[int, str]
    """By index, why a record can't be read; its values are None."""
    padded: bool = False
    """Whether an object has null for the keys that only other objects of its column have."""

    @classmethod
    def empty(cls, columns: list[str]) -> "Piece":
        """A piece without records."""
        return cls([], {name: [] for name in columns}, {})


class Record(NamedTuple):
    """One record of a file."""

    place: str
    """Its file and line or number."""
    bytes: int
    """Its size in the file."""
    values: dict[str, Any] | str
    """Its values by column, or why it can't be read."""


class Reader(Protocol):
    """Files of one kind."""

    kind: str
    """Name of the format, for messages."""

    def __init__(self, files: list[File]) -> None: ...

    def schema(self) -> pa.Schema:
        """Columns and their types, from the first file or the first records."""
        ...

    def read(self, columns: list[str]) -> Iterator[Piece]:
        """All records, always in the same order, ``PIECE_ROWS`` or about ``PIECE_BYTES`` at a time."""
        ...


def pieces(records: Iterator[Record], columns: list[str]) -> Iterator[Piece]:
    """The records, gathered into pieces."""
    piece, held = Piece.empty(columns), 0
    for place, _, values in records:
        if isinstance(values, str):
            piece.unreadable[len(piece.places)] = values
            values = {}
        piece.places.append(place)
        for name in columns:
            piece.values[name].append(value := values.get(name))
            held += len(value) if isinstance(value, str | bytes) else 100
        if len(piece.places) == PIECE_ROWS or held > PIECE_BYTES:
            yield piece
            piece, held = Piece.empty(columns), 0
    yield piece


@contextmanager
def reading(file: File, kind: str) -> Iterator[None]:
    """Turn read errors into an error that names the file.

    Raises:
        DocumentsError: if the file can't be read.
    """
    try:
        with store_errors():
            yield
    except (pa.ArrowException, OSError, EOFError, ValueError) as error:
        expected = f"a complete, undamaged {kind} file"
        do = "write or copy the file again, or exclude it with a glob"
        if "requires too much memory" in str(error):  # zstd's own words
            expected = "a file that zstd compressed with a window of at most 128 MB (without --long, or --long=27)"
            do = "compress it again: zstd -dc --long=31 FILE | zstd -o NEW_FILE"
        elif "implemented" in str(error):  # pyarrow's own words
            expected, do = f"a {kind} file that pyarrow can read", "write the file again with a usual encoding"
        elif isinstance(error, PermissionError | FileNotFoundError):
            expected, do = "a file that exists and that you may read", "check the file and its permissions"
        raise DocumentsError(
            "a file of documents can't be read",
            expected=expected,
            found=printable(f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"),
            where=printable(file.address),
            do=do,
        ) from None


def stream(file: File) -> pa.NativeFile:
    """The file's bytes from start to end, decompressed."""
    ahead = pa.BufferedInputStream(file.open(), READ_AHEAD)
    compression = COMPRESSED.get(file.ending)
    return pa.CompressedInputStream(ahead, compression) if compression else ahead
