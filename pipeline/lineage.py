"""Where a student, a table or a view comes from, and what was made from it; reads records, and no soft labels.

What no longer exists, or can't be read, is named with the reason: everything else is still shown.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from softlabel.pipeline.students.record import (
    RECORD,
    StudentRecord,
    TableRecord,
    TrainingRun,
    ViewRecord,
    read_record,
)
from softlabel.storage.credentials import masked
from softlabel.storage.errors import SoftlabelError, TableNotFoundError
from softlabel.storage.identity import Identity, SelectionIdentity
from softlabel.storage.location import located
from softlabel.storage.log.commit_message import CommitMessage
from softlabel.storage.opening import exists, is_view
from softlabel.storage.places.open import place_of
from softlabel.storage.reader import outline
from softlabel.storage.records.derivations import Derived, derived
from softlabel.storage.records.versions import Pin, pins
from softlabel.storage.table import Table
from softlabel.storage.upkeep.inspection import HistoryEntry, history, last_capture
from softlabel.storage.views.view import View, open_table


@dataclass(frozen=True)
class Documents:
    """The documents of a version of a table."""

    number: int
    hash: str
    """SHA-256 over the ids and contents of all of them, in any order."""
    sources: tuple[str, ...]
    """Paths that the captures read, as they were given."""


@dataclass(frozen=True)
class Teacher:
    """The model that soft labels come from."""

    name: str
    """Folder or hub name; empty if no capture recorded it."""
    commit: str | None
    """Commit of a hub model; None for a folder."""
    dtype: str
    files: dict[str, str]
    """SHA-256 of its configuration and weights, by file name; empty if the documents' own labels were captured."""
    adapter: str | None
    """SHA-256 of its adapter's weights; None without one."""


@dataclass(frozen=True)
class Dependent:
    """Something that was made from a table."""

    kind: Literal["student", "view", "table"]
    location: str
    version: int
    """Version of the table that it was made from."""
    time: str
    """When this was recorded; UTC, ISO 8601."""
    user: str
    run: str | None
    """The scheduler's id of the run that made it."""
    problem: str | None
    """Why it can't be found or read, or why it is not what it was; None if it is there."""


@dataclass(frozen=True)
class TableLineage:
    """A version of a table: what it was made from and, unless it is shown as a part of another lineage, its uses."""

    location: str
    version: int
    problem: str | None = None
    """Why it can't be opened, or is not what it was; then only what others recorded about it is known."""
    teacher: Teacher | None = None
    selection: SelectionIdentity | None = None
    reduced_from: SelectionIdentity | None = None
    """Selection of the capture, if the soft labels were made smaller since."""
    documents: Documents | None = None
    commits: tuple[HistoryEntry, ...] = ()
    """Newest first."""
    sources: tuple["TableLineage", ...] = ()
    """Tables that its rows were taken from."""
    students: tuple[Dependent, ...] = ()
    views: tuple[Dependent, ...] = ()
    derived: tuple[Dependent, ...] = ()
    """Tables that its rows were taken to."""
    weight: float = 1.0
    """Its weight in the view that it is shown for."""
    kind: Literal["table"] = "table"


@dataclass(frozen=True)
class ViewLineage:
    """A view over tables."""

    location: str
    how: str
    tables: tuple[TableLineage, ...]
    time: str = ""
    user: str = ""
    run: str | None = None
    students: tuple[Dependent, ...] = ()
    problem: str | None = None
    kind: Literal["view"] = "view"


@dataclass(frozen=True)
class Base:
    """The model that a student was made from."""

    name: str
    """Folder, file or hub name; empty if an older version did not record it."""
    commit: str | None
    files: dict[str, str]
    """SHA-256 of its configuration and weights, by file name."""
    problem: str | None
    """Why it can't be found where it was."""


@dataclass(frozen=True)
class StudentLineage:
    """A finished student."""

    location: str
    step: int
    positions: int
    """Captured positions that it was trained on."""
    parameters: int
    objective: str
    """The loss in words."""
    base: Base
    runs: tuple[TrainingRun, ...]
    """Each with the user, the scheduler's run and the library versions in its circumstances."""
    table: TableLineage | ViewLineage
    """At the version that it was trained on."""
    kind: Literal["student"] = "student"


Lineage = StudentLineage | TableLineage | ViewLineage


