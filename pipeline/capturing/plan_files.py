"""The files that a plan lies in: sequences, a file for each shard to come, and the documents that can't be used.

They are written as they come, so that memory holds a batch of documents whatever the corpus. Each file of sequences
says for what identity it was planned. Nothing here decides what is pending.
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from softlabel.pipeline.documents.documents import Reject
from softlabel.storage.committing import all_or_nothing
from softlabel.storage.errors import ProvenanceError
from softlabel.storage.identity import Identity
from softlabel.storage.places.place import REJECTS, Place

_IDENTITY = b"softlabel.identity"
_SHOWN = 5
"""Rejects that an error names."""


class PlanFiles:
    """Rows in files of at most so many captured positions (or one sequence).

    Args:
        folder: made, for the files.
        schema: of the rows.
        limit: captured positions of a file.
        identity: of the table that they are planned for.
    """

    def __init__(self, folder: Path, schema: pa.Schema, limit: int, identity: Identity) -> None:
        folder.mkdir(parents=True)
        self._schema = schema.with_metadata({_IDENTITY: identity.model_dump_json()})
        self._folder, self._limit = folder, limit
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
            self._writer.write_table(rows.slice(0, count).replace_schema_metadata(self._schema.metadata))
            self._room -= int(ends[count - 1])
            self.sequences += count
            self.positions += int(ends[count - 1])
            rows = rows.slice(count)

    def close(self) -> tuple[Path, ...]:
        """Finish the last file, and return all."""
        if self._writer is not None:
            self._writer.close()
        return tuple(self._paths)

    def _start(self) -> None:
        self.close()
        self._paths.append(self._folder / f"{len(self._paths):06}.parquet")
        self._writer = pq.ParquetWriter(self._paths[-1], self._schema)
        self._room = self._limit


def planned_identity(sequences: pa.Table) -> Identity:
    """What sequences were planned for, as they were read from their file."""
    return Identity.model_validate_json(sequences.schema.metadata[_IDENTITY])


def require_planned(sequences: pa.Table, identity: Identity, teacher: Path) -> None:
    """Refuse to run another teacher over a plan's sequences than the one that they were made for.

    Args:
        sequences: as they were read from their file.
        identity: of what is about to be captured.
        teacher: its folder.

    Raises:
        ProvenanceError: naming each field that differs.
    """
    differences = planned_identity(sequences).differences(identity)
    if differences:
        raise ProvenanceError(
            "the teacher has changed since this capture was planned; this shard was not stored",
            expected="the same files, or the same commit of a hub model, for the whole capture",
            found="\n               ".join(f"{name}: {a} then, {b} now" for name, (a, b) in differences.items()),
            where=teacher,
            do="run the same command again; to pin the commit of a hub model, set teacher.revision",
        )


class Rejects:
    """Documents that can't be used, in the order in which they were found.

    Args:
        path: of a file for them, of JSON lines.
    """

    def __init__(self, path: Path) -> None:
        self.count = 0
        self._path = path
        self._shown: list[str] = []

    def add(self, rejects: Iterable[Reject]) -> None:
        """Write them down."""
        # A file's name may be no UTF-8; what its bytes become then is what JSON calls them, too.
        with self._path.open("a", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            for reject in rejects:
                self.count += 1
                if len(self._shown) < _SHOWN:
                    self._shown.append(f"{reject.document_id}: {reject.reason}")
                print(json.dumps(reject._asdict(), ensure_ascii=False), file=file)

    @property
    def first(self) -> str:
        """The first of them."""
        return self._shown[0]

    def __str__(self) -> str:
        """The first few of them, a line each."""
        more = [f"and {self.count - _SHOWN} more"] if self.count > _SHOWN else []
        return "\n               ".join(self._shown + more)

    def publish(self, place: Place) -> str | None:
        """Put them beside a table, in the place of those of an earlier run, which are no longer true.

        Returns:
            Where they are; None if there are none.

        Raises:
            TableError: if they can't be written there.
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
