"""The files of a table's log: lists commits and checkpoints, reads and writes commits, and detects missing ones."""

import json
import re
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from softlabel.storage.errors import IntegrityError
from softlabel.storage.identity import circumstances
from softlabel.storage.log.commit_message import COMMIT_MESSAGE
from softlabel.storage.places.place import Place, hash_of
from softlabel.storage.schema import PARTITION

LOG = "_delta_log"
"""Folder of the commits."""
LARGEST_COMMIT = 1 << 30
"""Bytes of a commit; a larger one is not read."""
LARGEST_LINE = 1 << 24
"""Bytes of a line of a commit."""
FORMAT_PROPERTY = "softlabel.format"
"""The table's property with the version of the layout of its rows."""
_NO_HASH = "0" * 32
"""Stands in a commit for its hash while the hash is computed."""
_COMMIT = re.compile(rf"{LOG}/(\d{{20}})\.json")
_CHECKPOINT = re.compile(rf"{LOG}/(\d{{20}})\.checkpoint\.(?:\d{{10}}\.\d{{10}}\.)?parquet")
_ANY = re.compile(rf"{LOG}/\d{{20}}\.(json|checkpoint\..*)")


def exists(place: Place) -> bool:
    """Whether the place has a Delta log."""
    return any(_ANY.fullmatch(file.name) for file in place.files(LOG))


def list_log(place: Place, start: int = 0) -> tuple[set[int], dict[int, list[str]]]:
    """Versions whose commit files exist, and the files of each checkpoint by version, from a version on.

    A checkpoint describes a version without the commits before it.
    """
    commits, checkpoints = set[int](), dict[int, list[str]]()
    for file in place.files(LOG, after=f"{LOG}/{start:020}"):
        if match := _COMMIT.fullmatch(file.name):
            commits.add(int(match[1]))
        elif match := _CHECKPOINT.fullmatch(file.name):
            checkpoints.setdefault(int(match[1]), []).append(file.name)
    return commits, {version: sorted(names) for version, names in checkpoints.items()}


def commits(place: Place) -> set[int]:
    """Versions whose commit files exist."""
    return list_log(place)[0]


def commit_file(version: int) -> str:
    """Name of the commit file of a version."""
    return f"{LOG}/{version:020}.json"


def read_commit(place: Place, version: int) -> list[dict[str, Any]]:
    """The lines of a commit.

    Raises:
        IntegrityError: if it is missing or invalid.
    """
    try:
        return lines_of(read_bytes(place, version))
    except (OSError, ValueError) as error:
        raise unreadable_commit(place, version, error) from error


def write_commit(
    place: Place, version: int, operation: str, message: Mapping[str, Any], actions: Iterable[Mapping[str, Any]]
) -> bool:
    """Write a commit, durably; returns False if another commit has this version already.

    Args:
        place: place of the table.
        version: version that the commit makes.
        operation: Delta's name for what it does.
        message: softlabel's own metadata; its circumstances, if any, add to those of this process.
        actions: the other lines, as https://github.com/delta-io/delta/blob/master/PROTOCOL.md#actions has them.

    Raises:
        OSError: if it can't be written; then there is no such commit.
        ValueError: if a line is too long to be read again.
    """
    info = {"timestamp": int(time.time() * 1000), "operation": operation, "operationParameters": {}}
    around = circumstances() | message.get("circumstances", {})
    lines = [{"commitInfo": {**info, COMMIT_MESSAGE: {"hash": _NO_HASH, **message, "circumstances": around}}}, *actions]
    content, name = "\n".join(json.dumps(line, separators=(",", ":")) for line in lines).encode(), commit_file(version)
    content = content.replace(_NO_HASH.encode(), hash_of(content).encode(), 1)
    lines_of(content)
    try:
        place.write(name, content, replace=False)
    except FileExistsError:  # the client may have sent the request twice, because the first answer was lost
        with suppress(FileNotFoundError):  # another process is about to write it
            return read_bytes(place, version) == content
        return False
    return True


def metadata_line(table: str, created: int, schema: str, properties: Mapping[str, str]) -> dict[str, Any]:
    """The line of a commit that defines the table's columns and properties.

    Args:
        table: Delta's id of the table.
        created: when the table was made, in milliseconds.
        schema: columns of the table, as Delta's JSON.
        properties: properties of the table.
    """
    return {
        "metaData": {
            "id": table,
            "format": {"provider": "parquet", "options": {}},
            "schemaString": schema,
            "partitionColumns": [PARTITION],
            "configuration": dict(properties),
            "createdTime": created,
        }
    }


def last_metadata_commit(place: Place, version: int) -> int:
    """The last commit up to a version that contains the table's metadata: its properties and columns.

    Raises:
        IntegrityError: if a commit is missing or invalid.
    """
    return next(n for n in range(version, -1, -1) if not n or any("metaData" in line for line in read_commit(place, n)))


def lines_of(content: bytes) -> list[dict[str, Any]]:
    """The lines of a commit, given its bytes.

    Raises:
        ValueError: if they are not a commit.
    """
    lines = content.splitlines()
    if max(map(len, lines), default=0) > LARGEST_LINE:
        raise ValueError(f"a line is longer than {LARGEST_LINE:,} bytes")
    try:
        actions = [json.loads(line) for line in lines]
    except RecursionError as error:
        raise ValueError("a line is nested too deeply") from error
    if not actions:
        raise ValueError("the commit is empty, possibly after a power cut")
    if not all(isinstance(action, dict) for action in actions):
        raise ValueError("a line is not a JSON object")
    return actions


def matches_its_hash(content: bytes, message: Mapping[str, Any], metadata: Mapping[str, Any]) -> bool:
    """Whether a commit's bytes are those that were written.

    Args:
        content: the commit's bytes.
        message: softlabel's metadata in it.
        metadata: Delta's metadata of the version, if it is known. In format 1, a commit without a hash may be that of
            an earlier version of softlabel; then nothing is known.
    """
    found = message.get("hash")
    if found is None:
        return "state" not in message or bool(metadata.get("configuration", {}).get(FORMAT_PROPERTY, "1") == "1")
    return bool(hash_of(content.replace(str(found).encode(), _NO_HASH.encode(), 1)) == found)


def read_bytes(place: Place, version: int) -> bytes:
    """The bytes of a commit.

    Raises:
        OSError: if they can't be read, or are too many for a commit.
    """
    return place.read(commit_file(version), LARGEST_COMMIT)


def unreadable_commit(place: Place, version: int, found: Exception) -> IntegrityError:
    """The error for a commit that can't be read."""
    return IntegrityError(
        "the table's log can't be read",
        found=repr(found),
        where=place.where(commit_file(version)),
        do="restore this file from a copy of the table; or, if it is empty and the newest, delete it and capture again",
    )


def require_no_remains(place: Place) -> None:
    """Refuse to create a table where an old table's shards are: maintenance would delete them as leftovers.

    Raises:
        IntegrityError: if there are shards but no log.
    """
    files = {file.name for file in place.files()}
    shards = sorted(name for name in files if name.startswith(f"{PARTITION}=") and name.endswith(".parquet"))
    if shards and not any(map(_ANY.fullmatch, files)):
        raise IntegrityError(
            "there are shards here, but the log of the table that they belong to is missing",
            expected=f"their log, {LOG}; or a folder without shards",
            found=f"{len(shards)} shards, for example {shards[0]}",
            where=place.where(""),
            do=f"restore {LOG} from a copy of the table, or make the new table elsewhere",
        )
