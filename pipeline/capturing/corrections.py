"""Correct a table whose documents were turned into sequences by an older version of this program.

A later version may find other tokens, or another mask, for the same document: its rows then have other keys. So the
first capture into an older table reads its documents again, without the teacher, and replaces in one commit only the
rows that differ, because those were wrong. A document that can't be used any more loses its rows.

The teacher may need hours for the right rows, and until the commit no version must have both the wrong and the right
rows of a document, or neither. So shards of right rows are only staged (``storage.staging``): any process can make
them, and a run that was killed continues with those that it finds. At the end, one rewrite adds their rows and drops
the wrong ones. Documents that are not read stay as they are: their names are kept in a file, so that the capture that
reads them corrects them, and no other document is read again.
"""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from softlabel.pipeline.capturing.job import CaptureJob
from softlabel.pipeline.capturing.plan_files import Pending
from softlabel.pipeline.digests import Digests, DigestSet, as_digests, row_digests, version_digests
from softlabel.storage.errors import TableError
from softlabel.storage.log.commit_message import CommitMessage
from softlabel.storage.log.state import Shard
from softlabel.storage.places.place import SIDE_FOLDER, Place, hash_of
from softlabel.storage.reader import outline
from softlabel.storage.schema import ROW_KEY
from softlabel.storage.staging import staged_shards
from softlabel.storage.table import Table
from softlabel.storage.upkeep.rewrite import ConflictError, rewrite
from softlabel.storage.upkeep.rewrite_plan import Rewriting

READING = 5
"""Version of how documents become sequences. It is no part of the identity, because most rows are the same in all
versions. A commit records it if all documents of the table were read in this way, except for those in a file ..."""
UNREAD_FOLDER = f"{SIDE_FOLDER}/unread"
"""... of this folder, whose name the commit records, too."""
_RECENT = 16
"""Commits that a commit looks at for what it records."""
_WIDTH = 32
"""Bytes of a version of a document: the hashes of its name and its content."""


@dataclass(frozen=True, kw_only=True)
class Corrections(Pending):
    """What has to be done about documents that were read again; all rows are staged."""

    notes: Path
    """File from ``Reread.save``, for ``replace_rows``."""


def about_reading(table: Table) -> dict[str, object]:
    """What a commit of right rows to a table records about how its documents were read."""
    if not table.shards():
        return {"reading": READING}
    # Only from a recent commit: it saves later captures from reading the whole history, and nothing depends on it.
    message = next(_messages(table, _RECENT), None)
    return {} if message is None else message.model_dump(include={"reading", "unread"}, exclude_none=True)


def unread(table: Table, versions: Iterable[Digests]) -> DigestSet:
    """The documents of a table that were last read by an older version.

    Args:
        table: the newest version.
        versions: digests of all documents in the table, needed if it was never corrected.
    """
    found = DigestSet()
    message = next(_messages(table), None)
    listed = None if message is None else _read_unread(table.place, message.unread)
    for part in versions if listed is None else [listed]:
        found.add(part)
    return found


def _messages(table: Table, limit: int | None = None) -> Iterator[CommitMessage]:
    """What commits (the newest ones, up to a limit) record about this version of reading, newest first."""
    messages = (CommitMessage.of(commit, table.location) for commit in islice(table.commits(), limit))
    return (message for message in messages if message.reading >= READING)


