"""What the models of an evaluation are, and how what they were trained on relates to the table."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from softlabel.pipeline.evaluation.report.content import TrainedStudent
from softlabel.pipeline.models.adapter import ADAPTER, Adapter
from softlabel.pipeline.models.files import HUB_NAME, sha256
from softlabel.pipeline.models.pretrained import load_config
from softlabel.pipeline.students.record import RECORD, StudentRecord, TableRecord, read_record
from softlabel.pipeline.students.source import StudentSource
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
            "this is neither a student that softlabel trained nor another model",
            expected=f"a folder with the {RECORD} that softlabel train writes, with the config.json of a model, or with"
            f" an {ADAPTER}; or the name of a repository on the hub",
            found=f"{type(error).__name__}: {error}",
            where=folder / RECORD,
            do="check the path",
        ) from error


def is_model(path: Path, name: str) -> bool:
    """Whether this is a model or an adapter that softlabel did not train: in a folder, or else on the hub."""
    if path.exists() or ("/" in name and path.parent.exists()):
        return (path / "config.json").is_file() or (path / ADAPTER).is_file()
    return HUB_NAME.fullmatch(name) is not None


def stored_dtype(folder: Path) -> Literal["bfloat16", "float32"]:
    """The precision to measure a model in: bfloat16 if its weights are, otherwise float32."""
    settings = load_config(folder)
    return "bfloat16" if getattr(settings, "dtype", None) == torch.bfloat16 else "float32"


def other_model(
    name: str, folder: str, source: StudentSource, adapter: Adapter | None, table: AnyTable
) -> TrainedStudent:
    """A model that softlabel did not train, as the report describes it."""
    teachers = [part.identity.teacher for part in table.tables]
    is_teacher = any(
        teacher.files.items() <= (source.files | _hashes(source.path, teacher.files)).items()
        and bool(teacher.files)
        and teacher.adapter == (None if adapter is None else adapter.hash)
        for teacher in teachers
    )
    if is_teacher:
        kind = "the teacher itself: its distance from the table is the error of measurement"
    else:
        kind = "a model trained elsewhere" if adapter is None else f"an adapter trained elsewhere, on {source.name}"
    return TrainedStudent(
        name=name,
        folder=folder,
        kind="teacher" if is_teacher else "other",
        parameters=None,
        objective=kind,
        history=(),
        trained_on=None,
        config={},
        circumstances={},
        warnings=() if is_teacher else ("trained elsewhere, maybe on the text that it is evaluated on here.",),
    )


def _hashes(folder: Path, names: Iterable[str]) -> dict[str, str]:
    return {name: sha256(folder / name) for name in names if (folder / name).is_file()}


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
