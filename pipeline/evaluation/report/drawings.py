"""Which charts a report has.

Functions that draw import ``charts`` themselves: a training needs no drawings, and matplotlib takes half a second.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from softlabel.pipeline.evaluation.figures import Group
from softlabel.pipeline.evaluation.report.content import Report, reach

if TYPE_CHECKING:
    from softlabel.pipeline.evaluation.report.charts import Curve


def drawings_of(report: Report) -> dict[str, str]:
    """Each chart's SVG by name, without charts that have no data."""
    from softlabel.pipeline.evaluation.report import charts

    students, metrics = report.students, [student.metrics for student in report.students]
    kl = f"KL to the teacher{', at least' if metrics[0].kl_kind == 'lower bound' else ''} (nats)"
    drawings = by_cost(students, kl)
    losses = histories(students, "loss")
    if losses:
        drawings["loss"] = charts.by_step(losses, "training loss (nats)", smooth=True)
    divergences = histories(students, "eval_kl")
    if divergences:
        drawings["eval_kl"] = charts.by_step(divergences, kl)
    bins = metrics[0].by_entropy
    if bins:
        curves = _curves(report, [each.by_entropy for each in metrics])
        edges, counts = [(b.low or 0.0, b.high or 0.0) for b in bins], [b.positions for b in bins]
        drawings["entropy"] = charts.by_entropy(curves, edges, counts, kl)
    if len(metrics[0].by_position) > 1:
        curves = _curves(report, [each.by_position for each in metrics])
        drawings["position"] = charts.by_position(curves, kl)
    lines = [
        charts.reliability_of(index, name, each.bins)
        for index, name, each in [
            (-1, report.teacher.name, report.teacher.metrics.calibration),
            *((index, student.name, student.metrics.calibration) for index, student in enumerate(students)),
        ]
        if each is not None
    ]
    if lines:
        drawings["calibration"] = charts.reliability(lines, "token", "how often it follows")
    for column in metrics[0].by_column:
        names = [group.name for group in metrics[0].by_column[column]]
        bars = [
            charts.Bar(index, student.name, [group.kl for group in student.metrics.by_column[column]])
            for index, student in enumerate(students)
        ]
        drawings[f"by {column}"] = charts.by_group(bars, names, kl)
    return drawings


def by_cost(students: Sequence[Any], ylabel: str) -> dict[str, str]:
    """The charts of the KL over the size and over the speed of students, if there are several."""
    from softlabel.pipeline.evaluation.report import charts

    drawings = {}
    speeds = [None if student.cost is None else student.cost.speed for student in students]
    for name, xlabel, values in (
        ("size", "parameters", [student.parameters for student in students]),
        ("speed", "tokens generated per second", [each and each.decode and each.decode.median for each in speeds]),
        ("speed", "documents per second", [each and each.documents and each.documents.median for each in speeds]),
    ):
        dots = [
            charts.Dot(index, student.name, value, student.metrics.kl.mean, reach(student.metrics.kl))
            for index, (student, value) in enumerate(zip(students, values, strict=True))
            if value
        ]
        if len(dots) > 1:
            drawings[name] = charts.by_cost(dots, xlabel, ylabel)
    return drawings


def _curves(report: Report, groups: Sequence[Sequence[Group]]) -> "list[Curve]":
    """Each student's KL over the middles of some ranges."""
    from softlabel.pipeline.evaluation.report.charts import Curve

    return [
        Curve(
            index,
            report.students[index].name,
            [((group.low or 0.0) + (group.high or 0.0)) / 2 for group in of_student],
            [group.kl.mean for group in of_student],
        )
        for index, of_student in enumerate(groups)
    ]


def histories(students: Sequence[Any], quantity: str) -> "list[Curve]":
    """Each student's curve of a quantity by step, for the students that logged it."""
    from softlabel.pipeline.evaluation.report.charts import Curve

    curves = []
    for index, student in enumerate(students):
        records = [record for record in student.history if quantity in record]
        if records:
            steps, values = [r["step"] for r in records], [r[quantity] for r in records]
            curves.append(Curve(index, student.name, steps, values))
    return curves
