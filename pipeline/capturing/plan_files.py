"""The files of a plan: sequences, one file for each future shard, and the documents that can't be used.

Files are written batch by batch, so that memory use does not grow with the corpus. Nothing here decides what is
pending.
"""

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from softlabel.pipeline.documents.documents import Reject
from softlabel.storage.committing import all_or_nothing
from softlabel.storage.errors import printable
from softlabel.storage.places.place import REJECTS, Place

_SHOWN = 5
"""Rejects that an error message lists."""


@dataclass(frozen=True, kw_only=True)
class Pending:
    """Pending sequences, as Parquet files of ``storage.schema.SEQUENCE`` and the carried columns."""

    shards: tuple[Path, ...]
    """Sequences that the teacher has to run over, one file per shard; no key is in them twice."""
    copies: tuple[Path, ...]
    """Sequences that another document has too; their soft labels are copied once the shards are finished."""
    sequences: int
    """Number of sequences in ``shards``."""
    positions: int
    """Captured positions of ``shards``."""
    copied: int
    """Number of sequences in ``copies``."""
    folder: Path
    """Folder of the plan's files."""


class PlanFiles:
    """Writes rows into files with a limited number of captured positions each.

    Args:
        folder: for the files; is created.
        schema: of the rows.
        limit: most captured positions of a file; only a single longer sequence exceeds it.
    """

    def __init__(self, folder: Path, schema: pa.Schema, limit: int) -> None:
        folder.mkdir(parents=True)
        self._folder, self._schema, self._limit = folder, schema, limit
        self._paths: list[Path] = []
        self._writer: pq.ParquetWriter | None = None
        self._room = 0
        self.sequences = self.positions = 0

    def add(self, rows: pa.Table) -> None:
        """Write rows, into as many files as they need."""
        while len(rows):
            ends = np.cumsum(rows.column("positions").to_numpy())
            count = int(np.searchsorted(ends, self._room, side="right"))
            if not count:
                self._start()
                count = max(1, int(np.searchsorted(ends, self._limit, side="right")))
            assert self._writer is not None
            self._writer.write_table(rows.slice(0, count))
            self._room -= int(ends[count - 1])
            self.sequences += count
            self.positions += int(ends[count - 1])
            rows = rows.slice(count)

    def close(self) -> tuple[Path, ...]:
        """Finish the last file, and return the paths of all files."""
        if self._writer is not None:
            self._writer.close()
        return tuple(self._paths)

    def _start(self) -> None:
        self.close()
        self._paths.append(self._folder / f"{len(self._paths):06}.parquet")
        self._writer = pq.ParquetWriter(self._paths[-1], self._schema)
        self._room = self._limit


class PendingFiles:
    """The files of pending sequences: ``shards/`` and ``copies/`` in a folder."""

    def __init__(self, folder: Path, schema: pa.Schema, limit: int) -> None:
        self._folder = folder
        self._shards, self._copies = (PlanFiles(folder / name, schema, limit) for name in ("shards", "copies"))

    def add(self, sequences: pa.Table, statuses: pa.Array) -> None:
        """Write the sequences whose status is "pending" or "copy"."""
        self._shards.add(sequences.filter(pc.equal(statuses, "pending")))
        self._copies.add(sequences.filter(pc.equal(statuses, "copy")))

    @property
    def positions(self) -> int:
        """Captured positions of the sequences that the teacher has to run over."""
        return self._shards.positions

    def close(self) -> Pending:
        """Finish the files."""
        return Pending(
            shards=self._shards.close(),
            copies=self._copies.close(),
            sequences=self._shards.sequences,
            positions=self._shards.positions,
            copied=self._copies.sequences,
            folder=self._folder,
        )


class Rejects:
    """Collects documents that can't be used in a file, in order.

    Args:
        path: file of JSON lines to write.
    """

    def __init__(self, path: Path) -> None:
        self.count = 0
        self._path = path
        self._shown: list[str] = []

    def add(self, rejects: Iterable[Reject]) -> None:
        """Append rejects to the file."""
        # The name of a text file may not be valid UTF-8; its bytes are then written as JSON escapes.
        with self._path.open("a", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            for reject in rejects:
                self.count += 1
                if len(self._shown) < _SHOWN:
                    self._shown.append(printable(f"{reject.document_id}: {reject.reason}"))
                print(json.dumps(reject._asdict(), ensure_ascii=False), file=file)

    @property
    def shown(self) -> tuple[str, ...]:
        """The first few rejects, each with its reason."""
        return tuple(self._shown)

    @property
    def first(self) -> str:
        """The first reject, with its reason."""
        return self._shown[0]

    def __str__(self) -> str:
        """The first few rejects, one per line."""
        more = [f"and {self.count - _SHOWN} more"] if self.count > _SHOWN else []
        return "\n               ".join(self._shown + more)

    def publish(self, place: Place) -> str | None:
        """Put the file into the table's folder, in place of the file of an earlier run.

        Returns:
            Location of the file; None if there are no rejects.

        Raises:
            TableError: if the file can't be written there.
        """
        with all_or_nothing(place.address):
            if not self.count:
                place.delete(REJECTS)
                return None
            draft = place.draft()
            try:
                with self._path.open("rb") as file:
                    shutil.copyfileobj(file, draft.file)
                draft.file.flush()
                draft.publish(REJECTS)
            finally:
                draft.discard()
        return place.where(REJECTS)
