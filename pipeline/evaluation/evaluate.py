"""Compares students with their teacher on the held-out part of a table, and writes the report.

The teacher's predictions come from the table: no teacher is loaded. All students' records are compared with the table
before the first student is measured, so that a mismatch is found early. Never changes a table or a student.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from softlabel.pipeline.config.evaluate import EvaluateConfig
from softlabel.pipeline.config.train import StudentConfig
from softlabel.pipeline.devices import device
from softlabel.pipeline.evaluation.classifier_report import ClassEvaluation
from softlabel.pipeline.evaluation.provenance import read_student, warnings_of
from softlabel.pipeline.evaluation.report import (
    EvaluationReport,
    Header,
    NamedTeacher,
    TrainedStudent,
    column_costs,
    prepare,
)
from softlabel.pipeline.objectives.decide import objective_of
from softlabel.pipeline.objectives.objective import Objective
from softlabel.pipeline.progress import Progress, Watch, unwatched
from softlabel.pipeline.students.origin import Origin
from softlabel.storage.errors import UsageError
from softlabel.storage.identity import circumstances
from softlabel.storage.reader import captured_positions
from softlabel.storage.upkeep.inspection import column_bytes, last_capture
from softlabel.storage.views.view import AnyTable, View, open_table


@dataclass(frozen=True)
class EvaluationJob:
    """What one evaluation does: everything that its settings name, found and opened once."""

    config: EvaluateConfig
    table: AnyTable
    """At the version that is evaluated on."""
    objective: Objective
    students: tuple[tuple[TrainedStudent, StudentConfig], ...]
    """Each student as its record describes it, with the settings that load its model."""
    device: str

    @classmethod
    def resolve(cls, config: EvaluateConfig) -> Self:
        """Open the table, and read the students' records.

        Raises:
            UsageError: if there is no student.
            TableError: if the table can't be opened.
            StudentError: if a student does not exist, or was trained with another tokenizer or teacher.
        """
        if not config.students:
            raise UsageError(
                "there is no student to evaluate", expected="students: at least one folder", found="students: []"
            )
        table = open_table(config.table)
        students = []
        for folder, name in zip(config.students, _names(config.students), strict=True):
            record = read_student(Path(folder))
            student = TrainedStudent.of(name, folder, record, warnings_of(record, Path(folder), table))
            trained = record.config.student
            students.append((student, StudentConfig(model=folder, dtype=trained.dtype, labels=trained.labels)))
        return cls(config, table, objective_of(Origin.of(table)), tuple(students), str(device(config.device)))


def evaluate(config: EvaluateConfig, watch: Watch = unwatched) -> EvaluationReport | ClassEvaluation:
    """Measure students on a table's eval split and write report.html and report.json.

    Raises:
        TableError: if the table does not exist, or has nothing to evaluate on.
        StudentError: if a student does not exist, or does not fit the table.
        UsageError: if the students can't be compared with each other, or the report can't be written.
    """
    job, folder = EvaluationJob.resolve(config), Path(config.report)
    held_out = job.objective.held_out(job.table, [settings for _, settings in job.students])
    prepare(folder)
    measured = []
    for student, settings in job.students:
        model = job.objective.build(settings, job.table).to(job.device)
        done = _counting(f"evaluate {student.name}", held_out.size, held_out.unit, watch)
        measured.append(held_out.measure(model, student, config.batch_tokens, done))
    return held_out.report(_header(job), _teacher(job.table), measured, folder)


def _counting(stage: str, total: int, unit: str, watch: Watch) -> Callable[[int], None]:
    """A function that reports progress each time that more is done."""
    done = 0

    def count(more: int) -> None:
        nonlocal done
        done += more
        watch(Progress(stage, done, total, unit))

    return count


def _header(job: EvaluationJob) -> Header:
    return Header(
        table=job.table.location,
        version=job.table.version,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        columns=column_costs(_column_bytes(job.table), sum(map(captured_positions, job.table.tables))),
        identity=_identity(job.table),
        circumstances=circumstances(device=job.device),
        config=job.config.completed().model_dump(mode="json"),
    )


def _teacher(table: AnyTable) -> NamedTeacher:
    captures = [last_capture(part) for part in table.tables]
    names = [
        Path(capture.teacher or "teacher").name if part.identity.teacher.files else "the labels"
        for capture, part in zip(captures, table.tables, strict=True)
    ]
    parameters = {capture.parameters for capture in captures}
    different = dict.fromkeys(names)
    return NamedTeacher(
        name=" and ".join(different), parameters=parameters.pop() if len(different) == len(parameters) == 1 else None
    )


def _names(folders: tuple[str, ...]) -> list[str]:
    """Each folder's name, or its whole path if another folder has the same name."""
    names = [Path(folder).absolute().name for folder in folders]
    return [name if names.count(name) == 1 else folder for name, folder in zip(names, folders, strict=True)]


def _column_bytes(table: AnyTable) -> dict[str, int]:
    sizes: Counter[str] = Counter()
    for part in table.tables:
        sizes.update(column_bytes(part))
    return dict(sizes)


def _identity(table: AnyTable) -> dict[str, Any]:
    """The identity of a table or, by name, of each table of a view."""
    if isinstance(table, View):
        named = zip(table.names, table.tables, strict=True)
        return {name: part.identity.model_dump(mode="json") for name, part in named}
    return table.identity.model_dump(mode="json")
