"""A table's tags, the pins that protect versions for students and views, and the versions that a vacuum removed.

    TABLE/_softlabel/tags/NAME.json           a name for one version, which never moves
    TABLE/_softlabel/pins/<hash>.json         a student or view that needs a version; the hash is of its location
    TABLE/_softlabel/vacuumed/<random>.json   versions that can no longer be opened

To set a tag or pin, the record is written first, and then checked against vacuums; a vacuum also writes its record
first, and then checks for tags and pins. So of two that run at the same time, at least one sees the other and stops.
Never opens a shard or the log.
"""

import difflib
import re
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

from softlabel.storage.credentials import holds_credentials
from softlabel.storage.errors import TableError, TableNotFoundError, UsageError
from softlabel.storage.identity import user
from softlabel.storage.location import located
from softlabel.storage.log.files import commits
from softlabel.storage.places.open import place_of
from softlabel.storage.places.place import hash_of
from softlabel.storage.records.derivations import DERIVED
from softlabel.storage.records.store import Record, RecordStore, now
from softlabel.storage.records.takedown import PURGES, purged_error, purged_versions

TAG = r"[A-Za-z][A-Za-z0-9_.-]*"
"""Pattern of a valid tag name."""


@dataclass(frozen=True)
class Tag(Record):
    """A name for one version."""

    name: str
    version: int


@dataclass(frozen=True)
class Pin(Record):
    """Protects one version for a student that is trained on it, or for a view that contains it."""

    student: str
    """Folder of the student, or address of the view."""
    version: int
    kind: Literal["student", "view"] = "student"

    def __post_init__(self) -> None:
        if holds_credentials(self.student):
            raise ValueError("the location contains credentials (not shown here)")


@dataclass(frozen=True)
class Vacuumed(Record):
    """Versions whose shards a vacuum deleted."""

    versions: list[int]


_TAGS, _PINS = RecordStore("tags", Tag), RecordStore("pins", Pin)
_VACUUMED = RecordStore("vacuumed", Vacuumed, final=True)


def damaged_records(table: str) -> list[str]:
    """Files of damaged records, including those of take-downs and of derived tables."""
    return [name for records in (_TAGS, _PINS, _VACUUMED, PURGES, DERIVED) for name in records.damaged(table)]


def parse(location: str) -> tuple[str, int | str | None]:
    """Split ``PATH@12`` into path and version, and ``PATH@name`` into path and tag; with neither, the second is None.

    If a folder or bucket prefix with an @ in its name exists, the whole location is the path.

    Raises:
        UsageError: if the location holds credentials.
    """
    location = located(location)
    match = re.fullmatch(rf"(.+)@(\d+|{TAG})", location)
    if match is None or place_of(location).exists():
        return location, None
    return match[1], int(match[2]) if match[2].isdigit() else match[2]


def resolve(table: str, wanted: int | str | None) -> int | None:
    """The version number of a version or tag; None stays None, for the newest.

    Raises:
        TableNotFoundError: if there is no such tag, or the version was vacuumed or purged.
    """
    if isinstance(wanted, str):
        wanted = tag_of(table, wanted).version
    if wanted is not None:
        _require_available(table, wanted)
    return wanted


def tags(table: str) -> dict[str, Tag]:
    """A table's tags by name."""
    return {tag.name: tag for tag in _TAGS.all(table)}


def tag_of(table: str, name: str) -> Tag:
    """The tag of this name.

    Raises:
        TableNotFoundError: if there is none.
    """
    known = tags(table)
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1)
    raise TableNotFoundError(
        f"this table has no tag {name}",
        expected=f"a version number, or a tag: {', '.join(sorted(known)) or 'the table has none yet'}",
        found=name,
        where=table,
        do=f"did you mean {table}@{near[0]}?" if near else "run softlabel history to list versions and tags",
    )


def tag(table: str, version: int, name: str) -> Tag:
    """Give a table's version a tag. Setting the same tag again is no error; of two processes that conflict, one wins.

    Raises:
        UsageError: if the name is not valid for a tag.
        TableError: if another version has this tag already, or the tag can't be written.
        TableNotFoundError: if the version is being vacuumed.
    """
    made = new_tag(table, version, name, {})
    try:
        _TAGS.write(table, name, made, replace=False)
    except FileExistsError:
        return new_tag(table, version, name, tags(table), written=True)
    try:
        _require_available(table, version)
    except TableNotFoundError:
        _TAGS.remove(table, name)
        raise
    return made


def new_tag(table: str, version: int, name: str, others: Mapping[str, Tag], *, written: bool = False) -> Tag:
    """The tag that ``tag`` sets; nothing is written.

    Args:
        table: location of the table.
        version: version to tag.
        name: name of the tag.
        others: the table's tags by name.
        written: whether there is a tag of this name, even if it is not among the others any more.

    Raises:
        UsageError, TableError: as ``tag`` does.
    """
    if not re.fullmatch(TAG, name):
        raise UsageError(
            "this is not a valid name for a tag", expected="a letter, then letters, digits, _ . or -", found=repr(name)
        )
    there = others.get(name)
    if there is not None and there.version == version:
        return there
    if there is None and not written:
        return Tag(now(), user(), name, version)
    raise TableError(
        f"the tag {name} is already in use, and a tag never moves to another version",
        expected=f"no tag {name}, or {name} already on version {version}",
        found=f"version {there.version}, tagged {there.time} by {there.user}" if there else "just removed",
        where=table,
        do=f"choose another name, or remove this tag: softlabel maintain {table} --untag {name}",
    )


