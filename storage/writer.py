"""Writes shards: to temporary files first, then, once checked, under their final names, and commits them to a table.

Any number of writers may add to a table at the same time, even the same rows: a writer drops rows that another one has
committed first. A writer that dies, or loses such a race, leaves unused files, which ``maintain`` removes.
"""

import shlex
import uuid
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from softlabel.storage.codec import encode, without_tail_codes
from softlabel.storage.committing import all_or_nothing, try_commit
from softlabel.storage.errors import TableError
from softlabel.storage.identity import Identity
from softlabel.storage.key_index import key_index
from softlabel.storage.labels import SoftLabels
from softlabel.storage.log.state import Shard
from softlabel.storage.places.durable import require_permission
from softlabel.storage.places.open import place_of
from softlabel.storage.places.place import WRITING
from softlabel.storage.reader import outline, soft_labels_by_key
from softlabel.storage.records.takedown import refusal
from softlabel.storage.schema import FORMAT, PARTITION, ROW_KEY, RowKey, row_keys
from softlabel.storage.shard_file import ShardFile, add_action
from softlabel.storage.staging import staged_path
from softlabel.storage.table import Table


@dataclass(frozen=True)
class Commit:
    """What a writer added."""

    version: int
    sequences: int
    positions: int
    bytes: int


class ShardWriter:
    """Writes one shard for each split, and commits all of them together.

    Use it as a context manager: rows that are not committed when it exits are discarded.

    Args:
        table: any version of the table; rows that its newest version has at the time of the commit are left out.
        row_group: sequences in a row group, the smallest unit that is read.

    Raises:
        TableError: if the table has an older format.
    """

    def __init__(self, table: Table, row_group: int = 256) -> None:
        require_current_format(table)
        self._table = table
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
        """Add rows; rows that this writer has already are skipped.

        Args:
            sequences: R rows with the columns of ``storage.schema.SEQUENCE`` and the carried ones.
            labels: soft labels of all captured positions of the rows, in order.

        Raises:
            TableError: if the disk is full or the folder can't be written.
        """
        positions = sequences.column("positions").to_numpy().astype("int64")
        encoded = encode(labels, positions, self._table.numbering, stores_tail_codes(self._table.identity, sequences))
        self.append_encoded(_joined(sequences, encoded))

    def append_copies(self, sequences: pa.Table, staged: Sequence[Shard] = ()) -> None:
        """Add rows with the soft labels that the table already has for the same keys, in any document.

        Args:
            sequences: R rows with the columns of ``storage.schema.SEQUENCE`` and the carried ones.
            staged: staged shards that may have the keys, too.

        Raises:
            TableError: if a key is not there, the disk is full, or the folder can't be written.
        """
        keys = sequences.column("key").to_pylist()
        shards = key_index(self._table.place).shards_sharing(self._table, keys)
        labels = soft_labels_by_key(self._table, keys, [*shards, *staged])
        rows, stores = _joined(sequences, labels), stores_tail_codes(self._table.identity, sequences)
        self.append_encoded(without_tail_codes(rows, ~stores))

    def append_encoded(self, rows: pa.Table) -> None:
        """Add rows of the table's schema, whose soft labels are encoded already.

        Raises:
            TableError: if the disk is full or the folder can't be written.
        """
        with all_or_nothing(self._table.location):
            splits = pc.unique(rows.column(PARTITION)).to_pylist()
            for split in splits:
                if split not in self._files:
                    self._files[split] = ShardFile(self._table.place, self._table.schema, split, self._row_group)
                here = rows if len(splits) == 1 else rows.filter(pc.equal(rows.column(PARTITION), split))
                self._files[split].append(here)

    @property
    def bytes_a_position(self) -> float | None:
        """Bytes of a captured position in the row groups written so far; None before the first."""
        files = list(self._files.values())
        positions = sum(file.written_positions for file in files)
        return sum(file.written_bytes for file in files) / positions if positions else None

    def commit(self, about: Mapping[str, Any]) -> Commit:
        """Commit the rows to the table; each row is added exactly once, whatever other writers commit.

        Args:
            about: metadata for the table's history: the operation, and what the circumstances of this process lack.

        Raises:
            ProvenanceError: if the table's identity has changed meanwhile.
            TableError: if the disk is full or the folder can't be written; the table is then unchanged.
        """
        files = self._finished()
        with all_or_nothing(self._table.location), self._table.place.gate():
            while True:
                newest = self._table.newest()
                newest.identity.require(self._table.identity, newest.location)  # it may have been narrowed meanwhile
                self._drop_refused(files)
                self._drop_committed_rows(files, newest)
                new = [file for file in files if file.keys and file.shard_path not in newest.by_path]
                total = Commit(
                    newest.version + bool(new),
                    sum(len(file.keys) for file in new),
                    sum(file.positions for file in new),
                    sum(file.shard.bytes for file in new),
                )
                counts = {"sequences": total.sequences, "positions": total.positions, "bytes": total.bytes}
                actions = [add_action(file.shard) for file in new]
                if not new or try_commit(newest, actions, {**about, **counts}, [file.publish for file in new]):
                    break
        if new:
            _remember(newest, new)
        return total

    def stage(self) -> Commit:
        """Leave the rows as staged shards, whose rows a rewrite may add; returns what there is, with today's version.

        Raises:
            TableError: if the disk is full or the folder can't be written.
        """
        files = self._finished()
        with all_or_nothing(self._table.location), self._table.place.gate():
            self._drop_refused(files)
            files = [file for file in files if file.keys]
            for file in files:
                file.publish(staged_path(self._table, file.shard))
        return Commit(
            self._table.version,
            sum(len(file.keys) for file in files),
            sum(file.positions for file in files),
            sum(file.shard.bytes for file in files),
        )

    def _finished(self) -> list[ShardFile]:
        files = list(self._files.values())
        with all_or_nothing(self._table.location):
            for file in files:
                file.finish()
        return files

    def _drop_refused(self, files: list["ShardFile"]) -> None:
        """Drop rows of documents that were taken down since the rows were added."""
        refused = refusal(self._table.location)
        for file in files:
            file.drop({row for row in file.keys if refused(str(row[0]))})

    def _drop_committed_rows(self, files: list["ShardFile"], newest: Table) -> None:
        """Drop rows that the newest version has already."""
        own = {file.shard_path for file in files}
        for taken in _rows_sharing_keys(newest, [row for file in files for row in file.keys], own):
            for file in files:
                file.drop(taken)