class Reread:
    """Compares the rows of documents that are read again with those in the table.

    Args:
        versions: (n,) digest of the document of each row in the table ...
        rows: ... and that of the row.
        unread: the documents to read again.
    """

    def __init__(self, versions: Digests, rows: Digests, unread: DigestSet) -> None:
        self._unread = unread
        chosen = unread.has(versions)
        order = np.argsort(versions[chosen], kind="stable")
        self._versions, self._rows = versions[chosen][order], rows[chosen][order]
        self._read, self._wrong, self._right = list[Digests](), list[Digests](), list[Digests]()
        self.documents = 0
        """Documents that were read again."""
        self.wrong = 0
        """Rows of these documents in the table that they should not have."""
        self.withdrawn = 0
        """Documents with wrong rows for which there are no right ones."""

    def includes(self, versions: Digests) -> NDArray[np.bool_]:
        """Which of these documents are to be read again."""
        return self._unread.has(versions)

    def compare(self, documents: pa.Table, sequences: pa.Table) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Note which rows of these documents are wrong.

        Args:
            documents: documents that were read.
            sequences: all their sequences.

        Returns:
            Which documents have wrong rows in the table, and which of the sequences belong to these documents.
        """
        versions = version_digests(documents)
        read = versions[self._unread.has(versions)]
        self._read.append(read)
        self.documents += len(read)
        first, end = (np.searchsorted(self._versions, versions, side) for side in ("left", "right"))
        which = np.repeat(np.arange(len(versions)), end - first)
        stored = self._rows[np.repeat(first, end - first) + _within(end - first)]
        right, owners = DigestSet(), DigestSet()
        rows = row_digests(sequences)
        right.add(rows)
        wrong = ~right.has(stored)
        are_wrong = np.bincount(which[wrong], minlength=len(versions)) > 0
        owners.add(versions[are_wrong])
        corrected = owners.has(version_digests(sequences))
        self._wrong.append(stored[wrong])
        self.wrong += int(wrong.sum())
        self._right.append(rows[corrected])
        self.withdrawn += int(are_wrong.sum()) - len(np.unique(version_digests(sequences)[corrected]))
        return are_wrong, corrected

    def save(self, path: Path) -> Path:
        """Write all to a file for ``replace_rows``."""
        with path.open("wb") as file:
            read, wrong, right = map(np.concatenate, (self._read, self._wrong, self._right))
            np.savez(file, read=read, wrong=wrong, right=right)
        return path


def _within(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """0, 1, ... within each group, for groups of these sizes."""
    return np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)


def staged_rows(table: Table) -> tuple[DigestSet, DigestSet]:
    """Rows and keys that an earlier run has staged."""
    rows, keys = DigestSet(), DigestSet()
    for shard in staged_shards(table):
        for part in outline(table, shard, ROW_KEY):
            rows.add(row_digests(part))
            keys.add(as_digests(part.column("key")))
    return rows, keys


def replace_rows(job: CaptureJob, notes: Path) -> int:
    """Replace the wrong rows of documents that were read again, in one commit; returns the number of wrong rows.

    Args:
        job: the capture.
        notes: file from ``Reread.save``. All right rows must be in the table or staged.

    Raises:
        TableError: if the table can't be written, or another process has deleted staged shards.
    """
    read, wrong, right = DigestSet(), DigestSet(), DigestSet()
    with np.load(notes) as saved:
        for found, name in ((read, "read"), (wrong, "wrong"), (right, "right")):
            found.add(saved[name])
        wanted = saved["right"]
    while True:
        table = Table.open(job.table)
        staged = {shard: _rows_of(table, shard) for shard in staged_shards(table)}
        staged = {shard: rows for shard, rows in staged.items() if right.has(rows).any()}
        _require_all(table, wanted, staged)
        rewriting = Rewriting(
            table,
            table,
            job.settings.shards.positions,
            job.settings.shards.row_group_sequences,
            keep=lambda rows: ~wrong.has(row_digests(rows)),
            columns=ROW_KEY,
            staged=tuple(staged),
            add=lambda rows: right.has(row_digests(rows)),
            exclusive=True,
        )
        entry = {"operation": "replace", **(_made_by(job) if staged else {}), **_record(table, read)}
        try:
            dropped = rewrite(rewriting, entry, always=True).dropped
        except ConflictError:
            continue
        _tidy(table.place, entry.get("unread"), [shard for shard, rows in staged.items() if right.has(rows).all()])
        return dropped


def _rows_of(table: Table, shard: Shard) -> Digests:
    return np.concatenate([row_digests(part) for part in outline(table, shard, ROW_KEY)])


def _require_all(table: Table, wanted: Digests, staged: dict[Shard, Digests]) -> None:
    """Require that each wanted row is in the table or staged, so that no document is left without its rows."""
    found = DigestSet()
    for rows in [*staged.values(), *(_rows_of(table, shard) for shard in table.shards())]:
        found.add(rows)
    if missing := int((~found.has(wanted)).sum()):
        raise TableError(
            f"{missing} sequences that were to replace wrong ones are gone; the table is unchanged",
            expected="the shards that this capture has staged",
            found="another process has changed the table, or deleted them",
            where=table.location,
            do="run the same command again",
        )


def _made_by(job: CaptureJob) -> dict[str, object]:
    """The teacher of the right rows."""
    return {
        "teacher": job.teacher,
        "revision": job.checkpoint.revision,
        "config": job.settings.model_dump(mode="json"),
    }


def _record(table: Table, read: DigestSet) -> dict[str, object]:
    """What the commit records about reading, after these documents were read again."""
    columns = ["document_id", "fingerprint"]
    parts = [version_digests(part) for shard in table.shards() for part in outline(table, shard, columns)]
    held = np.unique(np.concatenate(parts)) if parts else np.zeros(0, f"S{_WIDTH}")
    left = held[unread(table, parts).has(held) & ~read.has(held)]
    if not len(left):
        return {"reading": READING}
    content = left.tobytes()
    table.place.write(f"{UNREAD_FOLDER}/{hash_of(content)}", content)
    return {"reading": READING, "unread": hash_of(content)}


def _read_unread(place: Place, name: str | None) -> Digests | None:
    """The documents in a file; None if it is missing or damaged, so that all documents have to be read again."""
    if name is None:
        return np.zeros(0, f"S{_WIDTH}")
    try:
        content = place.read(f"{UNREAD_FOLDER}/{name}")
    except FileNotFoundError:
        return None
    return np.frombuffer(content, f"S{_WIDTH}") if hash_of(content) == name else None


def _tidy(place: Place, current: object, staged: Iterable[Shard]) -> None:
    """Delete files that the commit has made superfluous; if this process is killed before, ``maintain`` does so."""
    with suppress(OSError, TableError):
        for file in list(place.files(UNREAD_FOLDER)):
            if file.name != f"{UNREAD_FOLDER}/{current}":
                place.delete(file.name)
        for shard in staged:
            place.delete(shard.path)
