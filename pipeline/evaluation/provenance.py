"""Compares what students were trained on, by their records, with the table that they are to be evaluated on."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from softlabel.pipeline.students.record import RECORD, StudentRecord, TableRecord, read_record
from softlabel.storage.errors import StudentError
from softlabel.storage.places.open import place_of
from softlabel.storage.table import Table
from softlabel.storage.views.view import AnyTable

_TEACHER = ("teacher.files", "teacher.adapter")
"""Fields of the identity that say which model the teacher is."""


def read_student(folder: Path) -> StudentRecord:
    """The record of a student.

    Raises:
        StudentError: if the folder has none that can be read.
    """
    try:
        return read_record(folder / RECORD, StudentRecord)
    except OSError as error:
        raise StudentError(
            "this folder is not a student that softlabel trained",
            expected=f"a folder with the {RECORD} that softlabel train writes",
            found=f"{type(error).__name__}: {error}",
            where=folder / RECORD,
            do="check the path; to evaluate a model trained elsewhere, first train it here with student.model",
        ) from error


def warnings_of(record: StudentRecord, folder: Path, table: AnyTable) -> tuple[str, ...]:
    """What a reader should know before comparing a student on this table.

    Raises:
        StudentError: if the student was trained with another tokenizer or teacher.
    """
    trained_on = record.table
    warnings = [warning for part in table.tables for warning in _differences(trained_on.tables, folder, part)]
    if not all(any(_same_documents(trained, part) for trained in trained_on.tables) for part in table.tables):
        place = f"{trained_on.location}@{trained_on.version}"
        warnings.append(f"trained on {place}, which may include the sequences that it is evaluated on here.")
    return tuple(dict.fromkeys(warnings))


def _differences(trained_on: Sequence[TableRecord], folder: Path, table: Table) -> Iterable[str]:
    """How a table differs from the most similar of the tables that a student was trained on.

    Raises:
        StudentError: if none of these has the table's tokenizer and teacher.
    """
    candidates = [trained.identity.differences(table.identity) for trained in trained_on]
    differences = min(candidates, key=lambda diff: (any(name.startswith(_TEACHER) for name in diff), len(diff)))
    _require_same(differences, ("tokenizer.files", "vocabulary"), "tokenizer", folder, table)
    _require_same(differences, _TEACHER, "teacher", folder, table)
    return [f"trained on a table with a different {name}: {a}, not {b}." for name, (a, b) in differences.items()]


def _same_documents(trained: TableRecord, table: Table) -> bool:
    """Whether the documents held out of this table were also held out when the student was trained.

    This is so for the same content, and for another version of the table with at least this share held out: a document
    that is held out at one share is held out at every larger one.
    """
    same_place = place_of(trained.location).address == table.place.address
    share = trained.identity.sequences.eval_fraction
    return (same_place and share >= table.identity.sequences.eval_fraction) or trained.content == table.content


def _require_same(
    differences: Mapping[str, tuple[Any, Any]], fields: tuple[str, ...], what: str, folder: Path, table: Table
) -> None:
    for name, (student_value, table_value) in differences.items():
        if name.startswith(fields):
            raise StudentError(
                f"this student was trained with another {what} than the table's",
                expected=f"{name}: {table_value}",
                found=f"{name}: {student_value}",
                where=f"{folder}, evaluated on {table.location}",
                do=f"evaluate it on a table made with the same {what}",
            )
