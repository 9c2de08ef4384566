"""The report of an evaluation: one self-contained HTML page, and the same content as JSON.

Both are written from one ``Report``; the page adds only drawings to the content of the JSON, whose fields are described
by the docstrings here and in ``summary``. Measures nothing and reads neither table nor model.

Functions that draw import ``charts`` themselves: a training needs no drawings, and matplotlib takes half a second.
"""

import json
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import unescape
from itertools import count
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any, Literal, Self

from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import TypeAdapter

from softlabel.pipeline.evaluation.bootstrap import Difference, Estimate
from softlabel.pipeline.evaluation.metrics import DRAFT
from softlabel.pipeline.evaluation.partings import Place
from softlabel.pipeline.evaluation.positions import TOP
from softlabel.pipeline.evaluation.standings import Gap, Standing
from softlabel.pipeline.evaluation.summary import Comparison, Group, Metrics, TeacherMetrics
from softlabel.pipeline.evaluation.unfinished import claim, claimed
from softlabel.pipeline.students.record import StudentRecord
from softlabel.storage.errors import UsageError
from softlabel.storage.places import durable

if TYPE_CHECKING:
    from softlabel.pipeline.evaluation.charts import Curve

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

    metrics: TeacherMetrics


@dataclass(frozen=True, kw_only=True)
class TrainedStudent:
    """How a student was trained, and what a reader should know before comparing it."""

    name: str
    folder: str
    """Folder or, of a model trained elsewhere, maybe its name on the hub."""
    kind: Literal["student", "teacher", "other"] = "student"
    """A student that softlabel trained, the table's teacher itself, or a model trained elsewhere."""
    parameters: int | None
    objective: str
    """Description of the training loss or, for another model, of what it is."""
    history: tuple[dict[str, float], ...]
    """Training and evaluation records in the order of their steps."""
    trained_on: str | None
    """TABLE@version; None if it is not known."""
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

    format: int = 1
    """Version of the report's JSON, raised when a field is dropped or changes its meaning; fields may be added."""
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
    documents: int
    """Number of documents evaluated."""
    left_out: int
    """Sequences of the eval split that also occur in the train split, and were not evaluated."""
    left_out_documents: int
    """Further sequences of the eval split whose document also occurs in the train split, and were not evaluated."""
    teacher: TeacherSummary
    students: tuple[StudentSummary, ...]
    comparisons: tuple[Comparison, ...]
    """Each pair of students, compared over the same documents."""
    gap: Gap | None
    standings: tuple[Standing, ...]
    """All students, the closest to the teacher first."""
    places: tuple[Place, ...]
    """Some positions at which the first student parts from the teacher."""


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
    """How the KL was estimated: see ``pipeline.evaluation.summary.Metrics.kl_kind``."""

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


def column_costs(sizes: Mapping[str, int], positions: int) -> tuple[ColumnBytes, ...]:
    """Sizes by column, the largest first.

    Args:
        sizes: bytes of each column over the whole table.
        positions: captured positions of the whole table.
    """
    largest_first = sorted(sizes.items(), key=lambda item: (-item[1], item[0]))
    return tuple(ColumnBytes(name, size, size / positions) for name, size in largest_first)


def reach(value: Estimate | None) -> float | None:
    """Half of a 95 % interval; None if there is none."""
    return None if value is None or value.interval is None else (value.interval[1] - value.interval[0]) / 2


REPORT_FILES = ("report.html", "report.json")
"""Files that an evaluation writes."""


def prepare(folder: Path, table: str, students: Sequence[str], *, dry_run: bool = False) -> Path:
    """The folder for a report, which is created, so that an unwritable one is found before anything is measured.

    It is the given one or, if that has the report of another table or of other students, the first with a number after
    its name that has not. A dry run creates none, and only looks at the permissions.

    Raises:
        UsageError: if the folder can't be created.
    """
    what = {"table": table, "students": sorted(students)}
    with _write_errors(folder):
        for number in count(1):
            place = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
            if dry_run:
                durable.require_permission(place)
            else:
                durable.make_folder(place)
            if next(found for found in _abouts(place, what, dry_run) if found is not None) == what:
                return place
    raise AssertionError


def _abouts(folder: Path, what: dict[str, Any], dry_run: bool) -> Iterator[Mapping[str, Any] | None]:
    """What a folder is about: by its report, by its unfinished evaluation, or by the one that begins there now."""
    yield _reported(folder)
    yield claimed(folder)
    yield what if dry_run else claim(folder, what)
    yield {}


def _reported(folder: Path) -> dict[str, Any] | None:
    """What the report in a folder is about; None without a report."""
    try:
        report = json.loads((folder / "report.json").read_bytes())
        return {"table": report["table"], "students": sorted(student["folder"] for student in report["students"])}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        return {}


def write(page: str, content: bytes, folder: Path) -> tuple[Path, Path]:
    """Write report.html and report.json, each atomically, and return their paths.

    Raises:
        UsageError: if the folder can't be written to.
    """
    html, json = (folder / name for name in REPORT_FILES)
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
    return render("report.html.j2", report, verdict(report), _drawings(report))