def present_rows(table: Table, rows: pa.Table) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which of some rows a version of a table has.

    Args:
        table: version of the table.
        rows: R rows with the columns of ``storage.schema.ROW_KEY``.

    Returns:
        (R,) whether the version has the row, and (R,) whether it has the row's key, in any document.
    """
    wanted = row_keys(rows)
    keys = {row[-1] for row in wanted}
    found = {row for part in _rows_sharing_keys(table, wanted) for row in part if row[-1] in keys}
    found_keys = {row[-1] for row in found}
    return np.array([row in found for row in wanted], bool), np.array([row[-1] in found_keys for row in wanted], bool)


def stores_tail_codes(identity: Identity, rows: pa.Table) -> NDArray[np.bool_]:
    """(R,) which of some rows store the log-probabilities of their tails in a table with this identity."""
    if identity.tail_logprobs == "all":
        return np.ones(len(rows), np.bool_)
    stores: NDArray[np.bool_] = pc.equal(rows.column(PARTITION), "eval").to_numpy()
    return stores


def require_current_format(table: Table) -> None:
    """Refuse to add rows to a table of an older format.

    Raises:
        TableError: if it has one.
    """
    if table.format != FORMAT:
        raise TableError(
            f"this table has format {table.format}, to which no rows are added any more",
            expected=f"a table of format {FORMAT}",
            found=f"format {table.format}, which can still be read, trained on and evaluated",
            where=f"{table.location}@{table.version}",
            do=f"first change the table to format {FORMAT}, without the teacher, with\n"
            f"               softlabel reprocess {shlex.quote(table.location)}",
        )


def require_writable(location: str, *, dry_run: bool = False) -> None:
    """Write and delete a file, so that a long run fails at its start if its results can't be written.

    A dry run writes none, and only looks at the permissions of a local folder.

    Raises:
        TableError: if the place can't be written.
    """
    place = place_of(location)
    with all_or_nothing(location):
        if not dry_run:
            place.write(probe := f"{WRITING}/{uuid.uuid4().hex}", b"")
            place.delete(probe)
        elif not place.is_remote:
            require_permission(Path(place.address))


def _joined(sequences: pa.Table, labels: pa.Table) -> pa.Table:
    return pa.table([*sequences.columns, *labels.columns], [*sequences.column_names, *labels.column_names])


def _rows_sharing_keys(table: Table, rows: Iterable[RowKey], own: Container[str] = ()) -> Iterator[set[RowKey]]:
    """All rows of each shard that may share a key with these, except for the caller's own shards."""
    for shard in key_index(table.place).shards_sharing(table, (key for _, _, key in rows)):
        if shard.path not in own:
            yield {row for part in outline(table, shard, ROW_KEY) for row in row_keys(part)}


def _remember(table: Table, files: Iterable[ShardFile]) -> None:
    """Note the keys of committed shards, so that nobody has to read them for the next commit."""
    index = key_index(table.place)
    for file in files:
        index.add(file.shard, [key for _, _, key in file.keys])
    with suppress(OSError, TableError):  # the commit is made; without the file, the next process reads the shards
        index.save(table)
