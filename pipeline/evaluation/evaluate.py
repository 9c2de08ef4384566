"""Compares students with their teacher on the table's held-out sequences, and writes the report.

The teacher's predictions come from the table: no teacher is loaded. All students' records are compared with the table
before the first student is measured, so that a mismatch is found early. Never changes a table or a student.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from softlabel.pipeline.config.evaluate import EvaluateConfig
from softlabel.pipeline.config.train import StudentConfig
from softlabel.pipeline.devices import device
from softlabel.pipeline.evaluation.classifier_evaluation import ClassEvaluation, evaluate_classes
from softlabel.pipeline.evaluation.metrics import Metrics, measure
from softlabel.pipeline.evaluation.report import (
    Report,
    StudentSummary,
    TeacherSummary,
    column_costs,
    perplexity,
    prepare,
    to_html,
    to_json,
    write,
)
from softlabel.pipeline.progress import Progress, Watch, unwatched
from softlabel.pipeline.stream.batch import Batch
from softlabel.pipeline.stream.holdout import Holdout
from softlabel.pipeline.students.build import build, separates
from softlabel.pipeline.students.record import read_record
from softlabel.storage.errors import StudentError, UsageError
from softlabel.storage.identity import Identity, circumstances
from softlabel.storage.places.open import place_of
from softlabel.storage.reader import index
from softlabel.storage.table import Table
from softlabel.storage.upkeep.inspection import column_bytes, last_capture
from softlabel.storage.views.view import AnyTable, View, open_table

PROVENANCE = "softlabel.json"
"""Record that training writes next to a student's weights."""
_TEACHER = ("teacher.files", "teacher.adapter")
"""Fields of the identity that say which model the teacher is."""


@dataclass(frozen=True)
class Score:
    """One line of the report's first table."""

    name: str
    perplexity: float
    kl: float
    """Forward KL from the teacher, nats per position."""
    agreement: float | None
    """Share of positions with the teacher's most likely token; None if the table has no head."""
    parameters: int | None


@dataclass(frozen=True)
class EvaluationReport:
    """The main numbers of an evaluation, and the paths of its full report."""

    html: str
    json: str
    table: str
    version: int
    sequences: int
    positions: int
    left_out: int
    """Sequences of the eval split that also occur in the train split."""
    teacher: Score
    students: tuple[Score, ...]
    kl_kind: str
    """How the KL was estimated: see ``pipeline.evaluation.metrics.Metrics.kl_kind``."""


def evaluate(config: EvaluateConfig, watch: Watch = unwatched) -> EvaluationReport | ClassEvaluation:
    """Measure students on a table's eval split and write report.html and report.json.

    Raises:
        TableError: if the table does not exist, or has nothing to evaluate on.
        StudentError: if a student does not exist, or does not fit the table.
        UsageError: if the report can't be written.
    """
    if not config.students:
        raise UsageError(
            "there is no student to evaluate", expected="students: at least one folder", found="students: []"
        )
    table = open_table(config.table)
    names = _names(config.students)
    trained = [_read(Path(folder), table) for folder in config.students]
    target_device = device(config.device)
    if isinstance(table, Table) and table.identity.classes is not None:
        return evaluate_classes(config, table, names, trained, watch)
    holdout = Holdout.of(table)
    prepare(Path(config.report))

    students = []
    for folder, name, provenance in zip(config.students, names, trained, strict=True):
        model = build(StudentConfig(model=folder, dtype=provenance["config"]["student"]["dtype"]), table).to(
            target_device
        )
        batches = holdout.batches(config.batch_tokens, packing=separates(model))
        metrics = measure(model, _watched(batches, holdout.positions, name, watch), table)
        ppl = perplexity(metrics.cross_entropy)
        students.append(StudentSummary.of(name, folder, provenance, metrics=metrics, perplexity=ppl))
    report = _report(config, table, holdout, tuple(students), str(target_device))
    html, json_file = write(to_html(report), to_json(report), Path(config.report))
    return EvaluationReport(
        html=str(html),
        json=str(json_file),
        table=table.location,
        version=table.version,
        sequences=holdout.sequences,
        positions=holdout.positions,
        left_out=holdout.left_out,
        teacher=Score(report.teacher.name, report.teacher.perplexity.mean, 0.0, 1.0, report.teacher.parameters),
        students=tuple(map(_score, students)),
        kl_kind=students[0].metrics.kl_kind,
    )


