"""Names for a table's versions, and who needs them: tags, the pins of students, and what a vacuum has taken away.

    TABLE/_softlabel/tags/NAME.json           a name that stands for one version, and never moves
    TABLE/_softlabel/pins/<hash>.json         a student that holds a version; the hash is of its path
    TABLE/_softlabel/vacuumed/<random>.json   versions that can no longer be opened

A tag or pin is written first and looks for a vacuum then; a vacuum is written first and looks for tags and pins then.
So at least one of two that run at once sees the other, and gives way. Never opens a shard, or the log.
"""

import difflib
import re
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

from softlabel.storage.commit_files import commits
from softlabel.storage.credentials import holds_credentials
from softlabel.storage.errors import TableError, TableNotFoundError, UsageError
from softlabel.storage.identity import user
from softlabel.storage.location import located
from softlabel.storage.places.open import place_of
from softlabel.storage.places.place import hash_of
from softlabel.storage.records import Record, Records, now
from softlabel.storage.takedown import PURGES, explain, lost

TAG = r"[A-Za-z][A-Za-z0-9_.-]*"
"""What a tag may be called."""


@dataclass(frozen=True)
class Tag(Record):
    """A name that stands for one version."""

    name: str
    version: int


@dataclass(frozen=True)
class Pin(Record):
    """A student that was, or is being, trained on one version, or a view over it."""

    student: str
    """Its folder, or the view's."""
    version: int
    kind: Literal["student", "view"] = "student"

    def __post_init__(self) -> None:
        if holds_credentials(self.student):
            raise ValueError("the location contains credentials (not shown here)")


@dataclass(frozen=True)
class Vacuumed(Record):
    """Versions that lack shards since a vacuum."""

    versions: list[int]


_TAGS, _PINS, _VACUUMED = Records("tags", Tag), Records("pins", Pin), Records("vacuumed", Vacuumed)


def damaged_records(table: str) -> list[str]:
    """Files of records, those of take-downs among them, that are not as they were written."""
    return [name for records in (_TAGS, _PINS, _VACUUMED, PURGES) for name in records.damaged(table)]


def parse(location: str) -> tuple[str, int | str | None]:
    """``PATH@12`` to path and version, ``PATH@name`` to path and tag; without either, the newest version is meant.

    A folder that has an @ in its own name is taken for what it is; so is a prefix of a bucket.

    Raises:
        UsageError: if the location holds credentials.
    """
    location = located(location)
    match = re.fullmatch(rf"(.+)@(\d+|{TAG})", location)
    if match is None or place_of(location).exists():
        return location, None
    return match[1], int(match[2]) if match[2].isdigit() else match[2]


def resolve(table: str, wanted: int | str | None) -> int | None:
    """The version that is meant by a number or a tag.

    Raises:
        TableNotFoundError: if there is no such tag, or the version was vacuumed.
    """
    if isinstance(wanted, str):
        wanted = _tag(table, wanted).version
    if wanted is not None:
        _require_kept(table, wanted)
    return wanted


def tags(table: str) -> dict[str, Tag]:
    """A table's tags by name."""
    return {tag.name: tag for tag in _TAGS.all(table)}


def tag(table: str, version: int, name: str) -> Tag:
    """Name a table's version. To name it twice the same is no error; of two processes that differ, one wins.

    Raises:
        UsageError: if that is no name for a tag.
        TableError: if the name stands for another version already, or can't be written.
        TableNotFoundError: if the version is vacuumed at this moment.
    """
    if not re.fullmatch(TAG, name):
        raise UsageError(
            "this is not a valid name for a tag", expected="a letter, then letters, digits, _ . or -", found=repr(name)
        )
    made = Tag(now(), user(), name, version)
    try:
        _TAGS.write(table, name, made, replace=False)
    except FileExistsError:
        there = tags(table).get(name)
        if there is not None and there.version == version:
            return there
        raise TableError(
            f"the tag {name} is already in use, and a tag never moves to another version",
            expected=f"no tag {name}, or {name} already on version {version}",
            found=f"version {there.version}, tagged {there.time} by {there.user}" if there else "just removed",
            where=table,
            do=f"choose another name, or remove this tag: softlabel maintain {table} --untag {name}",
        ) from None
    try:
        _require_kept(table, version)
    except TableNotFoundError:
        _TAGS.remove(table, name)
        raise
    return made


