"""The sentence that a report opens with: which student is the closest to the teacher, and whether that is sure."""

from softlabel.pipeline.evaluation.bootstrap import Difference, Estimate
from softlabel.pipeline.evaluation.report.content import Report, fixed, reach


def verdict(report: Report) -> str:
    """The student closest to the teacher, and whether the difference is real, in a sentence or two."""
    measured = [student for student in report.students if student.kind != "teacher"] or report.students
    best, *others = sorted(measured, key=lambda student: student.metrics.kl.mean)
    at_least = "at least " if best.metrics.kl_kind == "lower bound" else ""
    kl = f"{at_least}{fixed(best.metrics.kl.mean, 3)}"
    if not others:
        return f"{best.name} is {kl}{_plus_minus(best.metrics.kl)} nats of KL per position from {report.teacher.name}."
    second = others[0]
    found = _difference(report, second.name, best.name)
    both = f"{best.name} ({kl} nats of KL per position) or {second.name} ({fixed(second.metrics.kl.mean, 3)})"
    if found.interval is None:
        return f"There are too few documents to tell which is closer to the teacher: {both}."
    distance = f"{fixed(found.mean, 3)}{_plus_minus(found)} nats over the same {report.documents:,} documents"
    if not found.is_real:
        return f"It can't be told which is closer to the teacher, {both}: they differ by {distance}, maybe by chance."
    less = 1 - best.metrics.kl.mean / second.metrics.kl.mean
    return (
        f"{best.name} is the closest to the teacher: {kl} nats of KL per position, "
        f"{_share(less)} below {second.name} "
        f"({fixed(second.metrics.kl.mean, 3)}). The difference is real: {distance}."
    )


def _difference(report: Report, student: str, other: str) -> Difference:
    """How much larger the first student's KL is, whichever of the two the report compares with the other."""
    for found in report.comparisons:
        if (found.student, found.other) == (student, other):
            return found.kl
        if (found.student, found.other) == (other, student):
            interval = None if found.kl.interval is None else (-found.kl.interval[1], -found.kl.interval[0])
            return Difference(-found.kl.mean, found.kl.error, interval)
    raise AssertionError("every pair of students is compared")


def _share(less: float) -> str:
    return "more than 99%" if less > 0.99 else f"{less:{'.0%' if less > 0.01 else '.1%'}}"


def _plus_minus(value: Estimate) -> str:
    half = reach(value)
    return "" if half is None else f" ± {fixed(half, 3, value.mean)}"
