"""Small facts about a table that are no part of any version: a JSON file each, there whole or not at all.

TABLE/_softlabel/<kind>/<name>.json
"""

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Generic, TypeVar

from storage.errors import IntegrityError, TableError
from storage.files import SIDE_FOLDER, publish


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

    def path(self, table: str, name: str) -> Path:
        """Where the record of that name is."""
        return Path(table, SIDE_FOLDER, self._kind, f"{name}.json")

    def all(self, table: str) -> list[R]:
        """Every record of this kind, in the order of their names.

        Raises:
            IntegrityError: if one of them can't be read.
        """
        found = []
        for path in sorted(self.path(table, "*").parent.glob("*.json")):
            try:
                found.append(self._record(**json.loads(path.read_text(encoding="utf-8"))))
            except FileNotFoundError:
                continue  # removed a moment ago
            except (OSError, ValueError, TypeError) as error:
                raise IntegrityError(
                    f"a record in the table's {self._kind} can't be read",
                    found=error,
                    where=path,
                    do="restore this file from a copy of the table, or delete it",
                ) from error
        return found

    def write(self, table: str, name: str, record: R, *, replace: bool) -> None:
        """Put a record in its place.

        Raises:
            FileExistsError: if there is one and it must not be replaced.
            TableError: if it can't be written.
        """
        path = self.path(table, name)
        try:
            publish(json.dumps(asdict(record)).encode(), path, replace=replace)
        except OSError as error:
            if isinstance(error, FileExistsError) and path.parent.is_dir():
                raise
            raise _unwritable(path, error) from error

    def remove(self, table: str, name: str) -> None:
        """Remove a record, if it is there.

        Raises:
            TableError: if it can't be removed.
        """
        path = self.path(table, name)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise _unwritable(path, error) from error


def now() -> str:
    """The time that a record is given."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _unwritable(path: Path, error: OSError) -> TableError:
    return TableError(
        "the table's records can't be written",
        expected="a folder that can be written, on a disk that has room",
        found=error,
        where=path,
        do="make room or mend the permissions, then run the same command again",
    )
