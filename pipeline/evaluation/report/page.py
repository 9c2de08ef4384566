"""The page of a report: one self-contained HTML file, which adds only drawings to the content of the JSON."""

import operator
import re
from collections.abc import Mapping, Sequence
from html import unescape
from pathlib import Path
from shlex import quote
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from softlabel.pipeline.config.evaluate import EvaluateConfig
from softlabel.pipeline.config.flags import flags_of
from softlabel.pipeline.evaluation.metrics import DRAFT
from softlabel.pipeline.evaluation.positions import TOP
from softlabel.pipeline.evaluation.report.content import Header, Report, fixed, reach
from softlabel.pipeline.evaluation.report.detail import detailed
from softlabel.pipeline.evaluation.report.drawings import drawings_of
from softlabel.pipeline.evaluation.report.verdict import verdict
from softlabel.pipeline.evaluation.standings import in_words
from softlabel.storage.errors import printable

_ALONE = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
"""What an SVG file needs, and an SVG element of a page does not."""


def to_html(report: Report) -> str:
    """The report as one self-contained page."""
    return render("report.html.j2", report, verdict(report), drawings_of(detailed(report)))


def render(template: str, report: Any, verdict: str | None, drawings: Mapping[str, str]) -> str:
    """Render one of the templates of this package.

    Args:
        template: file name of the template.
        report: content of the page: a ``Report`` or ``ClassReport``.
        verdict: sentence to begin with; None to leave it out.
        drawings: SVG by name.
    """
    from softlabel.pipeline.evaluation.report.charts import SERIES

    templates = Environment(
        loader=PackageLoader("softlabel.pipeline.evaluation.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_safe,
    )
    detail = detailed(report)
    templates.filters |= {
        "in_words": in_words,
        "fixed": fixed,
        "visible": _visible,
        "count": _count,
        "short": _short,
        "size": _size,
        "flat": _flat,
        "combine": operator.or_,
        "reach": reach,
        "by_column": lambda students, column: [student.metrics.by_column[column] for student in students],
    }
    return templates.get_template(template).render(
        report=report,
        detail=detail,
        place_of={student.name: place for place, student in enumerate(detail.students)},
        warnings=_warnings(report.students),
        title=_title([student.name for student in report.students], report.teacher.name),
        series=SERIES,
        verdict=verdict,
        drawings=drawings,
        total=sum(column.bytes_per_position for column in report.columns),
        draft=DRAFT,
        top=TOP,
        commands=[*(student.command for student in report.students if student.command), _command(report)],
    )


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


def _command(report: Header) -> str:
    """The command that makes this report again."""
    config = EvaluateConfig.model_validate({"students": (), **report.config, "table": report.table})
    models = map(quote, config.students)
    return " ".join(["softlabel evaluate", quote(f"{report.table}@{report.version}"), *models, *flags_of(config)])


def _title(students: Sequence[str], teacher: str) -> str:
    who = " and ".join(students) if len(students) < 3 else f"{len(students)} students"
    return f"{who} against {teacher}"


def _safe(value: Any) -> Any:
    """Text in which nothing is invisible, or acts on the text beside it; what is markup already stays as it is."""
    return printable(value, "\n\t") if isinstance(value, str) and not isinstance(value, Markup) else value


def _warnings(students: Sequence[Any]) -> dict[str, list[str]]:
    """Names of the students that each warning is about."""
    found: dict[str, list[str]] = {}
    for student in students:
        for warning in student.warnings:
            found.setdefault(warning, []).append(student.name)
    return found


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


def _size(bytes: int | None) -> str:
    """134515008 bytes as 134.5 MB."""
    if bytes is None:
        return "—"
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if bytes >= size:
            return f"{bytes / size:.1f} {unit}"
    return f"{bytes} B"


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
