"""Small facts about a table that are no part of any version: a JSON file each, there whole or not at all.

TABLE/_softlabel/<kind>/<name>.json
"""

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Generic, TypeVar

from storage.errors import IntegrityError, TableError
from storage.place import SIDE_FOLDER, place_of


@dataclass(frozen=True)
class Record:
    """What every one of them says."""

    time: str
    """UTC, ISO 8601."""
    user: str


R = TypeVar("R", bound=Record)


class Records(Generic[R]):
    """The records of one kind.

    Args:
        kind: name of their folder.
        record: their type.
    """

    def __init__(self, kind: str, record: type[R]) -> None:
        self._kind, self._record = kind, record

    def all(self, table: str) -> list[R]:
        """Every record of this kind, in the order of their names.

        Raises:
            IntegrityError: if one of them can't be read.
        """
        place, found = place_of(table), []
        names = sorted(file.name for file in place.files(f"{SIDE_FOLDER}/{self._kind}"))
        for name in (name for name in names if name.endswith(".json")):
            try:
                found.append(self._record(**json.loads(place.read(name).decode())))
            except FileNotFoundError:
                continue  # removed a moment ago
            except (OSError, ValueError, TypeError) as error:
                raise IntegrityError(
                    f"a record in the table's {self._kind} can't be read",
                    found=error,
                    where=place.where(name),
                    do="restore this file from a copy of the table, or delete it",
                ) from error
        return found

    def write(self, table: str, name: str, record: R, *, replace: bool) -> None:
        """Put a record in its place.

        Raises:
            FileExistsError: if there is one and it must not be replaced.
            TableError: if it can't be written.
        """
        place, path = place_of(table), self._path(name)
        try:
            place.write(path, json.dumps(asdict(record)).encode(), replace=replace)
        except FileExistsError:
            raise
        except OSError as error:
            raise _unwritable(place.where(path), error) from error

    def remove(self, table: str, name: str) -> None:
        """Remove a record, if it is there.

        Raises:
            TableError: if it can't be removed.
        """
        place, path = place_of(table), self._path(name)
        try:
            place.delete(path)
        except OSError as error:
            raise _unwritable(place.where(path), error) from error

    def _path(self, name: str) -> str:
        return f"{SIDE_FOLDER}/{self._kind}/{name}.json"


def now() -> str:
    """The time that a record is given."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _unwritable(path: str, error: OSError) -> TableError:
    return TableError(
        "the table's records can't be written",
        expected="a folder that can be written, on a disk that has room",
        found=error,
        where=path,
        do="make room or mend the permissions, then run the same command again",
    )
