"""Writes shards: to temporary files first, under their final names once they are checked, into the table by a commit.

Any number of writers may add to one table at once, also the same rows: whoever commits second drops what the first
has brought. A writer that dies, or loses such a race, leaves files that no version names; ``maintain`` removes them.
"""

import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from softlabel.storage.codec import SoftLabels, encode
from softlabel.storage.committing import all_or_nothing, committed
from softlabel.storage.places.open import place_of
from softlabel.storage.places.place import WRITING
from softlabel.storage.reader import outline, soft_labels_by_key
from softlabel.storage.schema import PARTITION, ROW_KEY, row_keys
from softlabel.storage.shard_file import RowKey, ShardFile, add_action
from softlabel.storage.state import Shard
from softlabel.storage.table import Table
from softlabel.storage.takedown import refusal

_THREADS = 8
"""Shards whose keys are read side by side."""
_KEY_STARTS: dict[str, NDArray[np.uint64]] = {}
"""By path, which stands for the content, of each shard that this process has met: 8 bytes a row, so that only the
first of many commits reads the keys of a large table."""


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
        self.append_encoded(_joined(sequences, encoded))

    def append_copies(self, sequences: pa.Table) -> None:
        """Add rows with the soft labels that the table has for the same keys, under whatever documents.

        Args:
            sequences: R rows with the columns of ``storage.schema.SEQUENCE`` and the carried ones.

        Raises:
            TableError: if the table has none for a key, the disk is full, or the folder can't be written.
        """
        labels = soft_labels_by_key(self._table, sequences.column("key").to_pylist())
        self.append_encoded(_joined(sequences, labels))

    def append_encoded(self, rows: pa.Table) -> None:
        """Add rows of this table's own schema, their soft labels encoded already.

        Raises:
            TableError: if the disk is full or the folder can't be written.
        """
        with all_or_nothing(self._table.location):
            for split in pc.unique(rows.column(PARTITION)).to_pylist():
                if split not in self._files:
                    self._files[split] = ShardFile(self._table, split, self._row_group)
                self._files[split].append(rows.filter(pc.equal(rows.column(PARTITION), split)))

    @property
    def bytes_a_position(self) -> float | None:
        """What a captured position takes in the row groups that are written; None before the first."""
        files = list(self._files.values())
        positions = sum(file.written_positions for file in files)
        return sum(file.written_bytes for file in files) / positions if positions else None

    def commit(self, about: Mapping[str, Any]) -> Commit:
        """Make the rows part of the table, each exactly once whoever else commits meanwhile.

        Args:
            about: what the table's history is to say of this commit: its operation and circumstances.

        Raises:
            ProvenanceError: if the table has become one of another identity meanwhile.
            TableError: if the disk is full or the folder can't be written; the table is then as it was.
        """
        with all_or_nothing(self._table.location):
            files = list(self._files.values())
            for file in files:
                file.finish()
        with all_or_nothing(self._table.location), self._table.place.gate():
            while True:
                newest = self._table.newest()
                newest.identity.require(self._table.identity, newest.location)  # it may have been narrowed meanwhile
                self._drop_refused(files)
                self._drop_rows_of_others(files, newest)
                present = {shard.path for shard in newest.shards()}
                new = [file for file in files if file.keys and file.shard_path not in present]
                total = Commit(
                    newest.version + bool(new),
                    sum(len(file.keys) for file in new),
                    sum(file.positions for file in new),
                    sum(file.shard.bytes for file in new),
                )
                counts = {"sequences": total.sequences, "positions": total.positions, "bytes": total.bytes}
                actions = [add_action(file.shard) for file in new]
                if not new or committed(newest, actions, {**about, **counts}, [file.publish for file in new]):
                    return total

    def _drop_refused(self, files: list["ShardFile"]) -> None:
        """Documents may have been taken down since these rows were asked for."""
        refused = refusal(self._table.location)
        for file in files:
            file.drop({row for row in file.keys if refused(str(row[0]))})

    def _drop_rows_of_others(self, files: list["ShardFile"], newest: Table) -> None:
        """Others may have committed the same rows since these were asked for."""
        known = {file.shard_path for file in files} | self._checked
        others = [shard for shard in newest.shards() if shard.path not in known]
        for taken in _rows_beside(newest, others, [row for file in files for row in file.keys]):
            for file in files:
                file.drop(taken)
        self._checked |= {shard.path for shard in others}


def held(table: Table, rows: pa.Table) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """What a version has of some rows.

    Args:
        table: the version.
        rows: R rows with the columns of ``storage.schema.ROW_KEY``.

    Returns:
        (R,) whether it has the row, and (R,) whether it has the row's key, under whichever document.
    """
    wanted = row_keys(rows)
    keys = {row[-1] for row in wanted}
    found = {row for part in _rows_beside(table, table.shards(), wanted) for row in part if row[-1] in keys}
    found_keys = {row[-1] for row in found}
    return np.array([row in found for row in wanted], bool), np.array([row[-1] in found_keys for row in wanted], bool)


def require_writable(location: str) -> None:
    """Write and delete a file, before anyone computes for hours what can't be written then.

    Raises:
        TableError: if the place can't be written.
    """
    place = place_of(location)
    with all_or_nothing(location):
        place.write(probe := f"{WRITING}/{uuid.uuid4().hex}", b"")
        place.delete(probe)


def _joined(sequences: pa.Table, labels: pa.Table) -> pa.Table:
    return pa.table([*sequences.columns, *labels.columns], [*sequences.column_names, *labels.column_names])


def _rows_beside(table: Table, shards: Sequence[Shard], rows: Iterable[RowKey]) -> Iterator[set[RowKey]]:
    """All rows of each shard that shares a key with these; a look at the small key column tells which shards do."""
    starts = _starts(cast(bytes, row[-1]) for row in rows)
    with ThreadPoolExecutor(_THREADS, "softlabel-keys") as pool:
        for shard, theirs in zip(shards, pool.map(partial(_key_starts, table), shards), strict=True):
            if np.isin(starts, theirs).any():
                yield {row for part in outline(table, shard, ROW_KEY) for row in row_keys(part)}


def _key_starts(table: Table, shard: Shard) -> NDArray[np.uint64]:
    if shard.path not in _KEY_STARTS:
        parts = outline(table, shard, ["key"])
        _KEY_STARTS[shard.path] = _starts(key for part in parts for key in part.column("key").to_pylist())
    return _KEY_STARTS[shard.path]


def _starts(keys: Iterable[bytes]) -> NDArray[np.uint64]:
    """The first half of each key: where it is another, so is the key."""
    return np.frombuffer(b"".join(key[:8] for key in keys), np.uint64)
