"""The files of a table's log: which commits there are, what lines they have, and whether any can be missing."""

import json
import re
from contextlib import suppress
from typing import Any

from softlabel.storage.errors import IntegrityError
from softlabel.storage.places.place import Place
from softlabel.storage.schema import PARTITION

LOG = "_delta_log"
"""Folder of the commits."""
_COMMIT = re.compile(rf"{LOG}/(\d{{20}})\.json")
_CHECKPOINT = re.compile(rf"{LOG}/(\d{{20}})\.checkpoint\..*")
_ANY = re.compile(rf"{LOG}/\d{{20}}\.(json|checkpoint\..*)")


def exists(place: Place) -> bool:
    """Whether there is a log."""
    return any(_ANY.fullmatch(file.name) for file in place.files(LOG))


def commits(place: Place) -> set[int]:
    """Versions whose commits are there."""
    names = (_COMMIT.fullmatch(file.name) for file in place.files(LOG))
    return {int(match[1]) for match in names if match}


def checkpoints(place: Place) -> dict[int, str]:
    """Files that say what a version is without the commits before it, by version."""
    names = (_CHECKPOINT.fullmatch(file.name) for file in place.files(LOG))
    return {int(match[1]): match[0] for match in names if match}


def commit_file(version: int) -> str:
    """Where the commit that made a version is."""
    return f"{LOG}/{version:020}.json"


def read_commit(place: Place, version: int) -> list[dict[str, Any]]:
    """The lines of a commit.

    Raises:
        IntegrityError: if it is missing, or no commit.
    """
    try:
        return lines_of(place.read(commit_file(version)))
    except (OSError, ValueError) as error:
        raise unreadable(place, version, error) from error


def described_by(place: Place, version: int) -> int:
    """The last commit up to a version that says what table it is, by its properties and columns.

    Raises:
        IntegrityError: if a commit is missing, or no commit.
    """
    return next(n for n in range(version, -1, -1) if not n or any("metaData" in line for line in read_commit(place, n)))


def lines_of(content: bytes) -> list[dict[str, Any]]:
    """The lines of a commit, given its bytes.

    Raises:
        ValueError: if it is no commit.
    """
    actions = [json.loads(line) for line in content.splitlines()]
    if not actions:
        raise ValueError("the commit is empty, possibly after a power cut")
    return actions


def unreadable(place: Place, version: int, found: Exception) -> IntegrityError:
    """The error that names a commit."""
    return IntegrityError(
        "the table's log can't be read",
        found=repr(found),
        where=place.where(commit_file(version)),
        do="restore this file from a copy of the table",
    )


def require_whole(place: Place, version: int) -> None:
    """Refuse a version whose commit a power cut has left empty: to delta-rs, that says that nothing has changed.

    Raises:
        IntegrityError: naming it.
    """
    with suppress(FileNotFoundError):  # of commits before a checkpoint
        if place.stat(commit_file(version)).bytes == 0:
            raise IntegrityError(
                "the table's log can't be read: a commit file is empty, possibly after a power cut",
                where=place.where(commit_file(version)),
                do="restore this file from a copy of the table; or, if it is the newest, delete it and capture again",
            )


def require_no_remains(place: Place) -> None:
    """Refuse to make a new table among the shards of an old one, which would pass for leftovers from then on.

    Raises:
        IntegrityError: naming one of them.
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
