"""The report on students that are classifiers: turns their metrics into one page.

The page extends the one of ``report``. Measures nothing and reads neither table nor model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pydantic import TypeAdapter

from softlabel.pipeline.evaluation.bootstrap import Estimate
from softlabel.pipeline.evaluation.classifier_metrics import ClassComparison, ClassGroup, ClassMetrics
from softlabel.pipeline.evaluation.cost import Cost
from softlabel.pipeline.evaluation.report.content import Header, NamedTeacher, TrainedStudent, reach
from softlabel.pipeline.evaluation.report.detail import detailed
from softlabel.pipeline.evaluation.report.drawings import by_cost, histories
from softlabel.pipeline.evaluation.report.page import render
from softlabel.pipeline.evaluation.standings import Gap, Standing

SCORES = ("accuracy", "precision", "recall", "f1")
"""Metrics that classifiers are compared by; the last three are means over the labels."""
NOTHING = Estimate(float("nan"), None, None)
DRAWN_LABELS = 30
"""With more labels than this, a confusion matrix is in the JSON but not drawn."""


@dataclass(frozen=True)
class ClassTeacher(NamedTeacher):
    """The teacher's metrics on the same documents and over the students' labels, as the table stores them."""

    metrics: ClassMetrics


@dataclass(frozen=True, kw_only=True)
class ClassStudent(TrainedStudent):
    """One student's training and its metrics."""

    metrics: ClassMetrics


@dataclass(frozen=True, kw_only=True)
class ClassReport(Header):
    """Everything that the page shows."""

    documents: int
    """Number of documents evaluated."""
    left_out: int
    """Documents of the eval split that also occur in the train split, and were not evaluated."""
    labels: tuple[str, ...]
    """The students' labels."""
    unmapped: Estimate
    """Mass of the teacher's distribution on classes that belong to none of the students' labels, as a mean."""
    teacher: ClassTeacher
    students: tuple[ClassStudent, ...]
    comparisons: tuple[ClassComparison, ...]
    """Each pair of students, compared over the same documents."""
    gap: Gap | None
    standings: tuple[Standing, ...]
    """All students, the closest to the teacher first."""


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
    cost: Cost | None = None
    """What it costs to use; None for the teacher, as the table stores it."""

    @classmethod
    def of(cls, model: ClassTeacher | ClassStudent) -> Self:
        """The line of the teacher or of a student."""
        quality = model.metrics.quality
        means = {name: None if quality is None else getattr(quality, name).mean for name in SCORES}
        cost = model.cost if isinstance(model, ClassStudent) else None
        return cls(name=model.name, kl=model.metrics.kl.mean, parameters=model.parameters, cost=cost, **means)


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
    standings: tuple[Standing, ...]
    """All students, the closest to the teacher first."""
    verdict: str | None
    """Which student is the most accurate, in a sentence; None for a single student, or without labels."""

    @property
    def measured(self) -> str:
        """How much was measured, in words."""
        return f"{self.documents:,} held-out documents"

    @classmethod
    def of(cls, report: ClassReport, html: Path, json: Path) -> Self:
        """The main numbers of a report that was written."""
        return cls(
            html=str(html),
            json=str(json),
            table=report.table,
            version=report.version,
            documents=report.documents,
            left_out=report.left_out,
            unmapped=report.unmapped.mean,
            teacher=ClassScore.of(report.teacher),
            students=tuple(map(ClassScore.of, report.students)),
            standings=report.standings,
            verdict=verdict(report),
        )


def to_json(report: ClassReport) -> bytes:
    """The report as JSON."""
    return TypeAdapter(ClassReport).dump_json(report, indent=2)


def to_html(report: ClassReport) -> str:
    """The report as one self-contained page."""
    return render("classifier_report.html.j2", report, verdict(report), drawings_of(detailed(report)))


def drawings_of(report: ClassReport) -> dict[str, str]:
    """Each chart's SVG by name, without charts that have no data."""
    from softlabel.pipeline.evaluation.report import charts

    students = report.students
    drawings = by_cost(students, "KL to the teacher (nats)")
    for quantity, label in (("eval_accuracy", "accuracy"), ("eval_kl", "KL to the teacher (nats)")):
        if curves := histories(students, quantity):
            drawings[quantity] = charts.by_step(curves, label)
    if losses := histories(students, "loss"):
        drawings["loss"] = charts.by_step(losses, "training loss (nats)", smooth=True)
    models: list[ClassTeacher | ClassStudent] = [report.teacher, *students]
    bars = [
        charts.Bar(index, model.name, [getattr(model.metrics.quality, score) for score in SCORES])
        for index, model in enumerate(models, start=-1)
        if model.metrics.quality is not None
    ]
    if bars:
        drawings["scores"] = charts.by_score(bars, ["accuracy", "precision", "recall", "F1"])
    lines = [
        charts.reliability_of(index, model.name, each.bins)
        for index, model in enumerate(models, start=-1)
        if (each := model.metrics.calibration) is not None
    ]
    if lines:
        drawings["calibration"] = charts.reliability(lines, "label", "how often it is right")
    for column, groups in students[0].metrics.by_column.items():
        names = [group.name for group in groups]
        found = [charts.Bar(index, s.name, _scored(s.metrics.by_column[column])) for index, s in enumerate(students)]
        label = "KL to the teacher (nats)" if students[0].metrics.quality is None else "accuracy"
        drawings[f"by {column}"] = charts.by_group(found, names, label)
    if len(report.labels) <= DRAWN_LABELS:
        for index, student in enumerate(students):
            if student.metrics.quality is not None:
                confusion = student.metrics.quality.confusion
                drawings[f"confusion-{index}"] = charts.confusion(index, confusion, report.labels, student.name)
    return drawings


def _scored(groups: Sequence[ClassGroup]) -> list[Estimate]:
    """Each group's accuracy or, where no document of a group has a label, nothing; its KL if none has any."""
    if all(group.quality is None for group in groups):
        return [group.kl for group in groups]
    return [NOTHING if group.quality is None else group.quality.accuracy for group in groups]


def verdict(report: ClassReport) -> str | None:
    """The most accurate student, and whether the difference is real; None for a single student, or without labels."""
    scored = [(s.metrics.quality.accuracy.mean, s.name) for s in report.students if s.metrics.quality is not None]
    if len(scored) < 2:
        return None
    (best, name), (second, runner_up) = sorted(scored, key=lambda score: score[0], reverse=True)[:2]
    found = next(each for each in report.comparisons if {each.student, each.other} == {name, runner_up}).accuracy
    assert found is not None
    half = reach(found)
    if half is None:
        return (
            f"There are too few documents to tell which is more accurate: {name} ({best:.1%}) "
            f"or {runner_up} ({second:.1%})."
        )
    distance = f"{abs(found.mean) * 100:.1f} ± {half * 100:.1f} percentage points over the same documents"
    if not found.is_real:
        return (
            f"It can't be told which is more accurate, {name} ({best:.1%}) or {runner_up} ({second:.1%}): they differ "
            f"by {distance}, maybe by chance."
        )
    return (
        f"{name} is the most accurate: {best:.1%} of the documents; {runner_up} is next with {second:.1%}. The "
        f"difference is real: {distance}."
    )
