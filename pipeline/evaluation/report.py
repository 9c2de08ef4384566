"""The report of an evaluation: one self-contained HTML page, and the same content as JSON.

Both are written from one ``Report``; the page adds only drawings to the content of the JSON. Measures nothing and reads
neither table nor model.
"""

import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import unescape
from math import exp
from pathlib import Path
from typing import Any, Self

from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import TypeAdapter

from softlabel.pipeline.evaluation import charts
from softlabel.pipeline.evaluation.charts import Curve
from softlabel.pipeline.evaluation.metrics import MeanWithError, Metrics
from softlabel.pipeline.students.record import StudentRecord
from softlabel.storage.errors import UsageError
from softlabel.storage.places import durable

_ALONE = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
"""What an SVG file needs, and an SVG element of a page does not."""


@dataclass(frozen=True)
class NamedTeacher:
    """What the table's history says about its teacher."""

    name: str
    parameters: int | None


@dataclass(frozen=True)
class TeacherSummary(NamedTeacher):
    """The teacher's metrics on the same positions, as the table stores them."""

    cross_entropy: MeanWithError
    perplexity: MeanWithError
    entropy: MeanWithError
    """Mean entropy of its distributions, in nats: the minimum of any student's cross-entropy with the teacher."""


@dataclass(frozen=True, kw_only=True)
class TrainedStudent:
    """How a student was trained, and what a reader should know before comparing it."""

    name: str
    folder: str
    parameters: int
    objective: str
    """Description of the training loss."""
    history: tuple[dict[str, float], ...]
    """Training and evaluation records in the order of their steps."""
    trained_on: str
    """TABLE@version."""
    runs: tuple[str, ...] = ()
    """The steps of each run, if there were several."""
    config: dict[str, Any]
    circumstances: dict[str, Any]
    warnings: tuple[str, ...] = ()

    @classmethod
    def of(cls, name: str, folder: str, record: StudentRecord, warnings: Sequence[str]) -> Self:
        """A student as its record describes it."""
        return cls(
            name=name,
            folder=folder,
            parameters=record.parameters,
            objective=record.objective,
            history=record.history,
            trained_on=f"{record.table.location}@{record.table.version}",
            runs=record.runs_in_words,
            config=record.config.model_dump(mode="json"),
            circumstances=dict(record.circumstances),
            warnings=tuple(warnings),
        )


@dataclass(frozen=True, kw_only=True)
class StudentSummary(TrainedStudent):
    """One student's training and its metrics."""

    metrics: Metrics
    perplexity: MeanWithError


@dataclass(frozen=True)
class ColumnBytes:
    """One column's size on disk."""

    name: str
    bytes: int
    bytes_per_position: float
    """Per captured position, over the whole table."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """What every report says about the table and the evaluation."""

    table: str
    version: int
    created: str
    """Time of the evaluation, ISO 8601, UTC."""
    columns: tuple[ColumnBytes, ...]
    identity: dict[str, Any]
    """The table's identity or, by name, that of each table of a view."""
    circumstances: dict[str, Any]
    config: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Report(Header):
    """Everything that the page shows."""

    sequences: int
    """Number of sequences evaluated."""
    positions: int
    """Number of positions evaluated."""
    left_out: int
    """Sequences of the eval split that also occur in the train split, and were not evaluated."""
    teacher: TeacherSummary
    students: tuple[StudentSummary, ...]


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

    @classmethod
    def of(cls, student: StudentSummary) -> Self:
        """The line of a student."""
        metrics = student.metrics
        agreement = metrics.agreement.mean if metrics.agreement else None
        return cls(student.name, student.perplexity.mean, metrics.kl.mean, agreement, student.parameters)


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
    verdict: str | None
    """Which student is closest to the teacher, in a sentence; None for a single student."""
    kl_kind: str
    """How the KL was estimated: see ``pipeline.evaluation.metrics.Metrics.kl_kind``."""

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
            left_out=report.left_out,
            teacher=Score(report.teacher.name, report.teacher.perplexity.mean, 0.0, 1.0, report.teacher.parameters),
            students=tuple(map(Score.of, report.students)),
            verdict=_verdict(report.students),
            kl_kind=report.students[0].metrics.kl_kind,
        )


def column_costs(sizes: Mapping[str, int], positions: int) -> tuple[ColumnBytes, ...]:
    """Sizes by column, the largest first.

    Args:
        sizes: bytes of each column over the whole table.
        positions: captured positions of the whole table.
    """
    largest_first = sorted(sizes.items(), key=lambda item: (-item[1], item[0]))
    return tuple(ColumnBytes(name, size, size / positions) for name, size in largest_first)


def perplexity(cross_entropy: MeanWithError) -> MeanWithError:
    """exp of a cross-entropy in nats, with the error propagated to first order."""
    mean = exp(cross_entropy.mean)
    return MeanWithError(mean, None if cross_entropy.error is None else mean * cross_entropy.error)


def prepare(folder: Path) -> None:
    """Create the report's folder, so that an unwritable one is found before anything is measured.

    Raises:
        UsageError: if the folder can't be created.
    """
    with _write_errors(folder):
        durable.make_folder(folder)