def lineage(location: str) -> Lineage:
    """Follow a student, a table or a view to what it was made from; and a table or a view to what was made from it.

    Args:
        location: folder of a student; or folder or s3://BUCKET/PREFIX of a table or view, where ``TABLE@12`` is
            version 12 and ``TABLE@name`` the version with that tag.

    Raises:
        TableNotFoundError: if there is neither a student nor a table.
        StudentError, IntegrityError: if its own record or log can't be read.
    """
    record = Path(located(location), RECORD)
    if record.is_file():
        return _of_student(record.parent, read_record(record, StudentRecord))
    if not exists(location):
        raise TableNotFoundError(
            "there is neither a student nor a soft-label table here",
            expected=f"a student's folder, which has a {RECORD}; or a table or view",
            found="an unfinished student" if Path(f"{located(location)}.training").is_dir() else "neither",
            where=location,
            do="check the path; softlabel lineage TABLE lists the students of a table",
        )
    opened = open_table(location)
    if isinstance(opened, View):
        return _with_students(_of_view(opened))
    return _with_dependents(_of_table(opened))


def _of_student(folder: Path, record: StudentRecord) -> StudentLineage:
    return StudentLineage(
        location=str(folder),
        step=record.step,
        positions=record.positions,
        parameters=record.parameters,
        objective=record.objective,
        base=_base(record),
        runs=record.runs or (TrainingRun.model_construct(**_first_run(record)),),
        table=_recorded_view(record) if isinstance(record.table, ViewRecord) else _recorded_table(record.table, record),
    )


def _first_run(record: StudentRecord) -> dict[str, Any]:
    """The run of a record from before runs were recorded."""
    length = record.config.optimizer
    steps = {"first_step": 1, "last_step": record.last_step, "circumstances": record.circumstances}
    return steps | {"num_train_epochs": length.num_train_epochs, "max_steps": length.max_steps}


def _base(record: StudentRecord) -> Base:
    source = record.source
    if source is None:
        return Base("", None, {}, "an earlier version of softlabel did not record it")
    is_path = Path(source.name).is_absolute() or source.name.startswith(("./", "../"))
    gone = source.commit is None and is_path and not Path(source.name).exists()
    return Base(source.name, source.commit, source.files, "no longer there" if gone else None)


def _recorded_table(then: TableRecord, record: StudentRecord) -> TableLineage:
    """The version that a student was trained on: as it is now or, if that can't be read, as the student recorded it."""
    try:
        table = Table.open(f"{then.location}@{then.version}")
        if table.content == then.content:
            return _of_table(table)
        problem = "another table is there now, or its rows have changed: they differ from those of the training"
    except (SoftlabelError, OSError) as error:
        problem = _first_line(error)
    by_name = {teacher.name: teacher.commit for teacher in record.teachers}
    name, commit = next(iter(by_name.items())) if len(by_name) == 1 else (", ".join(by_name), None)
    return _described(TableLineage(then.location, then.version, problem), then.identity, name, commit)


def _recorded_view(record: StudentRecord) -> ViewLineage:
    then = record.table
    assert isinstance(then, ViewRecord)
    tables = tuple(replace(_recorded_table(part, record), weight=part.weight) for part in then.tables)
    found = ViewLineage(then.location, then.how, tables)
    try:
        view = open_table(then.location)
        if isinstance(view, View) and view.content == then.content:
            return replace(_of_view(view), tables=tables)
        return replace(found, problem="something else is there now")
    except (SoftlabelError, OSError) as error:
        return replace(found, problem=_first_line(error))


def _of_view(view: View) -> ViewLineage:
    tables = zip(view.tables, view.weights, strict=True)
    made = view.definition
    return ViewLineage(
        location=view.place.address,
        how=made.how,
        tables=tuple(replace(_of_table(table), weight=weight) for table, weight in tables),
        time=made.time,
        user=made.user,
        run=made.run,
    )


def _of_table(table: Table, below: frozenset[str] = frozenset()) -> TableLineage:
    """What a version was made from.

    Args:
        table: the version.
        below: TABLE@version of those that it is shown for, so that no chain of records goes round in circles.
    """
    about, capture = [CommitMessage.of(commit, table.location) for commit in table.commits()], last_capture(table)
    found = TableLineage(
        location=table.place.address,
        version=table.version,
        documents=_documents(table, about),
        commits=tuple(history(table)),
        sources=tuple(_sources(table, about, below)),
    )
    return _described(found, table.identity, capture.teacher or "", capture.revision)


