"""The report in a real browser: it fits every window and sheet, asks for nothing, and runs nothing."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from softlabel.pipeline.evaluation.classifier_metrics import compare, compared, mean
from softlabel.pipeline.evaluation.report.classifier_report import ClassReport, ClassStudent, ClassTeacher
from softlabel.pipeline.evaluation.report.classifier_report import to_html as class_page
from softlabel.pipeline.evaluation.report.content import column_costs
from softlabel.pipeline.evaluation.report.page import to_html
from softlabel.pipeline.evaluation.standings import Gap, Use, standings_of
from tests.browser import Page, browser
from tests.pipeline.evaluation.test_report import HOSTILE, report, student

pytestmark = pytest.mark.long

LIGHT, DARK = "rgb(255, 255, 255)", "rgb(20, 23, 27)"
INK = "rgb(27, 30, 35)"
SHEET = 680
"""Pixels between the margins of a sheet of A4."""


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("browser")) as page:
        yield page


LONG = "an-unusually-long-name-of-a-student-that-does-not-end"


def language_models(more: int = 0) -> str:
    students = [student(HOSTILE, 1.5, command=f"softlabel train {HOSTILE}")]
    students += [student(name, 2.0) for name in (LONG, "a" * 60, *map("student {}".format, range(more)))]
    return to_html(report(*students, student("control", 3.0), gap=Gap("control", None)))


def classifiers(more: int = 0) -> str:
    rng, names = np.random.default_rng(0), ("a label", HOSTILE, "c")
    labels, groups = rng.integers(0, 3, 300), {"source": (("books", HOSTILE), rng.integers(0, 2, 300))}
    logprobs = [np.log(rng.dirichlet([0.5] * 3, 300)).astype(np.float32) for _ in range(4 + more)]
    teacher, *measured = (compare(each, labels, logprobs[0], names, groups) for each in logprobs)
    students = [HOSTILE, LONG, "control", *map("student {}".format, range(more))]
    told = {"parameters": 9, "objective": "x", "history": (), "trained_on": None, "config": {}, "circumstances": {}}
    pairs = compared(students, measured)
    content = ClassReport(
        **{"table": "t", "version": 3, "created": "2026", "columns": column_costs({"key": 9}, 9), "identity": {"a": 1}},
        **{
            "circumstances": {"torch": "2"},
            "config": {},
            "documents": 300,
            "left_out": 3,
            "labels": names,
            "gap": None,
        },
        unmapped=mean(rng.random(300)),
        teacher=ClassTeacher("teacher", 9, teacher.metrics),
        students=tuple(
            ClassStudent(name=name, folder=name, metrics=each.metrics, **told)
            for name, each in zip(students, measured, strict=True)
        ),
        comparisons=pairs,
        standings=standings_of(
            students,
            [each.metrics.kl for each in measured],
            pairs,
            [None] * len(students),
            [Use(9, None)] * len(students),
        ),
    )
    return class_page(content)


PAGES = {
    "language models": language_models,
    "classifiers": classifiers,
    "many language models": lambda: language_models(21),
    "many classifiers": lambda: classifiers(9),
}
OUTSIDE = """[...document.querySelectorAll('svg')].flatMap(svg => {
  const all = svg.getBoundingClientRect();
  const out = r => r.left < all.left - 1 || r.right > all.right + 1 || r.top < all.top - 1 || r.bottom > all.bottom + 1;
  return [...svg.querySelectorAll('text')].filter(e => out(e.getBoundingClientRect())).map(e => e.textContent);
})"""
"""Labels that a drawing has no room for."""


@pytest.fixture(scope="module", params=PAGES.values(), ids=PAGES)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("report") / "report.html"
    found.write_text(request.param())
    return found


def style(page: Page, name: str) -> str:
    return str(page.value(f"getComputedStyle(document.body).{name}"))


@pytest.mark.parametrize("width", [360, 768, 1400])
@pytest.mark.parametrize("dark", [True, False])
def test_the_page_fits_asks_for_nothing_and_runs_nothing(width: int, dark: bool, opened: Page, path: Path):
    opened.visit(path, width, dark=dark)
    assert opened.overflow <= 0
    assert opened.value(OUTSIDE) == []
    assert (opened.messages, opened.outside) == ([], [])
    assert opened.value("document.scripts.length") == 0
    assert opened.value("document.body.textContent.split('<script>').length") > 6
    assert style(opened, "backgroundColor") == (DARK if dark else LIGHT)


@pytest.mark.parametrize("dark", [True, False])
def test_a_printed_page_is_whole_and_dark_on_light(dark: bool, opened: Page, path: Path):
    opened.visit(path, SHEET, dark=dark, media="print")
    assert opened.overflow <= 0
    assert (style(opened, "backgroundColor"), style(opened, "color")) == (LIGHT, INK)
    folded = "[...document.querySelectorAll('details > :not(summary)')].map(e => e.getBoundingClientRect().height)"
    heights = opened.value(folded)
    assert len(heights) > 4
    assert min(heights) > 10
    cut = "[...document.querySelectorAll('.wide')].filter(e => e.scrollWidth > e.clientWidth + 1).length"
    assert opened.value(cut) == 0
    assert opened.messages == []
