"""Compares students with their teacher on the table's held-out sequences, and writes the report.

The teacher's side comes from the table: no teacher is loaded. What each student was made of is compared with the table
before the first is measured, so that one that does not fit costs no time. Never changes a table or a student.
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
from softlabel.pipeline.evaluation.classifier import ClassEvaluation, evaluate_classes
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
"""What training leaves beside a student's weights."""
_TEACHER = ("teacher.files", "teacher.adapter")
"""Fields of the identity that say which model spoke."""


@dataclass(frozen=True)
class Score:
    """One line of the report's first table."""

    name: str
    perplexity: float
    kl: float
    """Forward KL from the teacher, nats a position."""
    agreement: float | None
    """Share of positions with the teacher's likeliest token; None if the table keeps no head."""
    parameters: int | None


@dataclass(frozen=True)
class EvaluationReport:
    """What came out, in small numbers, and where the rest is."""

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
    """What the KL is: ``pipeline.evaluation.metrics.Metrics.kl_kind``."""


def evaluate(config: EvaluateConfig, watch: Watch = unwatched) -> EvaluationReport | ClassEvaluation:
    """Measure students and write report.html and report.json; those of a table of classes are classifiers.

    Raises:
        TableError: if there is no such table, or nothing in it to measure on.
        StudentError: if a student is not there, or does not fit the table.
        UsageError: if the report can't be written.
    """
    if not config.students:
        raise UsageError(
            "there is no student to evaluate", expected="students: at least one folder", found="students: []"
        )
    table = open_table(config.table)
    names = _names(config.students)
    trained = [_read(Path(folder), table) for folder in config.students]
    on = device(config.device)
    if isinstance(table, Table) and table.identity.classes is not None:
        return evaluate_classes(config, table, names, trained, watch)
    holdout = Holdout.of(table)
    prepare(Path(config.report))

    students = []
    for folder, name, provenance in zip(config.students, names, trained, strict=True):
        model = build(StudentConfig(model=folder, dtype=provenance["config"]["student"]["dtype"]), table).to(on)
        batches = holdout.batches(config.batch_tokens, packing=separates(model))
        metrics = measure(model, _watched(batches, holdout.positions, name, watch), table)
        ppl = perplexity(metrics.cross_entropy)
        students.append(StudentSummary.of(name, folder, provenance, metrics=metrics, perplexity=ppl))
    report = _report(config, table, holdout, tuple(students), str(on))
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
        StudentError: if it has none, or another tokenizer or teacher.
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
    """How a table differs from the one, among those that a student learned from, that is most like it.

    Raises:
        StudentError: if it learned from no table with this tokenizer and teacher.
    """
    every = [identity.differences(table.identity) for identity in made_from]
    differences = min(every, key=lambda found: (any(name.startswith(_TEACHER) for name in found), len(found)))
    _require_same(differences, ("tokenizer.files", "vocabulary"), "tokenizer", folder, table)
    _require_same(differences, _TEACHER, "teacher", folder, table)
    return [f"trained on a table with a different {name}: {a}, not {b}." for name, (a, b) in differences.items()]


def _same_documents(record: Mapping[str, Any], table: Table) -> bool:
    """Another version of this table has the same documents in its eval split, or more, if no larger share is held out:
    who is held out at one share is so at every larger one."""
    same_place = place_of(record["location"]).address == table.place.address
    share = record["identity"]["sequences"]["eval_fraction"]
    return (same_place and share >= table.identity.sequences.eval_fraction) or bool(record["content"] == table.content)


def _require_same(
    differences: Mapping[str, tuple[Any, Any]], fields: tuple[str, ...], what: str, folder: Path, table: Table
) -> None:
    for name, (student, ours) in differences.items():
        if name.startswith(fields):
            raise StudentError(
                f"this student was trained with another {what} than the table's",
                expected=f"{name}: {ours}",
                found=f"{name}: {student}",
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
    config: EvaluateConfig, table: AnyTable, holdout: Holdout, students: tuple[StudentSummary, ...], on: str
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
        circumstances=circumstances(device=on),
        config=config.model_dump(mode="json"),
    )


def _teacher(table: AnyTable, metrics: Metrics) -> TeacherSummary:
    captures = [last_capture(part) for part in table.tables]
    names = dict.fromkeys(Path(about.get("teacher", "teacher")).name for about in captures)
    parameters = {about.get("parameters") for about in captures}
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
    """The folders' own names; the whole paths where two would be called the same."""
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
    """What the report says of what made a table or, by name, each table of a view."""
    if isinstance(table, View):
        named = zip(table.names, table.tables, strict=True)
        return {name: part.identity.model_dump(mode="json") for name, part in named}
    return table.identity.model_dump(mode="json")
