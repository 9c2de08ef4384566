"""Commits: shards come and go, and the table's identity may change, all at once or not at all.

Shards alone are committed by delta-rs. It has no commit that changes a table's properties together with its shards, so
that one is written here, as the protocol has it: a file that must not be there yet.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeAlias

from deltalake import DeltaTable
from deltalake.exceptions import CommitFailedError, DeltaError
from deltalake.transaction import AddAction, CommitProperties, RemoveAction

from softlabel.storage.commit_files import commit_file
from softlabel.storage.errors import TableError, cause
from softlabel.storage.identity import Identity
from softlabel.storage.places.place import hash_of
from softlabel.storage.schema import PARTITION
from softlabel.storage.shard_file import shard_of
from softlabel.storage.state import COMMIT_MESSAGE
from softlabel.storage.table import Table

Action: TypeAlias = AddAction | RemoveAction


@contextmanager
def all_or_nothing(location: str) -> Iterator[None]:
    """Say of whatever stops a change of a table, up to its commit, that nothing has changed.

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
            do="free disk space or fix the permissions, then run the same command again",
        ) from error


def committed(
    newest: Table,
    actions: Sequence[Action],
    about: Mapping[str, Any],
    publications: Sequence[Callable[[], None]] = (),
    identity: Identity | None = None,
) -> bool:
    """Try to commit on top of ``newest``; False if another commit came first.

    Args:
        newest: the newest version of the table as far as the caller has seen it.
        actions: shards that come and shards that go, all of them or none.
        about: what the table's history is to say of it.
        publications: give the new shards their names, or see that they have them still.
        identity: the table's from now on, if that changes.
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
    says = {
        **about,
        "state": newest.state(newest.version + 1, after.values(), properties),
        "previous": hash_of(newest.place.read(commit_file(newest.version))),
    }
    if identity is None:
        first = _commit_shards(newest, actions, says)
    else:
        first = _commit_properties(newest, actions, says, properties)
    if not first:
        return False
    newest.place.settle(commit_file(newest.version + 1))
    # Where nothing is locked, maintenance may have taken one for an old leftover with the same name and content.
    for publish in publications:
        publish()
    return True


def _commit_shards(newest: Table, actions: Sequence[Action], says: Mapping[str, Any]) -> bool:
    delta = DeltaTable(newest.location, version=newest.version)
    # No retries inside delta-rs: the caller has to see first what another commit has changed.
    message = CommitProperties(custom_metadata={COMMIT_MESSAGE: says}, max_commit_retries=0)
    try:
        delta.create_write_transaction(list(actions), "append", delta.schema(), [PARTITION], commit_properties=message)
    except CommitFailedError:
        if newest.newest().version == newest.version:
            raise
        return False
    return True


def _commit_properties(
    newest: Table, actions: Sequence[Action], says: Mapping[str, Any], properties: Mapping[str, str]
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
    info = {"timestamp": moment, "operation": "SET TBLPROPERTIES", "operationParameters": {}, COMMIT_MESSAGE: says}
    lines = [{"commitInfo": info}, {"metaData": metadata}, *map(_line, actions)]
    content, name = "\n".join(json.dumps(line) for line in lines).encode(), commit_file(newest.version + 1)
    try:
        newest.place.write(name, content, replace=False)
    except FileExistsError:  # a store's client may have asked twice, its first answer lost
        with suppress(FileNotFoundError):  # another is about to put it there
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
