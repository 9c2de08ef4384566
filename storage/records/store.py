"""Records about a table that belong to no version, such as tags and pins: one JSON file each, written atomically.

    TABLE/_softlabel/<kind>/<name>.json

Each record contains a hash of its other fields, so that a damaged one is recognized.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import PurePath
from typing import Any, Generic, TypeVar

from pydantic import TypeAdapter, ValidationError

from softlabel.storage.errors import IntegrityError, TableError
from softlabel.storage.identity import run_id
from softlabel.storage.places.open import place_of
from softlabel.storage.places.place import SIDE_FOLDER, File, Place
from softlabel.storage.records.sealed_json import seal, unseal


@dataclass(frozen=True)
class Record:
    """The fields that every record has."""

    time: str
    """UTC, ISO 8601."""
    user: str
    run: str | None = field(default=None, kw_only=True)
    """The scheduler's id of the run that wrote it last; None if no scheduler started it."""


R = TypeVar("R", bound=Record)


LARGEST_RECORD = 1 << 28
"""Bytes of a record; enough for the hashes of seven million documents that were taken down."""


class RecordStore(Generic[R]):
    """All records of one kind.

    Args:
        kind: name of their folder.
        record: type of the records.
        final: whether a record's file is never replaced, so that this process has to read it only once.
    """

    def __init__(self, kind: str, record: type[R], *, final: bool = False) -> None:
        self._kind, self._type, self._final = kind, TypeAdapter(record), final
        self._known: dict[tuple[str, File], R] = {}

    def all(self, table: str) -> list[R]:
        """Every record of this kind, in the order of their names.

        Raises:
            IntegrityError: if one of them can't be read.
        """
        return list(self.by_name(table).values())

    def by_name(self, table: str) -> dict[str, R]:
        """Every record of this kind, by its name.

        Raises:
            IntegrityError: if one of them can't be read.
        """
        place = place_of(table)
        while True:
            files = self._files(place)
            found = {file.name: self._read(place, file) for file in files}
            records = {PurePath(name).stem: record for name, record in found.items() if record is not None}
            # One that was removed after the listing may be part of another one now, which the listing did not show.
            if len(records) == len(files) or self._files(place) == files:
                return records

    def damaged(self, table: str) -> Iterator[str]:
        """File names of the records that can't be read."""
        place = place_of(table)
        for file in self._files(place):
            try:
                self._read(place, file)
            except IntegrityError:
                yield file.name

    def _files(self, place: Place) -> list[File]:
        files = place.files(f"{SIDE_FOLDER}/{self._kind}")
        return sorted((file for file in files if file.name.endswith(".json")), key=lambda file: file.name)

    def _read(self, place: Place, file: File) -> R | None:
        """None if the record was removed meanwhile."""
        if (place.address, file) in self._known:
            return self._known[place.address, file]
        try:
            record = self._made_of(unseal(place.read(file.name, LARGEST_RECORD)))
            if self._final:
                self._known[place.address, file] = record
            return record
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise IntegrityError(
                f"a record in the table's {self._kind} folder is damaged",
                expected="a JSON object that matches the hash in it",
                found=repr(error),
                where=place.where(file.name),
                do="restore this file from a copy of the table, or delete it and repeat the command that created it",
            ) from error

    def _made_of(self, fields: dict[str, Any]) -> R:
        """A record with these fields; those that this version of softlabel does not know are left out.

        Raises:
            ValueError: if a field is missing, or has a value of another type. The value is not shown.
        """
        try:
            return self._type.validate_python(fields)
        except ValidationError as error:
            found = [f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()]
            raise ValueError("; ".join(found[:3])) from None

    def write(self, table: str, name: str, record: R, *, replace: bool) -> None:
        """Write a record.

        Raises:
            FileExistsError: if the record exists and ``replace`` is false.
            TableError: if it can't be written.
        """
        place, path, fields = place_of(table), self._path(name), asdict(record) | {"run": run_id()}
        content = seal({name: value for name, value in fields.items() if name != "run" or value is not None})
        if len(content) > LARGEST_RECORD:
            raise TableError(
                "this record would be too large to be read again; nothing was written",
                expected=f"at most {LARGEST_RECORD:,} bytes",
                found=f"{len(content):,} bytes",
                where=place.where(path),
                do="divide the request into several, for example into lists of a million documents each",
            )
        try:
            place.write(path, content, replace=replace)
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
