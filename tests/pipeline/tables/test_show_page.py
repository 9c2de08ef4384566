"""The page of ``softlabel show``: self-contained, usable on a phone, and harmless whatever is in a document."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from softlabel.pipeline.config.show import ShowConfig
from softlabel.pipeline.tables.show import Choice, Prediction, ShowReport, show
from softlabel.pipeline.tables.show_page import to_html
from softlabel.storage.errors import UsageError
from softlabel.storage.table import Table
from tests.browser import browser
from tests.pipeline.tables.conftest import HOSTILE


@pytest.fixture(scope="module")
def page(texts: Table, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with all rows of the texts."""
    path = tmp_path_factory.mktemp("page") / "page.html"
    show(ShowConfig(table=texts.location, where="tokens > 0", limit=50, html=str(path)))
    return path


class Elements(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_nothing_in_a_document_becomes_markup(page: Path):
    elements = Elements(page.read_text()).found
    assert [tag for tag, _ in elements if tag == "script"] == ["script"] * 2  # the data and the page's own
    assert not {tag for tag, _ in elements} & {"img", "iframe", "object", "embed", "base", "form"}
    assert not [name for _, attributes in elements for name in attributes if name.startswith("on")]
    shown = page.read_text()
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    assert "\\u202e" in shown


def test_the_data_of_the_page_is_what_the_report_says(page: Path, texts: Table):
    data = re.search(r'id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    assert data is not None
    report = show(ShowConfig(table=texts.location, where="tokens > 0", limit=50))
    for row, tokens in zip(report.rows, json.loads(data[1]), strict=True):
        assert [token["id"] for token in tokens] == [token.id for token in row.tokens]
        assert ["predictions" in token for token in tokens] == [token.captured for token in row.tokens]


@pytest.mark.parametrize("text", ["</script><script>alert(1)</script>", "<!--<script>", "\u2028]]>&#60;"])
def test_no_token_or_choice_can_end_the_data_of_the_page(texts: Table, text: str):
    [row] = show(ShowConfig(table=texts.location, document="short-1")).rows
    hostile = Prediction((Choice(1, text, 0.5),), None, 1.0, 0.5, 1)
    token = replace(row.tokens[1], text=text, reading=text, predictions=(hostile,))
    page = to_html(ShowReport(text, 1, (text,), (replace(row, tokens=(token,), document=text),), 1, 1, None))
    scripts = re.findall(r"<script.*?>(.*?)</script>", page, re.DOTALL | re.IGNORECASE)
    assert len(scripts) == 2
    assert "<" not in scripts[0]
    [[found]] = json.loads(scripts[0])
    assert found["predictions"][0]["choices"][0]["text"] == text.replace("\u2028", "\\u2028")


def test_what_the_table_does_not_know_is_unknown_on_the_page(texts: Table):
    """An imported table may lack the probability of what follows, the entropy, and the mass outside the head."""
    [row] = show(ShowConfig(table=texts.location, document="short-1")).rows
    unknown = Prediction((Choice(1, "a", 0.5),), None, None, None, 1)
    tokens = tuple(replace(token, captured=True, probability=None, predictions=(unknown,)) for token in row.tokens)
    page = to_html(ShowReport("t", 1, (), (replace(row, tokens=tokens),), 1, 1, None))
    data = re.search(r'id="data">(.*?)</script>', page, re.DOTALL)
    assert data is not None
    [[first, *_]] = json.loads(data[1], parse_constant=pytest.fail)
    assert (first["probability"], first["predictions"][0]["outside"]) == (None, None)


def test_a_page_that_can_not_be_written_is_an_error_and_an_old_one_is_replaced(texts: Table, tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="page can't be written"):
        show(ShowConfig(table=texts.location, html=str(tmp_path / "file" / "page.html")))
    (tmp_path / "page.html").write_text("old")
    report = show(ShowConfig(table=texts.location, html=str(tmp_path / "page.html")))
    assert (tmp_path / "page.html").read_text() == to_html(report)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.long
def test_in_a_browser_the_page_fits_asks_for_nothing_and_shows_the_choices_of_a_token(page: Path, tmp_path: Path):
    with browser(tmp_path) as chromium:
        for width, dark, media in (
            (360, False, "screen"),
            (360, True, "screen"),
            (1280, True, "screen"),
            (800, False, "print"),
        ):
            opened = chromium.visit(page, width, dark=dark, media=media)
            assert opened.overflow <= 0
            if media == "screen":
                opened.click(".t.c3", opened.value("document.querySelectorAll('.t.c3').length") - 1)
                panel, token = (
                    opened.value(f"document.{found}.getBoundingClientRect().toJSON()")
                    for found in ("getElementById('panel')", "querySelector('.t.on')")
                )
                assert 0 <= panel["top"] < panel["bottom"] <= 740  # it is in the window, wherever the token is
                assert token["bottom"] <= panel["top"] or token["right"] <= panel["left"]
                assert "Followed with probability" in opened.value("document.getElementById('panel').innerText")
                assert opened.value("document.querySelectorAll('#panel tr').length") > 3
                assert opened.overflow <= 0
        assert opened.value("document.body.innerText").count(HOSTILE.split("\x1b")[0]) > 0
        assert opened.messages == []
        assert opened.outside == []


@pytest.mark.long
def test_in_a_browser_a_script_in_a_page_that_is_not_its_own_does_not_run(page: Path, tmp_path: Path):
    """Even if the escaping failed."""
    changed = tmp_path / "changed.html"
    changed.write_text(page.read_text().replace("<main>", "<main><script>document.title = 'ran'</script>"))
    with browser(tmp_path / "browser") as chromium:
        assert chromium.visit(changed, 360).value("document.title") != "ran"
        assert any("Content Security Policy" in message for message in chromium.messages)