def render(template: str, report: Any, verdict: str | None, drawings: Mapping[str, str]) -> str:
    """Render one of the templates of this package.

    Args:
        template: file name of the template.
        report: content of the page: a ``Report`` or ``ClassReport``.
        verdict: sentence to begin with; None to leave it out.
        drawings: SVG by name.
    """
    from softlabel.pipeline.evaluation.charts import SERIES

    templates = Environment(
        loader=PackageLoader("softlabel.pipeline.evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {
        "visible": _visible,
        "count": _count,
        "short": _short,
        "flat": _flat,
        "combine": operator.or_,
        "reach": reach,
    }
    return templates.get_template(template).render(
        report=report,
        title=_title([student.name for student in report.students], report.teacher.name),
        series=SERIES,
        verdict=verdict,
        drawings=drawings,
        total=sum(column.bytes_per_position for column in report.columns),
        draft=DRAFT,
        top=TOP,
        command=_command(report),
    )


def _command(report: Header) -> str:
    """The command that makes this report again."""
    given = report.config
    models = " ".join(quote(str(name)) for name in given.get("students", ()))
    more = "".join(f" --{name} {quote(given[name])}" for name in ("control", "reference") if given.get(name))
    more += "".join(f" --by {quote(name)}" for name in given.get("by", ()))
    return f"softlabel evaluate {quote(f'{report.table}@{report.version}')} {models}{more}"


def _drawings(report: Report) -> dict[str, str]:
    """Each chart's SVG by name, without charts that have no data."""
    from softlabel.pipeline.evaluation import charts

    drawings, students, metrics = {}, report.students, [student.metrics for student in report.students]
    sized = [
        charts.Dot(index, student.name, student.parameters, student.metrics.kl.mean, reach(student.metrics.kl))
        for index, student in enumerate(students)
        if student.parameters
    ]
    if len(sized) > 1:
        drawings["size"] = charts.by_size(sized, "KL to the teacher (nats)")
    losses = histories(students, "loss")
    if losses:
        drawings["loss"] = charts.by_step(losses, "training loss (nats)", smooth=True)
    divergences = histories(students, "eval_kl")
    if divergences:
        drawings["eval_kl"] = charts.by_step(divergences, "KL to the teacher (nats)")
    bins = metrics[0].by_entropy
    if bins:
        curves = _curves(report, [each.by_entropy for each in metrics])
        edges, counts = [(b.low or 0.0, b.high or 0.0) for b in bins], [b.positions for b in bins]
        drawings["entropy"] = charts.by_entropy(curves, edges, counts, "KL to the teacher (nats)")
    if len(metrics[0].by_position) > 1:
        curves = _curves(report, [each.by_position for each in metrics])
        drawings["position"] = charts.by_position(curves, "KL to the teacher (nats)")
    lines = [
        charts.reliability_of(index, name, each.bins)
        for index, name, each in [
            (-1, report.teacher.name, report.teacher.metrics.calibration),
            *((index, student.name, student.metrics.calibration) for index, student in enumerate(students)),
        ]
        if each is not None
    ]
    if lines:
        drawings["calibration"] = charts.reliability(lines)
    for column in metrics[0].by_column:
        names = [group.name for group in metrics[0].by_column[column]]
        bars = [
            charts.Bar(index, student.name, [group.kl for group in student.metrics.by_column[column]])
            for index, student in enumerate(students)
        ]
        drawings[f"by {column}"] = charts.by_group(bars, names, "KL to the teacher (nats)")
    return drawings


def _curves(report: Report, groups: Sequence[Sequence[Group]]) -> "list[Curve]":
    """Each student's KL over the middles of some ranges."""
    from softlabel.pipeline.evaluation.charts import Curve

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
    from softlabel.pipeline.evaluation.charts import Curve

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


def verdict(report: Report) -> str:
    """The student closest to the teacher, and whether the difference is real, in a sentence or two."""
    measured = [student for student in report.students if student.kind != "teacher"] or report.students
    best, *others = sorted(measured, key=lambda student: student.metrics.kl.mean)
    at_least = "at least " if best.metrics.kl_kind == "lower bound" else ""
    kl = f"{at_least}{best.metrics.kl.mean:.3f}"
    if not others:
        return f"{best.name} is {kl}{_plus_minus(best.metrics.kl)} nats of KL per position from {report.teacher.name}."
    second = others[0]
    found = _difference(report, second.name, best.name)
    both = f"{best.name} ({kl} nats of KL per position) or {second.name} ({second.metrics.kl.mean:.3f})"
    if found.interval is None:
        return f"There are too few documents to tell which is closer to the teacher: {both}."
    distance = f"{found.mean:.3f}{_plus_minus(found)} nats over the same {report.documents:,} documents"
    if not found.is_real:
        return f"It can't be told which is closer to the teacher, {both}: they differ by {distance}, maybe by chance."
    return (
        f"{best.name} is the closest to the teacher: {kl} nats of KL per position, "
        f"{1 - best.metrics.kl.mean / second.metrics.kl.mean:.0%} below {second.name} "
        f"({second.metrics.kl.mean:.3f}). The difference is real: {distance}."
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


def _plus_minus(value: Estimate) -> str:
    half = reach(value)
    return "" if half is None else f" ± {half:.3f}"


def _mean(value: Estimate | None) -> float | None:
    return None if value is None else value.mean


def _count(number: int | None) -> str:
    return "—" if number is None else f"{number:,}"


def _visible(token: str) -> str:
    """A token whose line ends and outer spaces can be seen."""
    inner = token.strip(" ")
    left = len(token) - len(token.lstrip(" "))
    return ("␣" * left + inner + "␣" * (len(token) - len(inner) - left)).replace("\n", "↵").replace("\t", "⇥")


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
