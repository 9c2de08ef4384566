"""Checks and expands locations as users write them; every location from outside passes through here.

A location is the path of a folder or a file, a glob, or a URL: ``s3://BUCKET/PREFIX``.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from softlabel.storage.credentials import holds_credentials
from softlabel.storage.errors import UsageError

_LOCATIONS = ("config", "location", "model", "name", "output", "table", "teacher")
"""Keys in a student's record whose values are locations."""


def located(location: str) -> str:
    """The location with ``~`` and ``~USER`` expanded; idempotent.

    Raises:
        UsageError: if it contains credentials, which are never shown; or if the user's home folder is unknown.
    """
    if holds_credentials(location):
        raise UsageError(
            "a location must not contain credentials: it is stored in records, logs and reports",
            expected="a path, or s3://BUCKET/PREFIX",
            found="a user, key, password or parameter in the location (not shown here)",
            do="remove it, and set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, if there is one, AWS_SESSION_TOKEN\n"
            "               in the environment (for version 12 of a table at the top of a bucket, write s3://BUCKET/@12)",
        )
    if not location.startswith("~"):
        return location
    try:
        return str(Path(location).expanduser())
    except RuntimeError:
        raise UsageError(
            "~ means the home folder of a user, but this machine does not know that user",
            expected="~/PATH, ~USER/PATH, or a path without ~",
            found=location,
            do="write the full path of the folder; or, if ~ is part of its name, write ./ before it",
        ) from None


def require_clean(record: Any, where: object, do: str) -> None:
    """Refuse a record from another process if one of its locations contains credentials.

    Args:
        record: the record, parsed from JSON.
        where: file of the record.
        do: what the user should do about it.

    Raises:
        UsageError: if a location contains credentials; they are not shown.
    """
    if any(map(holds_credentials, _locations(record))):
        raise UsageError(
            "a location in this file contains credentials, which other people could then read",
            expected="a path, or s3://BUCKET/PREFIX",
            found="a user, key, password or parameter in the location (not shown here)",
            where=where,
            do=do,
        )


def _locations(record: Any, name: str = "") -> Iterator[str]:
    if isinstance(record, Mapping):
        for key, value in record.items():
            yield from _locations(value, key)
    elif isinstance(record, list | tuple):
        for value in record:
            yield from _locations(value, name)
    elif isinstance(record, str) and name in _LOCATIONS:
        yield record
