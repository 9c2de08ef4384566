"""Compares classifiers with their teacher on the table's held-out documents, and writes the report.

The teacher's predictions come from the table: no teacher is loaded. Never changes a table or a student.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from softlabel.pipeline.config.evaluate import EvaluateConfig
from softlabel.pipeline.config.train import StudentConfig
from softlabel.pipeline.devices import device
from softlabel.pipeline.evaluation.classifier_metrics import ClassMetrics, compare, mean, measure_classes
from softlabel.pipeline.evaluation.classifier_report import SCORES, ClassReport, ClassStudent, ClassTeacher, to_html
from softlabel.pipeline.evaluation.report import column_costs, prepare, write
from softlabel.pipeline.progress import Progress, Watch
from softlabel.pipeline.stream.classifier_batches import ClassBatch, LabelledDocuments
from softlabel.pipeline.students.classifier_student import build_classifier
from softlabel.pipeline.students.labels import LabelMap
from softlabel.storage.errors import UsageError
from softlabel.storage.identity import circumstances
from softlabel.storage.reader import index
from softlabel.storage.table import Table
from softlabel.storage.upkeep.inspection import column_bytes, last_capture


@dataclass(frozen=True)
class ClassScore:
    """One line of the report's first table."""

    name: str
    accuracy: float | None
    """None if no document has a label, like precision, recall and f1."""
    precision: float | None
    """Mean over the labels, like recall and f1."""
    recall: float | None
    f1: float | None
    kl: float
    """Forward KL from the teacher, nats per document."""
    parameters: int | None


@dataclass(frozen=True)
class ClassEvaluation:
    """The main numbers of an evaluation, and the paths of its full report."""

    html: str
    json: str
    table: str
    version: int
    documents: int
    left_out: int
    """Documents of the eval split that also occur in the train split."""
    unmapped: float
    """Mean mass of the teacher's distribution on classes that belong to no label."""
    teacher: ClassScore
    students: tuple[ClassScore, ...]


def evaluate_classes(
    config: EvaluateConfig, table: Table, names: Sequence[str], trained: Sequence[Mapping[str, Any]], watch: Watch
) -> ClassEvaluation:
    """Measure classifiers and write report.html and report.json.

    Args:
        config: the settings.
        table: the table to evaluate on.
        names: display name of each student.
        trained: content of each student's softlabel.json.
        watch: called after each batch.

    Raises:
        TableError: if the table has no documents to evaluate on.
        StudentError: if a student does not fit the table.
        UsageError: if the students have different labels, or the report can't be written.
    """
    target_device = device(config.device)
    labels = _labels(config, table, trained)
    documents = LabelledDocuments.read(table, "eval", labels)
    prepare(Path(config.report))
    students = []
    for folder, name, provenance in zip(config.students, names, trained, strict=True):
        settings = provenance["config"]["student"]
        source = StudentConfig(model=folder, dtype=settings["dtype"], labels=settings["labels"])
        model = build_classifier(source, table).to(target_device)
        batches = documents.batches(model.config.pad_token_id, config.batch_tokens)
        metrics = measure_classes(model, _watched(batches, len(documents.tokens), name, watch))
        students.append(ClassStudent.of(name, folder, provenance, metrics=metrics))
    capture = last_capture(table)
    report = ClassReport(
        table=table.location,
        version=table.version,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        documents=len(documents.tokens),
        left_out=documents.left_out,
        labels=labels.names,
        unmapped=mean(documents.unmapped),
        teacher=ClassTeacher(
            name=Path(capture.get("teacher", "teacher")).name if table.identity.teacher.files else "the labels",
            parameters=capture.get("parameters"),
            metrics=_teacher(documents, labels),
        ),
        students=tuple(students),
        columns=column_costs(column_bytes(table), len(index(table, ["key"]))),
        identity=table.identity.model_dump(mode="json"),
        circumstances=circumstances(device=str(target_device)),
        config=config.model_dump(mode="json"),
    )
    content = TypeAdapter(ClassReport).dump_json(report, indent=2)
    html, json = write(to_html(report), content, Path(config.report))
    return ClassEvaluation(
        html=str(html),
        json=str(json),
        table=table.location,
        version=table.version,
        documents=report.documents,
        left_out=report.left_out,
        unmapped=report.unmapped.mean,
        teacher=_score(report.teacher),
        students=tuple(map(_score, report.students)),
    )


def _labels(config: EvaluateConfig, table: Table, trained: Sequence[Mapping[str, Any]]) -> LabelMap:
    """The labels that all students have."""
    maps = [LabelMap.of(student["config"]["student"]["labels"], table.identity.classes or ()) for student in trained]
    different = next((number for number, labels in enumerate(maps) if labels != maps[0]), None)
    if different is not None:
        raise UsageError(
            "these students have different labels and can't be compared with each other",
            expected=f"{config.students[0]}: {', '.join(maps[0].names)}",
            found=f"{config.students[different]}: {', '.join(maps[different].names)}",
            do="evaluate students with different labels in separate reports",
        )
    return maps[0]


def _watched(batches: Iterator[ClassBatch], total: int, name: str, watch: Watch) -> Iterator[ClassBatch]:
    done = 0
    for batch in batches:
        yield batch
        done += len(batch.labels)
        watch(Progress(f"evaluate {name}", done, total, "documents"))


def _teacher(documents: LabelledDocuments, labels: LabelMap) -> ClassMetrics:
    """The teacher measured like a student; where it has no distribution over the labels, a uniform one stands in."""
    predicted = np.where(np.isnan(documents.logprobs), np.float32(-np.log(len(labels.names))), documents.logprobs)
    return compare(predicted, documents.labels, documents.logprobs, list(labels.names))


def _score(model: ClassTeacher | ClassStudent) -> ClassScore:
    quality = model.metrics.quality
    means = {name: None if quality is None else getattr(quality, name).mean for name in SCORES}
    return ClassScore(name=model.name, kl=model.metrics.kl.mean, parameters=model.parameters, **means)
