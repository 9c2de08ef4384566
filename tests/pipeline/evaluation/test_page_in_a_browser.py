"""The report in a real browser: it fits every window and sheet, asks for nothing, and runs nothing."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from softlabel.pipeline.evaluation.report.page import to_html
from softlabel.pipeline.evaluation.standings import Gap
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


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    students = [student(HOSTILE, 1.5, command=f"softlabel train {HOSTILE}")]
    students += [student(name, 2.0) for name in ("an-unusually-long-name-of-a-student-that-does-not-end", "a" * 60)]
    found = tmp_path_factory.mktemp("report") / "report.html"
    found.write_text(to_html(report(*students, student("control", 3.0), gap=Gap("control", None))))
    return found


def style(page: Page, name: str) -> str:
    return str(page.value(f"getComputedStyle(document.body).{name}"))


@pytest.mark.parametrize("width", [360, 768, 1400])
@pytest.mark.parametrize("dark", [True, False])
def test_the_page_fits_asks_for_nothing_and_runs_nothing(width: int, dark: bool, opened: Page, path: Path):
    opened.visit(path, width, dark=dark)
    assert opened.overflow <= 0
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
    assert len(heights) > 6
    assert min(heights) > 10
    cut = "[...document.querySelectorAll('.wide')].filter(e => e.scrollWidth > e.clientWidth + 1).length"
    assert opened.value(cut) == 0
    assert opened.messages == []
