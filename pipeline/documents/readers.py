"""Decide which reader reads the files at a path: by the endings of their names or, without one, by their first bytes.

The values are checked by ``documents.documents``.
"""

from collections.abc import Iterator, Sequence

import pyarrow as pa

from softlabel.pipeline.documents.json_records import Json
from softlabel.pipeline.documents.paths import File, find_files
from softlabel.pipeline.documents.reading import (
    BOM,
    COMPRESSED,
    ZERO_BYTES,
    Piece,
    Reader,
    Record,
    pieces,
    reading,
    stream,
)
from softlabel.pipeline.documents.saved_datasets import without_caches
from softlabel.pipeline.documents.tabular import Arrow, Csv, Parquet
from softlabel.storage.errors import DocumentsError, printable

TEXT_COLUMNS = ("id", "text")
"""Columns of a plain text file: its path below the folder, and its content."""


def find(paths: str | Sequence[str]) -> list[tuple[str, Reader]]:
    """Each path, folder or glob with the reader of its files; a file that two of them name is read once.

    Raises:
        UsageError: if there is nothing at a path.
        DocumentsError: if no file at a path is of a known kind, or the files are of several kinds.
    """
    seen = set[str]()
    found = []
    for path in (paths,) if isinstance(paths, str) else paths:
        reader, files = _reader_of(path)
        files = [file for file in files if file.address not in seen]
        seen |= {file.address for file in files}
        if files:
            found.append((path, reader(files)))
    return found


def _reader_of(path: str) -> tuple[type[Reader], list[File]]:
    files, is_folder = find_files(path)
    if is_folder:
        files = _documents_in(files)
    readers = {_reader(file) for file in files}
    if len(readers) != 1 or None in readers:
        endings = ", ".join(ending for group in _READERS for ending in group)
        raise DocumentsError(
            "documents can't be read from this path",
            expected=f"files of one kind: {endings}; all but Parquet and Arrow also with {' or '.join(COMPRESSED)}",
            found=printable(", ".join([file.name for file in files][:10])) or "an empty folder",
            where=printable(path),
            do="convert the files, or select files of one kind with a glob, such as 'folder/*.parquet'",
        )
    (reader,) = readers
    assert reader
    return reader, files


def _documents_in(files: list[File]) -> list[File]:
    """The files of a folder that hold documents: others, such as a licence, may lie beside them."""
    files = without_caches(files)
    for group in _READERS:
        if found := [file for file in files if file.format in group]:
            return found
    return [file for file in files if not file.format and _reader(file)] or files


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
        return pieces(self._records(), columns)

    def _records(self) -> Iterator[Record]:
        for file in self._files:
            with reading(file, self.kind), stream(file) as opened:
                content = opened.read().removeprefix(BOM)
            values = dict(zip(TEXT_COLUMNS, (file.name, content), strict=True))
            yield Record(file.name, len(content), f"the file {ZERO_BYTES}" if b"\0" in content else values)


_READERS: tuple[dict[str, type[Reader]], ...] = (
    {
        ".parquet": Parquet,
        ".jsonl": Json,
        ".ndjson": Json,
        ".txt": PlainText,
        ".md": PlainText,
        ".rst": PlainText,
    },
    {".arrow": Arrow},
    {".json": Json, ".csv": Csv, ".tsv": Csv},
)
"""Which class reads a file, by the ending of its name. Of a folder, only the files of the first group are read that it
has any of, because a .json file next to others usually describes them."""

_FIRST_BYTES: dict[bytes, type[Reader]] = {b"PAR1": Parquet, b"ARROW1": Arrow, b"{": Json, b"[": Json}
"""Which class reads a file whose name has no ending."""


def _reader(file: File) -> type[Reader] | None:
    if not file.format:
        with reading(file, "document"), stream(file) as content:
            start = content.read(1 << 10).removeprefix(BOM).lstrip()
        return next((reader for lead, reader in _FIRST_BYTES.items() if start.startswith(lead)), None)
    reader = next((group[file.format] for group in _READERS if file.format in group), None)
    return None if file.ending in COMPRESSED and reader in (Parquet, Arrow) else reader
