"""Which models of a report its charts and wide tables show: of many, only as many as there is room for."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from softlabel.pipeline.evaluation.report.content import Report

if TYPE_CHECKING:
    from softlabel.pipeline.evaluation.report.classifier_report import ClassReport

DETAILED = 8
"""Models that charts and wide tables have room for."""

AnyReport = TypeVar("AnyReport", "Report", "ClassReport")
_Value = TypeVar("_Value")


def detailed(report: AnyReport) -> AnyReport:
    """The report with only the models that are shown in detail, in the same order.

    If there are more than ``DETAILED``, these are the first one, whose distance decides which passages are shown, the
    ends of the gap, and the best ones.
    """
    if len(report.students) <= DETAILED:
        return report
    names: list[str | None] = [report.students[0].name]
    if report.gap is not None:
        names += [report.gap.control, report.gap.reference]
    kept = list(dict.fromkeys(filter(None, [*names, *_ranked(report)])))[:DETAILED]
    numbers = [number for number, student in enumerate(report.students) if student.name in kept]
    changes: dict[str, Any] = {
        "students": _at(report.students, numbers),
        "comparisons": _among(kept, report.comparisons),
        "task_comparisons": _among(kept, report.task_comparisons),
    }
    if isinstance(report, Report):
        changes["places"] = tuple(replace(each, students=_at(each.students, numbers)) for each in report.places)
    return replace(report, **changes)


def _ranked(report: "Report | ClassReport") -> list[str]:
    """Names of the students: classifiers by their accuracy, where it is known, and others by their distance."""
    if not isinstance(report, Report):
        scored = [(each.metrics.quality.accuracy.mean, each.name) for each in report.students if each.metrics.quality]
        if scored:
            return [name for _, name in sorted(scored, key=lambda score: score[0], reverse=True)]
    return [each.student for each in report.standings]


def _among(names: Sequence[str], pairs: Sequence[Any]) -> tuple[Any, ...]:
    """The pairs of two of these students."""
    return tuple(pair for pair in pairs if {pair.student, pair.other}.issubset(names))


def _at(values: Sequence[_Value], numbers: Sequence[int]) -> tuple[_Value, ...]:
    return tuple(values[number] for number in numbers)