def untag(table: str, name: str) -> Tag:
    """Remove a tag, and return it.

    Raises:
        TableNotFoundError: if there is no such tag.
    """
    freed = tag_of(table, name)
    _TAGS.remove(table, name)
    return freed


def pins(table: str) -> list[Pin]:
    """The pins of a table, ordered by version."""
    return sorted(_PINS.all(table), key=lambda pin: (pin.version, pin.student))


def pin(table: str, version: int, student: Path | str, kind: Literal["student", "view"] = "student") -> Pin:
    """Protect a version for a student or a view; replaces an earlier pin of the same student or view.

    Args:
        table: location of the table.
        version: version to protect.
        student: folder of a student, or address of a view.
        kind: whether ``student`` is a student or a view.

    Raises:
        TableError: if the pin can't be written.
        TableNotFoundError: if the version is being vacuumed.
    """
    holder = located(str(student))
    holder = str(Path(holder).absolute()) if isinstance(student, Path) else holder
    made = Pin(now(), user(), holder, version, kind)
    _PINS.write(table, _pin_name(made.student), made, replace=True)
    try:
        _require_available(table, version)
    except TableNotFoundError:
        _PINS.remove(table, _pin_name(made.student))
        raise
    return made


def unpin(table: str, student: str) -> Pin:
    """Remove the pin of a student or view, and return it.

    Args:
        table: location of the table.
        student: folder of the student, which need not exist any more; or address of the view.

    Raises:
        TableNotFoundError: if there is no such pin.
    """
    freed = pin_of(table, student)
    _PINS.remove(table, _pin_name(freed.student))
    return freed


def pin_of(table: str, student: str) -> Pin:
    """The pin of a student or view.

    Raises:
        TableNotFoundError: if there is none.
    """
    student = located(student)
    held = {pin.student: pin for pin in pins(table)}
    name = next((name for name in (student, str(Path(student).absolute())) if name in held), None)
    if name is None:
        raise TableNotFoundError(
            "this student has no pin on the table",
            expected="\n               ".join(held) or "a student with a pin; the table has none",
            found=student,
            where=table,
        )
    return held[name]


def needed(table: str) -> set[int]:
    """Versions that have a tag or a pin."""
    return {tag.version for tag in tags(table).values()} | {pin.version for pin in pins(table)}


def vacuumed(table: str) -> set[int]:
    """Versions that can no longer be opened, because of a vacuum or because documents were taken down."""
    return {version for vacuum in _VACUUMED.all(table) for version in vacuum.versions} | set(purged_versions(table))


def remaining(table: str) -> set[int]:
    """Versions that can be opened."""
    return commits(place_of(table)) - vacuumed(table)


def retire(table: str, versions: Iterable[int]) -> None:
    """Record that versions can no longer be opened, before their shards are deleted.

    The new record takes the place of all earlier ones, so that opening a version reads one record however often a table
    was vacuumed.

    Raises:
        TableError: if one of them has just been tagged or pinned; then none of them is retired.
    """
    name, retired, earlier = uuid.uuid4().hex, set(versions), _VACUUMED.by_name(table)
    if not retired and len(earlier) < 2:
        return
    every = retired.union(*(vacuum.versions for vacuum in earlier.values()))
    _VACUUMED.write(table, name, Vacuumed(now(), user(), sorted(every)), replace=True)
    if taken := needed(table).intersection(retired):
        _VACUUMED.remove(table, name)
        raise TableError(
            "versions selected for deletion were tagged or pinned a moment ago; nothing was deleted",
            expected="versions without a tag or pin",
            found=f"a new tag or pin on {spans(taken)}",
            where=table,
            do="run the same command again",
        )
    for merged in earlier:
        _VACUUMED.remove(table, merged)


def spans(versions: Iterable[int]) -> str:
    """Version numbers as ranges: ``0-3, 7``."""
    ordered = sorted(versions)
    gaps = [(a, b) for a, b in pairwise(ordered) if b > a + 1]
    starts = ordered[:1] + [b for _, b in gaps]
    ends = [a for a, _ in gaps] + ordered[-1:]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def _require_available(table: str, version: int) -> None:
    if purge := purged_versions(table).get(version):
        raise purged_error(table, purge)
    for vacuum in _VACUUMED.all(table):
        if version in vacuum.versions:
            raise TableNotFoundError(
                f"version {version} of this table was vacuumed: some of its files are deleted",
                expected=f"a version that remains: {spans(remaining(table))}",
                found=f"vacuumed {vacuum.time} by {vacuum.user}",
                where=table,
                do="use one of those; a tag or a student's pin protects a version from being vacuumed",
            )


def _pin_name(student: str) -> str:
    return hash_of(student.encode())