def _read(folder: Path, table: AnyTable) -> dict[str, Any]:
    """A student's provenance, with a ``warnings`` entry for what a reader should know.

    Raises:
        StudentError: if the student has no record, or was trained with another tokenizer or teacher.
    """
    try:
        provenance = read_record(folder / PROVENANCE)
        trained_on = provenance["table"]
        records = trained_on.get("tables", [trained_on])
        made_from = [Identity.model_validate(record["identity"]) for record in records]
        _ = [provenance[name] for name in ("config", "objective", "parameters", "history")]  # the report needs them
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StudentError(
            "this folder is not a student that softlabel trained",
            expected=f"a folder with the {PROVENANCE} that softlabel train writes",
            found=f"{type(error).__name__}: {error}".splitlines()[0],
            where=folder / PROVENANCE,
            do="check the path; to evaluate a model trained elsewhere, first train it here with student.model",
        ) from error
    warnings = [warning for part in table.tables for warning in _differences(made_from, folder, part)]
    if not all(any(_same_documents(record, part) for record in records) for part in table.tables):
        place = f"{trained_on['location']}@{trained_on['version']}"
        warnings.append(f"trained on {place}, which may include the sequences that it is evaluated on here.")
    return {**provenance, "warnings": tuple(dict.fromkeys(warnings))}


def _differences(made_from: Sequence[Identity], folder: Path, table: Table) -> list[str]:
    """How a table differs from the most similar of the tables that a student was trained on.

    Raises:
        StudentError: if none of these has the table's tokenizer and teacher.
    """
    candidates = [identity.differences(table.identity) for identity in made_from]
    differences = min(candidates, key=lambda diff: (any(name.startswith(_TEACHER) for name in diff), len(diff)))
    _require_same(differences, ("tokenizer.files", "vocabulary"), "tokenizer", folder, table)
    _require_same(differences, _TEACHER, "teacher", folder, table)
    return [f"trained on a table with a different {name}: {a}, not {b}." for name, (a, b) in differences.items()]


def _same_documents(record: Mapping[str, Any], table: Table) -> bool:
    """Whether the documents held out of this table were also held out when the student was trained.

    This is so for the same content, and for another version of the table with at least this share held out: a document
    that is held out at one share is held out at every larger one.
    """
    same_place = place_of(record["location"]).address == table.place.address
    share = record["identity"]["sequences"]["eval_fraction"]
    return (same_place and share >= table.identity.sequences.eval_fraction) or bool(record["content"] == table.content)


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


def _watched(batches: Iterator[Batch], positions: int, name: str, watch: Watch) -> Iterator[Batch]:
    done = 0
    for batch in batches:
        yield batch
        done += len(batch.positions)
        watch(Progress(f"evaluate {name}", done, positions, "positions"))


def _report(
    config: EvaluateConfig, table: AnyTable, holdout: Holdout, students: tuple[StudentSummary, ...], device_name: str
) -> Report:
    return Report(
        table=table.location,
        version=table.version,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        sequences=holdout.sequences,
        positions=holdout.positions,
        left_out=holdout.left_out,
        teacher=_teacher(table, students[0].metrics),
        students=students,
        columns=column_costs(_column_bytes(table), _positions(table)),
        identity=_identity(table),
        circumstances=circumstances(device=device_name),
        config=config.model_dump(mode="json"),
    )


def _teacher(table: AnyTable, metrics: Metrics) -> TeacherSummary:
    captures = [last_capture(part) for part in table.tables]
    names = dict.fromkeys(Path(capture.get("teacher", "teacher")).name for capture in captures)
    parameters = {capture.get("parameters") for capture in captures}
    return TeacherSummary(
        name=" and ".join(names),
        parameters=parameters.pop() if len(names) == len(parameters) == 1 else None,
        cross_entropy=metrics.teacher_cross_entropy,
        perplexity=perplexity(metrics.teacher_cross_entropy),
        entropy=metrics.teacher_entropy,
    )


def _score(student: StudentSummary) -> Score:
    metrics = student.metrics
    agreement = metrics.agreement.mean if metrics.agreement else None
    return Score(student.name, student.perplexity.mean, metrics.kl.mean, agreement, student.parameters)


def _names(folders: tuple[str, ...]) -> list[str]:
    """Each folder's name, or its whole path if another folder has the same name."""
    names = [Path(folder).absolute().name for folder in folders]
    return [name if names.count(name) == 1 else folder for name, folder in zip(names, folders, strict=True)]


def _positions(table: AnyTable) -> int:
    return sum(pc.sum(index(part, ["positions"]).column("positions")).as_py() or 0 for part in table.tables)


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