def write(page: str, content: bytes, folder: Path) -> tuple[Path, Path]:
    """Write report.html and report.json, each atomically, and return their paths.

    Raises:
        UsageError: if the folder can't be written to.
    """
    html, json = folder / "report.html", folder / "report.json"
    with _write_errors(folder):
        durable.write(json, content)
        durable.write(html, page.encode())
    return html, json


def pictures(page: Path) -> list[tuple[str, str]]:
    """The drawings of a page that ``write`` wrote: each with its title, as an SVG image that stands alone."""
    text = page.read_text(encoding="utf-8")
    colors = dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{3,6})", text.partition("@media")[0]))
    found = []
    for title, svg in re.findall(r"<figure><h3>(.*?)</h3>(<svg .*?</svg>)", text, re.DOTALL):
        image = re.sub(r"var\(--([a-z0-9-]+)\)", lambda role: colors[role[1]], svg)
        style = f"background: {colors['page']}; font: 10px sans-serif; stroke-linejoin: round"
        image = image.replace("<svg ", f'<svg {_ALONE} width="640" style="{style}" ', 1)
        found.append((unescape(title), image))
    return found


@contextmanager
def _write_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(
            "the report can't be written",
            expected="a writable folder, on a disk with free space",
            found=error,
            where=folder.absolute(),
            do="choose another folder for the report",
        ) from error


def to_json(report: Report) -> bytes:
    """The report as JSON; numbers that are not finite (a perplexity that overflows) become null."""
    return TypeAdapter(Report).dump_json(report, indent=2)


def to_html(report: Report) -> str:
    """The report as one self-contained page."""
    return render("report.html.j2", report, _verdict(report.students), _drawings(report.students))


def render(template: str, report: Any, verdict: str | None, drawings: Mapping[str, str]) -> str:
    """Render one of the templates of this package.

    Args:
        template: file name of the template.
        report: content of the page: a ``Report`` or ``ClassReport``.
        verdict: sentence to begin with; None to leave it out.
        drawings: SVG by name.
    """
    templates = Environment(
        loader=PackageLoader("softlabel.pipeline.evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"count": _count, "short": _short, "flat": _flat, "combine": operator.or_}
    return templates.get_template(template).render(
        report=report,
        title=_title([student.name for student in report.students], report.teacher.name),
        series=charts.SERIES,
        verdict=verdict,
        drawings=drawings,
        total=sum(column.bytes_per_position for column in report.columns),
    )


def _drawings(students: Sequence[StudentSummary]) -> dict[str, str]:
    """Each chart's SVG by name, without charts that have no data."""
    drawings = {}
    losses = histories(students, "loss")
    if losses:
        drawings["loss"] = charts.by_step(losses, "training loss (nats)", smooth=True)
    divergences = histories(students, "eval_kl")
    if divergences:
        drawings["eval_kl"] = charts.by_step(divergences, "KL to the teacher (nats)")
    bins = students[0].metrics.by_entropy
    if bins:
        edges, counts = [(b.low, b.high) for b in bins], [b.positions for b in bins]
        centres = [(low + high) / 2 for low, high in edges]
        curves = [Curve(i, s.name, centres, [b.kl for b in s.metrics.by_entropy]) for i, s in enumerate(students)]
        drawings["entropy"] = charts.by_entropy(curves, edges, counts, "KL to the teacher (nats)")
    return drawings


def histories(students: Sequence[Any], quantity: str) -> list[Curve]:
    """Each student's curve of a quantity by step, for the students that logged it."""
    curves = []
    for index, student in enumerate(students):
        records = [record for record in student.history if quantity in record]
        if records:
            steps, values = [r["step"] for r in records], [r[quantity] for r in records]
            curves.append(Curve(index, student.name, steps, values))
    return curves


def _title(students: Sequence[str], teacher: str) -> str:
    who = " and ".join(students) if len(students) < 3 else f"{len(students)} students"
    return f"{who} against {teacher}"


def _verdict(students: Sequence[StudentSummary]) -> str | None:
    """The student closest to the teacher, if the difference is significant; None for a single student."""
    if len(students) < 2:
        return None
    best, second = sorted(students, key=lambda student: student.metrics.kl.mean)[:2]
    kl, runner_up = best.metrics.kl.mean, second.metrics.kl.mean
    if not best.metrics.kl.tells_from(second.metrics.kl):
        return (
            f"There are too few sequences to tell which is closer to the teacher: {best.name} "
            f"({kl:.3f} nats of KL per position) or {second.name} ({runner_up:.3f})."
        )
    return (
        f"{best.name} is the closest to the teacher: {kl:.3f} nats of KL per position, "
        f"{1 - kl / runner_up:.0%} below {second.name} ({runner_up:.3f})."
    )


def _count(number: int | None) -> str:
    return "—" if number is None else f"{number:,}"


def _short(number: int | None) -> str:
    """134515008 as 134.5M."""
    if number is None:
        return "—"
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return str(number)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as rows of dotted name and value."""
    rows: list[tuple[str, str]] = []
    for name, value in tree.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple):
            rows.append((prefix + name, ", ".join(map(str, value))))
        else:
            rows.append((prefix + name, "—" if value is None else str(value)))
    return rows
