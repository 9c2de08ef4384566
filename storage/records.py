"""Records about a table that belong to no version, such as tags and pins: one JSON file each, written atomically.

    TABLE/_softlabel/<kind>/<name>.json

Each record contains a hash of its other fields, so that a damaged one is recognized.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Generic, TypeVar

from softlabel.storage.errors import IntegrityError, TableError
from softlabel.storage.places.open import place_of
from softlabel.storage.places.place import SIDE_FOLDER, Place
from softlabel.storage.sealed_json import seal, unseal


@dataclass(frozen=True)
class Record:
    """The fields that every record has."""

    time: str
    """UTC, ISO 8601."""
    user: str


R = TypeVar("R", bound=Record)


class RecordStore(Generic[R]):
    """All records of one kind.

    Args:
        kind: name of their folder.
        record: type of the records.
    """

    def __init__(self, kind: str, record: type[R]) -> None:
        self._kind, self._record = kind, record

    def all(self, table: str) -> list[R]:
        """Every record of this kind, in the order of their names.

        Raises:
            IntegrityError: if one of them can't be read.
        """
        place = place_of(table)
        records = (self._read(place, name) for name in self._names(place))
        return [record for record in records if record is not None]

    def damaged(self, table: str) -> Iterator[str]:
        """File names of the records that can't be read."""
        place = place_of(table)
        for name in self._names(place):
            try:
                self._read(place, name)
            except IntegrityError:
                yield name

    def _names(self, place: Place) -> list[str]:
        names = (file.name for file in place.files(f"{SIDE_FOLDER}/{self._kind}"))
        return sorted(name for name in names if name.endswith(".json"))

    def _read(self, place: Place, name: str) -> R | None:
        """None if the record was removed meanwhile."""
        try:
            return self._record(**unseal(place.read(name)))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise IntegrityError(
                f"a record in the table's {self._kind} folder is damaged",
                expected="a JSON object that matches the hash in it",
                found=repr(error),
                where=place.where(name),
                do="restore this file from a copy of the table, or delete it and repeat the command that created it",
            ) from error

    def write(self, table: str, name: str, record: R, *, replace: bool) -> None:
        """Write a record.

        Raises:
            FileExistsError: if the record exists and ``replace`` is false.
            TableError: if it can't be written.
        """
        place, path = place_of(table), self._path(name)
        try:
            place.write(path, seal(asdict(record)), replace=replace)
        except FileExistsError:
            raise
        except OSError as error:
            raise _unwritable(place.where(path), error) from error

    def remove(self, table: str, name: str) -> None:
        """Remove a record, if it exists.

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
    """The current time as records store it: UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _unwritable(path: str, error: OSError) -> TableError:
    return TableError(
        "the table's records can't be written",
        expected="write permission for the folder, and free disk space",
        found=error,
        where=path,
        do="check the path, the permissions and the free disk space, then run the same command again",
    )
