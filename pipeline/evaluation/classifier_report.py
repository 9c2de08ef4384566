"""The report on students that are classifiers: turns their metrics into one page.

The page extends the one of ``report``. Measures nothing and reads neither table nor model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from softlabel.pipeline.evaluation import charts
from softlabel.pipeline.evaluation.charts import Bar
from softlabel.pipeline.evaluation.classifier_metrics import ClassMetrics
from softlabel.pipeline.evaluation.metrics import MeanWithError
from softlabel.pipeline.evaluation.report import ColumnBytes, TrainedStudent, histories, render

SCORES = ("accuracy", "precision", "recall", "f1")
"""Metrics that classifiers are compared by; the last three are means over the labels."""
DRAWN_LABELS = 30
"""With more labels than this, a confusion matrix is in the JSON but not drawn."""


@dataclass(frozen=True)
class ClassTeacher:
    """The teacher's metrics on the same documents and over the students' labels, as the table stores them."""

    name: str
    parameters: int | None
    metrics: ClassMetrics


@dataclass(frozen=True, kw_only=True)
class ClassStudent(TrainedStudent):
    """One student's training and its metrics."""

    metrics: ClassMetrics


@dataclass(frozen=True)
class ClassReport:
    """Everything that the page shows."""

    table: str
    version: int
    created: str
    """Time of the evaluation, ISO 8601, UTC."""
    documents: int
    """Number of documents evaluated."""
    left_out: int
    """Documents of the eval split that also occur in the train split, and were not evaluated."""
    labels: tuple[str, ...]
    """The students' labels."""
    unmapped: MeanWithError
    """Mass of the teacher's distribution on classes that belong to none of the students' labels, as a mean."""
    teacher: ClassTeacher
    students: tuple[ClassStudent, ...]
    columns: tuple[ColumnBytes, ...]
    identity: dict[str, Any]
    circumstances: dict[str, Any]
    config: dict[str, Any]


def to_html(report: ClassReport) -> str:
    """The report as one self-contained page."""
    return render("classifier_report.html.j2", report, verdict(report.students), _drawings(report))


def _drawings(report: ClassReport) -> dict[str, str]:
    """Each chart's SVG by name, without charts that have no data."""
    drawings, students = {}, report.students
    for quantity, label in (("eval_accuracy", "accuracy"), ("eval_kl", "KL to the teacher (nats)")):
        if curves := histories(students, quantity):
            drawings[quantity] = charts.by_step(curves, label)
    if losses := histories(students, "loss"):
        drawings["loss"] = charts.by_step(losses, "training loss (nats)", smooth=True)
    models: list[ClassTeacher | ClassStudent] = [report.teacher, *students]
    bars = [
        Bar(index, model.name, [getattr(model.metrics.quality, score) for score in SCORES])
        for index, model in enumerate(models, start=-1)
        if model.metrics.quality is not None
    ]
    if bars:
        drawings["scores"] = charts.by_score(bars, ["accuracy", "precision", "recall", "F1"])
    if len(report.labels) <= DRAWN_LABELS:
        for index, student in enumerate(students):
            if student.metrics.quality is not None:
                confusion = student.metrics.quality.confusion
                drawings[f"confusion-{index}"] = charts.confusion(index, confusion, report.labels, student.name)
    return drawings


def verdict(students: Sequence[ClassStudent]) -> str | None:
    """The most accurate student, if the difference is significant; None for a single student, or without labels."""
    scored = [(s.metrics.quality.accuracy, s.name) for s in students if s.metrics.quality is not None]
    if len(scored) < 2:
        return None
    (best, name), (second, runner_up) = sorted(scored, key=lambda score: score[0].mean, reverse=True)[:2]
    if not best.tells_from(second):
        return (
            f"There are too few documents to tell which is more accurate: {name} ({best.mean:.1%}) "
            f"or {runner_up} ({second.mean:.1%})."
        )
    return f"{name} is the most accurate: {best.mean:.1%} of the documents; {runner_up} is next with {second.mean:.1%}."
