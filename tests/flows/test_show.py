"""``softlabel show`` in a terminal: readable with and without colors, and harmless whatever is in a document."""

import re
from pathlib import Path

import pytest
from rich.console import Console

from softlabel.flows.display import console, rows
from softlabel.pipeline.tables.show import Choice, Prediction, ShownRow, ShownToken, ShowReport
from tests.flows.commands import shown, softlabel
from tests.pipeline.captured import make_table

HOSTILE = "\x1b[31m\u202e[bold]⟧\r"


def token(text: str, probability: float | None = None, reading: str | None = None, **more: object) -> ShownToken:
    choices = (Choice(1, " the", 0.6), Choice(2, HOSTILE, 0.2), Choice(3, "\n", 0.05))
    predictions = () if probability is None else (Prediction(choices, 2, 1.5, 0.15, 3),)
    captured = probability is not None
    return ShownToken(2, text, text if reading is None else reading, False, captured, probability, predictions)


def report(*tokens: ShownToken, **row: object) -> ShowReport:
    given = {"label": None, "carried": {HOSTILE: HOSTILE}, "classes": (), "text": 1, "texts": 2} | row
    shown_row = ShownRow("t@3", HOSTILE, 1, 3, "train", fingerprint="f", tokens=tokens, positions=2, **given)
    return ShowReport("t", 3, ("teacher",), (shown_row,), 7, 100, None)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Console:
    """A terminal with colors, 100 cells wide, whose output can be read."""
    made = Console(
        record=True, highlight=False, soft_wrap=True, width=100, force_terminal=True, color_system="truecolor"
    )
    monkeypatch.setattr(rows, "console", made)
    monkeypatch.setattr(console, "console", made)
    return made


def test_what_is_captured_and_what_was_expected_can_be_read_without_colors(terminal: Console):
    rows.show_show(report(token("user: "), token("so", 0.7), token("\n", 0.002), token("end")))
    lines = terminal.export_text(styles=False).splitlines()
    assert "t (version 3) 1 of 7 rows" in lines
    assert any("text 1 of 2 · chunk 2 of 3 · train · 4 tokens" in line for line in lines)
    assert "  | user: ⟦so" in lines
    assert "  | ⟧end" in lines
    [line] = [line for line in lines if line.startswith("    1 ")]
    assert re.split(r"\s{2,}", line.strip())[:6] == ["1", '"so"', "70.0%", "2", "15.0%", '" the" 60.0%']
    assert lines[-1].split(maxsplit=1) == ["3", '1 token not captured: "end"']


def test_what_the_table_does_not_know_is_a_question_mark(terminal: Console):
    unknown = ShownToken(2, "x", "x", False, True, None, (Prediction((), None, None, None, 0),))
    rows.show_show(report(unknown))
    assert terminal.export_text(styles=False).splitlines()[-1].split() == ["0", '"x"', "?", "-", "?"]


def test_the_less_the_teacher_expected_a_token_the_stronger_is_its_color(terminal: Console):
    rows.show_show(report(*(token("x", p) for p in (0.9, 0.3, 0.05, 0.001))))
    text = terminal.export_text(styles=True)
    codes = [
        re.findall(r"\x1b\[([0-9;]*)mx", line) for line in text.splitlines() if line.startswith(("\x1b[2m  | ", "  | "))
    ]
    assert len(set(codes[0])) == 4


def test_nothing_in_a_document_acts_on_the_terminal(terminal: Console):
    rows.show_show(report(token(HOSTILE), token(HOSTILE, 0.5), label=HOSTILE))
    text = terminal.export_text(styles=False)
    assert not set(text) & {"\x1b", "\u202e", "\r"}
    assert text.count("[bold]") >= 5  # it is no markup
    [line] = [line for line in text.splitlines() if line.startswith("  | ")]
    assert (line.count("⟦"), line.count("⟧")) == (1, 1)


def test_a_character_of_several_tokens_is_shown_once_in_the_text_and_at_its_end_in_the_list(terminal: Console):
    rows.show_show(report(token("\\xf0\\x9f", 0.5, ""), token("\\x98\\x80", 0.5, "😀")))
    text = terminal.export_text(styles=False)
    assert "  | ⟦😀⟧" in text
    assert '"\\x98\\x80 = 😀"' in text


def test_a_list_has_as_many_tokens_as_asked_for_and_says_how_to_get_more(terminal: Console):
    many = report(*(token("a", 0.5) for _ in range(150)))
    rows.show_show(many)
    text = terminal.export_text(styles=False)
    assert "\n   99  " in text
    assert "\n  100  " not in text
    assert "--tokens 150" in text


def test_the_classes_of_a_document_are_listed(terminal: Console):
    classes = (Choice(0, "[red]law", 0.75), Choice(1, "story", 0.25))
    rows.show_show(report(token("text"), classes=classes, label="story"))
    text = " ".join(terminal.export_text(styles=False).split())
    assert "[red]law 75.0% story 25.0%" in text
    assert "captured" not in text


def test_the_command_shows_rows_for_people_for_programs_and_as_a_page(
    tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    table = make_table(tmp_path / "table", tiny_teacher, train=3, held_out=1)
    code, found, _ = softlabel(capsys, "show", table.location, "--document", "2", "--choices", 2)
    assert code == 0
    [row] = found["rows"]
    assert (row["document"], found["matching"]) == ("2", 1)
    assert len(row["tokens"][1]["predictions"][0]["choices"]) <= 2
    assert "what the teacher expected" in shown(capsys, "show", table.location)
    assert "4 rows" in shown(capsys, "show", table.location, "--where", "tokens > 1")
    page = tmp_path / "page.html"
    assert str(page) in shown(capsys, "show", table.location, "--random", 2, "--html", page)
    assert page.read_text().startswith("<!doctype html>")
    assert softlabel(capsys, "show", table.location, "--document", "nobody")[0] == 2
