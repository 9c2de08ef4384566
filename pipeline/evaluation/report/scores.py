"""The main numbers of an evaluation: what the terminal shows, and what ``evaluate`` returns."""

import re
from dataclasses import dataclass, fields, is_dataclass
from math import isfinite, nan
from pathlib import Path
from typing import Any, Self

from softlabel.pipeline.evaluation.bootstrap import Estimate
from softlabel.pipeline.evaluation.cost import Cost
from softlabel.pipeline.evaluation.report.content import Report, StudentSummary, TeacherSummary, TrainedStudent, reach
from softlabel.pipeline.evaluation.report.verdict import verdict
from softlabel.pipeline.evaluation.standings import Standing
from softlabel.pipeline.evaluation.tasks import TaskScore


@dataclass(frozen=True)
class Score:
    """One line of the report's first table."""

    name: str
    perplexity: float
    bits_per_byte: float | None
    """Cross-entropy in bits per byte of the text."""
    kl: float
    """Forward KL from the teacher, nats per position."""
    kl_reach: float | None
    """Half of its 95 % interval over documents; None for too few documents."""
    agreement: float | None
    """Share of positions with the teacher's most likely token; None if the table has no head."""
    acceptance: float | None
    """Rate at which the teacher would accept the student's tokens in speculative decoding."""
    parameters: int | None
    cost: Cost | None = None
    """What it costs to use; None for the teacher, as the table stores it."""
    tasks: tuple[TaskScore, ...] = ()
    """Scores on tasks of lm-eval."""

    @classmethod
    def of(cls, student: StudentSummary) -> Self:
        """The line of a student."""
        metrics = student.metrics
        return cls(
            name=student.name,
            perplexity=metrics.perplexity.mean,
            bits_per_byte=_mean(metrics.bits_per_byte),
            kl=metrics.kl.mean,
            kl_reach=reach(metrics.kl),
            agreement=_mean(metrics.agreement),
            acceptance=_mean(metrics.acceptance),
            parameters=student.parameters,
            cost=student.cost,
            tasks=student.tasks,
        )

    @classmethod
    def of_teacher(cls, teacher: TeacherSummary) -> Self:
        """The line of the teacher, as the table stores it."""
        metrics, parameters = teacher.metrics, teacher.parameters
        return cls(teacher.name, metrics.perplexity.mean, _mean(metrics.bits_per_byte), 0.0, None, 1.0, 1.0, parameters)


@dataclass(frozen=True)
class EvaluationReport:
    """The main numbers of an evaluation, and the paths of its full report."""

    html: str
    json: str
    table: str
    version: int
    sequences: int
    positions: int
    documents: int
    left_out: int
    """Sequences of the eval split that also occur in the train split."""
    left_out_documents: int
    """Further sequences of the eval split whose document also occurs in the train split."""
    teacher: Score
    students: tuple[Score, ...]
    standings: tuple[Standing, ...]
    """All students, the closest to the teacher first."""
    verdict: str
    """Which student is closest to the teacher, and whether the difference is real, in a sentence or two."""
    kl_kind: str
    """How the KL was estimated: see ``pipeline.evaluation.figures.Metrics.kl_kind``."""

    @property
    def measured(self) -> str:
        """How much was measured, in words."""
        return f"{self.positions:,} held-out positions"

    @classmethod
    def of(cls, report: Report, html: Path, json: Path) -> Self:
        """The main numbers of a report that was written."""
        return cls(
            html=str(html),
            json=str(json),
            table=report.table,
            version=report.version,
            sequences=report.sequences,
            positions=report.positions,
            documents=report.documents,
            left_out=report.left_out,
            left_out_documents=report.left_out_documents,
            teacher=Score.of_teacher(report.teacher),
            students=tuple(map(Score.of, report.students)),
            standings=report.standings,
            verdict=verdict(report),
            kl_kind=report.students[0].metrics.kl_kind,
        )


def results_of(figures: Any) -> dict[str, float]:
    """The means of some figures with the ends of their 95 % intervals, by name, as trackers show them.

    Args:
        figures: a dataclass with estimates, maybe in further dataclasses; everything else is left out.
    """
    found: dict[str, float] = {}
    for field in fields(figures):
        value = getattr(figures, field.name)
        if isinstance(value, Estimate):
            low, high = value.interval or (nan, nan)
            name = f"evaluation/{field.name}"
            found |= {name: value.mean, f"{name}_low": low, f"{name}_high": high}
        elif is_dataclass(value):
            found |= results_of(value)
    return {name: value for name, value in found.items() if isfinite(value)}


def use_of(student: TrainedStudent) -> dict[str, float]:
    """What a student costs to use, and its scores on tasks, by name, as trackers show them."""
    found = {f"evaluation/{score.task}/{score.metric}": score.value for score in student.tasks}
    if student.cost is not None:
        found["evaluation/bytes"] = student.cost.bytes
        if speed := student.cost.speed:
            rates = {"prefill": speed.prefill, "decode": speed.decode, "documents": speed.documents}
            found |= {f"evaluation/{name}_per_second": rate.median for name, rate in rates.items() if rate}
            found["evaluation/memory"] = speed.memory
    plain = {re.sub(r"[^\w./ -]", "_", name, flags=re.ASCII): value for name, value in found.items()}
    return {name: value for name, value in plain.items() if isfinite(value)}


def _mean(value: Estimate | None) -> float | None:
    return None if value is None else value.mean
