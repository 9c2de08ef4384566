"""Writes the rows of an export into files, one split after the other; an open file is the only thing in memory."""

import json
import uuid
from pathlib import Path
from typing import Any, BinaryIO, Protocol, Self

import pyarrow as pa
import pyarrow.parquet as pq

_FILE_BYTES = 512 << 20
"""Size from which on the next rows go to another file."""


class _Sink(Protocol):
    def write(self, table: pa.Table) -> None: ...

    def close(self) -> None: ...


class Files:
    """The files of one split.

    Args:
        folder: where they are; made with the first rows.
        prefix: how their names begin.
    """

    suffix = ""

    def __init__(self, folder: Path, prefix: str) -> None:
        self._folder, self._prefix = folder, prefix
        self._file: BinaryIO | None = None
        self._sink: _Sink | None = None
        self.names: list[str] = []
        """Names of the files in their folder."""
        self.bytes = 0
        """Size of the finished files."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def write(self, rows: pa.Table) -> None:
        """Append rows, all with the same columns."""
        if self._file is None or self._file.tell() >= _FILE_BYTES:
            self._close()
            self._folder.mkdir(parents=True, exist_ok=True)
            self.names.append(f"{self._prefix}-{len(self.names):05}{self.suffix}")
            self._file = (self._folder / self.names[-1]).open("wb")
            self._sink = self._open(self._file, rows.schema)
        assert self._sink is not None
        self._sink.write(rows)

    def describe(self, split: str) -> None:
        """Write what belongs beside the files, once they are closed."""

    def _open(self, file: BinaryIO, schema: pa.Schema) -> _Sink:
        raise NotImplementedError

    def _close(self) -> None:
        if self._sink is not None and self._file is not None:
            self._sink.close()
            self.bytes += self._file.tell()
            self._file.close()
        self._file = self._sink = None


class ParquetFiles(Files):
    """Parquet files, as ``load_dataset`` and everything else reads them."""

    suffix = ".parquet"

    def _open(self, file: BinaryIO, schema: pa.Schema) -> Any:
        return _Closing(pq.ParquetWriter(file, schema, compression="zstd"))


class _Closing:
    """A Parquet writer that leaves its file open, so that its size can be seen."""

    def __init__(self, writer: pq.ParquetWriter) -> None:
        self._writer = writer

    def write(self, table: pa.Table) -> None:
        self._writer.write_table(table)

    def close(self) -> None:
        self._writer.close()


class ArrowFiles(Files):
    """Arrow files with what ``load_from_disk`` needs beside them."""

    suffix = ".arrow"

    def _open(self, file: BinaryIO, schema: pa.Schema) -> Any:
        return pa.ipc.new_stream(file, schema)

    def describe(self, split: str) -> None:
        """The description that the library expects in each folder."""
        state: dict[str, Any] = {
            "_data_files": [{"filename": name} for name in self.names],
            "_fingerprint": uuid.uuid4().hex[:16],
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": split,
        }
        (self._folder / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
        (self._folder / "dataset_info.json").write_text("{}", encoding="utf-8")