def _described(found: TableLineage, identity: Identity, teacher: str, commit: str | None) -> TableLineage:
    """With what an identity says."""
    files = identity.teacher.files
    return replace(
        found,
        teacher=Teacher(masked(teacher), commit, identity.teacher.dtype, files, identity.teacher.adapter),
        selection=identity.selection,
        reduced_from=identity.derived_from,
    )


def _documents(table: Table, about: list[CommitMessage]) -> Documents:
    contents, names = set[bytes](), set[str]()
    for shard in table.shards():
        for rows in outline(table, shard, ["document_id", "fingerprint"]):
            ids = rows.column("document_id").to_pylist()
            pairs = zip(ids, rows.column("fingerprint").to_pylist(), strict=True)
            contents.update(hashlib.sha256(name.encode() + b"\0" + content).digest() for name, content in pairs)
            names.update(ids)
    given = (message.config.get("documents", ()) for message in reversed(about))
    sources = (masked(str(path)) for paths in given for path in ([paths] if isinstance(paths, str) else paths))
    return Documents(
        number=len(names),
        hash=hashlib.sha256(b"".join(sorted(contents))).hexdigest(),
        sources=tuple(dict.fromkeys(sources)),
    )


def _sources(table: Table, about: list[CommitMessage], below: frozenset[str]) -> Iterator[TableLineage]:
    here = below | {f"{table.place.address}@{table.version}"}
    for name in dict.fromkeys(message.source for message in reversed(about) if message.source):
        path, _, version = name.rpartition("@")
        if not version.isdigit() or place_of(path).address == table.place.address:
            continue  # a change in place
        missing = TableLineage(masked(path), int(version))
        if f"{place_of(path).address}@{version}" in here:
            yield replace(missing, problem="it is in this chain already: one of these tables was made anew since")
            continue
        try:
            yield _of_table(Table.open(name), here)
        except (SoftlabelError, OSError) as error:
            yield replace(missing, problem=_first_line(error))


def _with_dependents(found: TableLineage) -> TableLineage:
    held = pins(found.location)
    students = (
        _dependent("student", pin.student, pin, partial(_student_problem, pin)) for pin in held if pin.kind == "student"
    )
    views = (_dependent("view", pin.student, pin, partial(_view_problem, pin)) for pin in held if pin.kind == "view")
    tables = (_dependent("table", made.table, made, partial(_table_problem, made)) for made in derived(found.location))
    return replace(found, students=tuple(students), views=tuple(views), derived=tuple(tables))


def _with_students(found: ViewLineage) -> ViewLineage:
    """Students of a view pin its tables, and name the view in their records."""
    students = dict[str, Dependent]()
    for table in found.tables:
        for pin in pins(table.location):
            if pin.kind == "student" and _trained_on(pin.student) == found.location:
                made = _dependent("student", pin.student, pin, partial(_student_problem, pin))
                students.setdefault(pin.student, replace(made, version=View.version))
    return replace(found, students=tuple(students.values()))


def _trained_on(student: str) -> str | None:
    try:
        return read_record(Path(student, RECORD), StudentRecord).table.location
    except (SoftlabelError, OSError):
        return None


def _dependent(
    kind: Literal["student", "view", "table"], location: str, made: Pin | Derived, check: Callable[[], str | None]
) -> Dependent:
    try:
        problem = check()
    except (SoftlabelError, OSError) as error:
        problem = _first_line(error)
    return Dependent(kind, location, made.version, made.time, made.user, made.run, problem)


def _student_problem(pin: Pin) -> str | None:
    folder = Path(pin.student)
    if not (folder / RECORD).is_file():
        unfinished = folder.with_name(f"{folder.name}.training").is_dir()
        return "not finished yet" if unfinished else "no longer there"
    versions = {part.version for part in read_record(folder / RECORD, StudentRecord).table.tables}
    return None if pin.version in versions else "trained on another version or table since"


def _view_problem(pin: Pin) -> str | None:
    if not is_view(pin.student):
        return "no longer there"
    open_table(pin.student)
    return None


def _table_problem(made: Derived) -> str | None:
    return None if exists(made.table) else "no longer there"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