def untag(table: str, name: str) -> Tag:
    """Free a tag's name; returns what it stood for.

    Raises:
        TableNotFoundError: if there is no such tag.
    """
    freed = _tag(table, name)
    _TAGS.remove(table, name)
    return freed


def pins(table: str) -> list[Pin]:
    """The students that hold versions of a table, in the order of these."""
    return sorted(_PINS.all(table), key=lambda pin: (pin.version, pin.student))


def pin(table: str, version: int, student: Path | str, kind: Literal["student", "view"] = "student") -> Pin:
    """Keep a version for a student or a view, instead of the one that the same folder held before.

    Args:
        table: its location.
        version: of it.
        student: folder of a student, or address of a view.
        kind: which of them.

    Raises:
        TableError: if that can't be written.
        TableNotFoundError: if the version is vacuumed at this moment.
    """
    holder = located(str(student))
    holder = str(Path(holder).absolute()) if isinstance(student, Path) else holder
    made = Pin(now(), user(), holder, version, kind)
    _PINS.write(table, _pin_name(made.student), made, replace=True)
    try:
        _require_kept(table, version)
    except TableNotFoundError:
        _PINS.remove(table, _pin_name(made.student))
        raise
    return made


def unpin(table: str, student: str) -> Pin:
    """Release what a student holds; returns it.

    Args:
        table: its folder.
        student: its folder, which need not be there any more.

    Raises:
        TableNotFoundError: if it holds nothing.
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
    _PINS.remove(table, _pin_name(name))
    return held[name]


def needed(table: str) -> set[int]:
    """Versions that have a tag or a pin."""
    return {tag.version for tag in tags(table).values()} | {pin.version for pin in pins(table)}


def vacuumed(table: str) -> set[int]:
    """Versions that can no longer be opened, since a vacuum or since documents were taken down."""
    return {version for vacuum in _VACUUMED.all(table) for version in vacuum.versions} | set(lost(table))


def remaining(table: str) -> set[int]:
    """Versions that can be opened."""
    return commits(place_of(table)) - vacuumed(table)


def retire(table: str, versions: Iterable[int]) -> None:
    """Make versions impossible to open, before their shards are deleted.

    Raises:
        TableError: if one of them has just been tagged or pinned; then all of them stay.
    """
    name, retired = uuid.uuid4().hex, sorted(versions)
    _VACUUMED.write(table, name, Vacuumed(now(), user(), retired), replace=True)
    if taken := needed(table).intersection(retired):
        _VACUUMED.remove(table, name)
        raise TableError(
            "versions selected for deletion were tagged or pinned a moment ago; nothing was deleted",
            expected="versions without a tag or pin",
            found=f"a new tag or pin on {spans(taken)}",
            where=table,
            do="run the same command again",
        )


def spans(versions: Iterable[int]) -> str:
    """Version numbers as people write them: ``0-3, 7``."""
    ordered = sorted(versions)
    gaps = [(a, b) for a, b in pairwise(ordered) if b > a + 1]
    starts = ordered[:1] + [b for _, b in gaps]
    ends = [a for a, _ in gaps] + ordered[-1:]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def _require_kept(table: str, version: int) -> None:
    if purge := lost(table).get(version):
        raise explain(table, purge)
    for vacuum in _VACUUMED.all(table):
        if version in vacuum.versions:
            raise TableNotFoundError(
                f"version {version} of this table was vacuumed: some of its shards are deleted",
                expected=f"a version that remains: {spans(remaining(table))}",
                found=f"vacuumed {vacuum.time} by {vacuum.user}",
                where=table,
                do="use one of those; a tag or a student's pin protects a version from being vacuumed",
            )


def _tag(table: str, name: str) -> Tag:
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


def _pin_name(student: str) -> str:
    return hash_of(student.encode())
