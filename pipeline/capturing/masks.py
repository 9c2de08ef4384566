"""Correct a table of chats whose masks were found by an older version of this program.

A later version may find another mask for a chat, whose rows then have other keys. So the first capture into an older
table reads all its documents again, without the teacher, captures the rows that are missing, and then removes, in one
commit, the rows that none of the documents read has any more. Rows of documents that are not read stay as they are.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from softlabel.pipeline.capturing.job import CaptureJob
from softlabel.pipeline.digests import Digests, DigestSet, as_digests, digests, side_by_side
from softlabel.storage.commit_message import COMMIT_MESSAGE
from softlabel.storage.reader import outline
from softlabel.storage.table import Table
from softlabel.storage.upkeep.rewrite import rewrite
from softlabel.storage.upkeep.rewrite_plan import Rewriting

MASKS = 2
"""Version of how masks of chats are found. Commits to a table whose masks are all of this version record it. It is no
part of the identity, because most masks are the same in all versions."""
_NAME = "masks"


def are_current(table: Table) -> bool:
    """Whether all masks of a table of chats were found by this version."""
    commits = (commit.get(COMMIT_MESSAGE, {}) for commit in table.history())
    return not table.shards() or any(commit.get(_NAME, 1) >= MASKS for commit in commits)


def about_masks(job: CaptureJob, table: Table) -> dict[str, int]:
    """What a commit to this table records about masks."""
    return {_NAME: MASKS} if job.settings.columns.content != "text" and are_current(table) else {}


class Reread:
    """What documents that are read again have now."""

    def __init__(self) -> None:
        self._names, self._versions, self._rows = list[Digests](), list[Digests](), list[Digests]()

    def add(self, documents: pa.Table, sequences: pa.Table) -> None:
        """Add documents and all their sequences."""
        self._names.append(_names(documents))
        self._versions.append(_versions(documents))
        self._rows.append(_rows(sequences))

    def save(self, path: Path) -> Path:
        """Write all to a file for ``replace_rows``."""
        with path.open("wb") as file:
            names, versions, rows = map(np.concatenate, (self._names, self._versions, self._rows))
            np.savez(file, names=names, versions=versions, rows=rows)
        return path


def replace_rows(job: CaptureJob, path: Path) -> int:
    """Remove rows of documents that were read again and do not have them any more; returns their number.

    Args:
        job: the capture.
        path: file from ``Reread.save``. All rows that the documents have now must be in the table.

    Raises:
        TableError: if the table can't be written, or another process has removed some of its shards meanwhile.
    """
    table = Table.open(job.table)
    versions, rows, names = DigestSet(), DigestSet(), DigestSet()
    with np.load(path) as saved:
        versions.add(saved["versions"])
        rows.add(saved["rows"])
        names.add(saved["names"])

    def keep(each: pa.Table) -> NDArray[np.bool_]:
        kept: NDArray[np.bool_] = ~versions.has(_versions(each)) | rows.has(_rows(each))
        return kept

    held = (part for shard in table.shards() for part in outline(table, shard, ["document_id"]))
    everything = all(names.has(_names(part)).all() for part in held)
    entry = {"operation": "replace"} | ({_NAME: MASKS} if everything else {})
    shards = job.settings.shards
    columns = ("document_id", "fingerprint", "chunk", "key")
    layout = shards.positions, shards.row_group_sequences
    rewriting = Rewriting(table, table, *layout, keep=keep, columns=columns)
    return rewrite(rewriting, entry, always=everything).dropped


def _names(rows: pa.Table) -> Digests:
    return digests(rows.column("document_id").to_pylist())


def _versions(rows: pa.Table) -> Digests:
    return side_by_side(_names(rows), as_digests(rows.column("fingerprint")))


def _rows(rows: pa.Table) -> Digests:
    return side_by_side(_names(rows), rows.column("chunk").to_numpy(), as_digests(rows.column("key")))
