"""Commits: add and remove shards, and possibly change the table's identity, in one atomic step.

delta-rs commits changes of shards. It can't change a table's properties and its shards in one commit, so this module
writes such a commit itself, as the Delta protocol specifies: as a file that must not exist yet.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeAlias

from deltalake import DeltaTable
from deltalake.exceptions import CommitFailedError, DeltaError
from deltalake.transaction import AddAction, CommitProperties, RemoveAction

from softlabel.storage.commit_message import COMMIT_MESSAGE
from softlabel.storage.errors import TableError, cause
from softlabel.storage.identity import Identity
from softlabel.storage.log_files import commit_file
from softlabel.storage.places.place import hash_of
from softlabel.storage.schema import PARTITION
from softlabel.storage.shard_file import shard_of
from softlabel.storage.table import Table

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
    identity: Identity | None = None,
) -> bool:
    """Try to commit on top of ``newest``; returns False if another commit came first.

    Args:
        newest: the newest version of the table that the caller has seen.
        actions: shards to add and to remove, all of them or none.
        about: metadata for the table's history.
        publications: functions that give the new shards their final names, or check that the files still exist.
        identity: the table's new identity, if it changes.
    """
    for publish in publications:
        publish()
    after = {shard.path: shard for shard in newest.shards()}
    for action in actions:
        if isinstance(action, AddAction):
            after[action.path] = shard_of(action)
        else:
            after.pop(action.path)
    properties = newest.properties(identity)
    message = {
        **about,
        "state": newest.state(newest.version + 1, after.values(), properties),
        "previous": hash_of(newest.place.read(commit_file(newest.version))),
    }
    if identity is None:
        first = _commit_shards(newest, actions, message)
    else:
        first = _commit_properties(newest, actions, message, properties)
    if not first:
        return False
    newest.place.sync(commit_file(newest.version + 1))
    # Where there are no locks, maintenance may have deleted a file as an old leftover with the same name and content.
    for publish in publications:
        publish()
    return True


def _commit_shards(newest: Table, actions: Sequence[Action], message: Mapping[str, Any]) -> bool:
    delta = DeltaTable(newest.location, version=newest.version)
    # No retries inside delta-rs: the caller has to check first what the other commit has changed.
    properties = CommitProperties(custom_metadata={COMMIT_MESSAGE: message}, max_commit_retries=0)
    try:
        delta.create_write_transaction(
            list(actions), "append", delta.schema(), [PARTITION], commit_properties=properties
        )
    except CommitFailedError:
        if newest.newest().version == newest.version:
            raise
        return False
    return True


def _commit_properties(
    newest: Table, actions: Sequence[Action], message: Mapping[str, Any], properties: Mapping[str, str]
) -> bool:
    """A commit with other properties, as https://github.com/delta-io/delta/blob/master/PROTOCOL.md#actions has it."""
    delta = DeltaTable(newest.location, version=newest.version)
    known, moment = delta.metadata(), int(time.time() * 1000)
    metadata = {
        "id": known.id,
        "format": {"provider": "parquet", "options": {}},
        "schemaString": delta.schema().to_json(),
        "partitionColumns": known.partition_columns,
        "configuration": dict(properties),
        "createdTime": known.created_time,
    }
    info = {"timestamp": moment, "operation": "SET TBLPROPERTIES", "operationParameters": {}, COMMIT_MESSAGE: message}
    lines = [{"commitInfo": info}, {"metaData": metadata}, *map(_line, actions)]
    content, name = "\n".join(json.dumps(line) for line in lines).encode(), commit_file(newest.version + 1)
    try:
        newest.place.write(name, content, replace=False)
    except FileExistsError:  # the client may have sent the request twice, because the first answer was lost
        with suppress(FileNotFoundError):  # another process is about to write it
            return newest.place.read(name) == content
        return False
    return True


def _line(action: Action) -> dict[str, Any]:
    about = {"path": action.path, "partitionValues": action.partition_values, "size": action.size}
    if isinstance(action, AddAction):
        added = {"modificationTime": action.modification_time, "dataChange": True, "stats": action.stats}
        return {"add": {**about, **added}}
    gone = {"deletionTimestamp": action.deletion_timestamp, "dataChange": True, "extendedFileMetadata": True}
    return {"remove": {**about, **gone}}
