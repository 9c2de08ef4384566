"""Writes shards: to temporary files first, under their final names once they are checked, into the table by a commit.

Any number of writers may add to one table at once, also the same rows: whoever commits second drops what the first
has brought. A writer that dies, or loses such a race, leaves files that no version names; ``maintain`` removes them.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake import DeltaTable
from deltalake.exceptions import CommitFailedError, DeltaError
from deltalake.transaction import AddAction, CommitProperties, RemoveAction

from storage.codec import SoftLabels, encode
from storage.errors import IntegrityError, TableError
from storage.files import WRITING, content_hash, gate, rename, start_writing
from storage.reader import outline
from storage.schema import PARTITION, ROW_KEY, row_keys, without
from storage.table import COMMIT_MESSAGE, Table

RowKey = tuple[object, ...]


@dataclass(frozen=True)
class Commit:
    """What a writer added."""

    version: int
    sequences: int
    positions: int
    bytes: int


class ShardWriter:
    """One shard of each split, filled as rows come and committed as one.

    Use it as a context manager: what is not committed at its end is thrown away.

    Args:
        table: any version of it; rows that its newest has by the time of the commit are left out.
        row_group: sequences of a row group, the unit that is read.
    """

    def __init__(self, table: Table, row_group: int = 256) -> None:
        self._table = table
        self._checked: set[str] = set()
        self._row_group = row_group
        self._files: dict[str, ShardFile] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.discard()

    def append(self, sequences: pa.Table, labels: SoftLabels) -> None:
        """Add rows; one that this writer has already is left out.

        Args:
            sequences: R rows with the columns of ``storage.schema.SEQUENCE`` and the carried ones.
            labels: of all their captured positions, in order.

        Raises:
            TableError: if the disk is full or the folder can't be written.
        """
        positions = sequences.column("positions").to_numpy().astype("int64")
        encoded = encode(labels, positions, self._table.ranks)
        self.append_encoded(
            pa.table([*sequences.columns, *encoded.columns], [*sequences.column_names, *encoded.column_names])
        )

    def append_encoded(self, rows: pa.Table) -> None:
        """Add rows of this table's own schema, their soft labels encoded already.

        Raises:
            TableError: if the disk is full or the folder can't be written.
        """
        with self._explained():
            for split in pc.unique(rows.column(PARTITION)).to_pylist():
                if split not in self._files:
                    self._files[split] = ShardFile(self._table, split, self._row_group)
                self._files[split].append(rows.filter(pc.equal(rows.column(PARTITION), split)))

    def commit(self, about: Mapping[str, Any]) -> Commit:
        """Make the rows part of the table, each exactly once whoever else commits meanwhile.

        Args:
            about: what the table's history is to say of this commit: its operation and circumstances.

        Raises:
            TableError: if the disk is full or the folder can't be written; the table is then as it was.
        """
        with self._explained():
            files = list(self._files.values())
            for file in files:
                file.finish()
        with self._explained(), gate(self._table.location):
            while True:
                newest = self._table.newest()
                self._drop_rows_of_others(files, newest)
                present = {shard.path for shard in newest.shards()}
                new = [file for file in files if file.keys and file.shard_path not in present]
                total = Commit(
                    newest.version + bool(new),
                    sum(len(file.keys) for file in new),
                    sum(file.positions for file in new),
                    sum(file.publish() for file in new),
                )
                counts = {"sequences": total.sequences, "positions": total.positions, "bytes": total.bytes}
                if not new or committed(newest, [file.add_action() for file in new], {**about, **counts}):
                    return total

    def _drop_rows_of_others(self, files: list["ShardFile"], newest: Table) -> None:
        """A look at the small key column tells which shards share a key; only those are looked at row by row."""
        mine = {file.shard_path for file in files}
        keys = pa.array({row[-1] for file in files for row in file.keys}, pa.binary())
        for shard in newest.shards():
            if shard.path in mine or shard.path in self._checked:
                continue
            self._checked.add(shard.path)
            if any(pc.is_in(part.column("key"), keys).to_numpy().any() for part in outline(newest, shard, ["key"])):
                taken = {row for part in outline(newest, shard, ROW_KEY) for row in row_keys(part)}
                for file in files:
                    file.drop(taken)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (OSError, DeltaError) as error:
            raise TableError(
                "rows could not be written; the table is as it was",
                expected="a folder that can be written, on a disk that has room",
                found=error,
                where=self._table.location,
                do="make room or mend the permissions, then run the same command again",
            ) from error


def committed(newest: Table, actions: Sequence[AddAction | RemoveAction], about: Mapping[str, Any]) -> bool:
    """Try to commit on top of ``newest``; False if another commit came first.

    Args:
        newest: the newest version of the table as far as the caller has seen it.
        actions: shards that come and shards that go, all of them or none.
        about: what the table's history is to say of it.
    """
    delta = DeltaTable(newest.location, version=newest.version)
    # No retries inside delta-rs: the caller has to see first what another commit has changed.
    properties = CommitProperties(custom_metadata={COMMIT_MESSAGE: dict(about)}, max_commit_retries=0)
    try:
        delta.create_write_transaction(
            list(actions), "append", delta.schema(), [PARTITION], commit_properties=properties
        )
    except CommitFailedError:
        if newest.newest().version == newest.version:
            raise
        return False
    return True


class ShardFile:
    """A shard in the making: rows collect to whole row groups, in a temporary file until they are published."""

    def __init__(self, table: Table, split: str, row_group: int) -> None:
        self._location = Path(table.location)
        self._schema = without(table.schema, [PARTITION])
        self._split = split
        self._row_group = row_group
        self._buffer: list[pa.Table] = []
        self._open()

    def _open(self) -> None:
        self._path, self._mark = start_writing(str(self._location), ".parquet")
        try:
            self._writer = pq.ParquetWriter(self._path, self._schema, **parquet_options(self._schema))
        except OSError:
            self._path.unlink(missing_ok=True)
            self._mark.close()
            raise
        self.keys: dict[RowKey, None] = {}
        self.positions = 0

    def append(self, rows: pa.Table) -> None:
        """Add rows of the table's schema; one that the file has already is left out."""
        new = []
        for key in row_keys(rows):
            new.append(key not in self.keys)
            self.keys[key] = None
        if not all(new):
            rows = rows.filter(pa.array(new))
        self.positions += pc.sum(rows.column("positions")).as_py() or 0
        self._buffer.append(rows.select(self._schema.names).cast(self._schema))
        while sum(map(len, self._buffer)) >= self._row_group:
            self._write_row_group(self._row_group)

    def _write_row_group(self, count: int) -> None:
        rows = pa.concat_tables(self._buffer)
        self._writer.write_table(rows.slice(0, count).combine_chunks(), row_group_size=count)
        self._buffer = [rows.slice(count)] if len(rows) > count else []

    def finish(self) -> None:
        """Close the file, read its footer back, and name it by its content."""
        if self._buffer:
            self._write_row_group(sum(map(len, self._buffer)))
        self._writer.close()
        found = pq.read_metadata(self._path).num_rows
        if found != len(self.keys):
            expected = f"{len(self.keys)} rows"
            raise IntegrityError("a shard was not written whole", expected=expected, found=found, where=self._path)
        self.shard_path = f"{PARTITION}={self._split}/{content_hash(self._path)}.parquet"

    def drop(self, taken: set[RowKey]) -> None:
        """Leave out rows that the table has from another; the file that held them is nobody's from then on."""
        kept = [key not in taken for key in self.keys]
        if all(kept):
            return
        rows = pq.read_table(self._path, schema=self._schema).filter(pa.array(kept))
        self.discard()
        self._open()
        if len(rows):
            self.append(rows)
        self.finish()

    def publish(self) -> int:
        """Give the file its final name, where a reader of a version that has it looks; returns its bytes.

        Another writer with the very same rows makes the very same file: the name is then there already, and whoever
        commits first has it.
        """
        target = self._location / self.shard_path
        if self._path != target:
            rename(self._path, target)
            self._path = target
        return target.stat().st_size

    def add_action(self) -> AddAction:
        """What makes the published file part of the table, in a commit."""
        stat = self._path.stat()
        # Only the number of rows: wrong minima and maxima would silently hide rows from queries.
        stats = json.dumps({"numRecords": len(self.keys)})
        return AddAction(self.shard_path, stat.st_size, {PARTITION: self._split}, int(time.time() * 1000), True, stats)

    def discard(self) -> None:
        """Remove the temporary file. A published one stays: another writer may be about to commit its twin."""
        with suppress(OSError):  # a full disk has no room for the footer either
            self._writer.close()
        if self._path.parent.name == WRITING:
            self._path.unlink(missing_ok=True)
        self._mark.close()


def parquet_options(schema: pa.Schema) -> dict[str, Any]:
    """How a shard's columns are encoded: what was smallest within the time that a capture can spare.

    Bytes of one significance have a distribution of their own, so lists of numbers are split by it and left to zstd's
    entropy coder; a dictionary only gets in its way. Ids hold nothing but that, which the lowest level sees as well
    as the highest; codes repeat from position to position, which takes a higher one to find. A ``tests.benchmarks``
    command shows the bytes by column.
    """
    numbers = [field.name for field in schema if pa.types.is_list(field.type) and field.name != "loss_mask"]
    levels = {name: 1 if name.endswith("_ids") else 10 for name in numbers}
    return {
        "compression": "zstd",
        "compression_level": {_leaf(name): level for name, level in levels.items()},
        "column_encoding": {_leaf(name): "BYTE_STREAM_SPLIT" for name in numbers},
        "use_dictionary": [field.name for field in schema if pa.types.is_string(field.type)],
        "write_page_checksum": True,
        "write_statistics": False,
        "version": "2.6",
    }


def _leaf(name: str) -> str:
    return f"{name}.list.element"
