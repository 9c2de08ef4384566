"""Commits: add and remove shards, and possibly change the table's identity, in one atomic step.

A commit is written as the Delta protocol specifies: as a file that must not exist yet. delta-rs would do the same, but
its files are not durable, and it can't change a table's properties and its shards in one commit.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeAlias

from deltalake.exceptions import DeltaError
from deltalake.transaction import AddAction, RemoveAction

from softlabel.storage.errors import TableError, cause
from softlabel.storage.log.checkpoints import VERSIONS_PER_CHECKPOINT, write_checkpoint
from softlabel.storage.log.files import write_commit
from softlabel.storage.shard_file import shard_of
from softlabel.storage.table import Change, Table

Action: TypeAlias = AddAction | RemoveAction


@contextmanager
def all_or_nothing(location: str) -> Iterator[None]:
    """Turn errors before a commit into one error which says that the table is unchanged.

    Raises:
        TableError: if the disk is full or the folder can't be written.
    """
    try:
        yield
    except (OSError, DeltaError) as error:
        raise TableError(
            "the table could not be written; it is unchanged",
            expected="write permission for the folder, and free disk space",
            found=cause(error),
            where=location,
            do="check the path, the permissions and the free disk space, then run the same command again",
        ) from error


def try_commit(
    newest: Table,
    actions: Sequence[Action],
    about: Mapping[str, Any],
    publications: Sequence[Callable[[], None]] = (),
    change: Change | None = None,
) -> bool:
    """Try to commit on top of ``newest``; returns False if another commit came first.

    Args:
        newest: the newest version of the table that the caller has seen.
        actions: shards to add and to remove, all of them or none.
        about: metadata for the table's history.
        publications: functions that give the new shards their final names, or check that the files still exist.
        change: new properties of the table, if they change.
    """
    for publish in publications:
        publish()
    added = [shard_of(action) for action in actions if isinstance(action, AddAction)]
    removed = [action.path for action in actions if isinstance(action, RemoveAction)]
    hashes, lines = newest.next_commit(added, removed, change)
    operation = "WRITE" if change is None else "SET TBLPROPERTIES"
    lines += map(_line, actions)
    if not write_commit(newest.place, newest.version + 1, operation, {**about, **hashes}, lines):
        return False
    # Where there are no locks, maintenance may have deleted a file as an old leftover with the same name and content.
    for publish in publications:
        publish()
    if (newest.version + 2) % VERSIONS_PER_CHECKPOINT == 0:
        with suppress(OSError, DeltaError):  # the commit is made, and without a checkpoint it only takes longer to read
            write_checkpoint(newest.place, newest.version + 1)
    return True


def _line(action: Action) -> dict[str, Any]:
    about = {"path": action.path, "partitionValues": action.partition_values, "size": action.size}
    if isinstance(action, AddAction):
        added = {"modificationTime": action.modification_time, "dataChange": True, "stats": action.stats}
        return {"add": {**about, **added}}
    gone = {"deletionTimestamp": action.deletion_timestamp, "dataChange": True, "extendedFileMetadata": True}
    return {"remove": {**about, **gone}}
