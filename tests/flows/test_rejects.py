"""``softlabel rejects`` on the command line."""

import json
from pathlib import Path

import pytest

from tests.flows.commands import shown, softlabel
from tests.storage.tables import identity, make_table

HOSTILE = "\x1b[31m\u202e[bold]"


@pytest.fixture
def table(tmp_path: Path) -> str:
    """A table whose newest capture could not use four documents."""
    location = make_table(tmp_path / "table", identity()).location
    rejected = [("a\udcff", "it is empty"), ("b", "it is empty"), (HOSTILE, HOSTILE), ("c", "it is empty")]
    lines = [json.dumps({"document_id": name, "reason": reason}) for name, reason in rejected]
    Path(location, "_softlabel", "rejects.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return location


def test_documents_are_listed_for_people_and_nothing_acts_on_the_terminal(
    table: str, capsys: pytest.CaptureFixture[str]
):
    text = shown(capsys, "rejects", table)
    assert "4 documents not used by the newest capture, 0 cut short" in text
    assert "3 it is empty a\\udcff, b, c" in text
    assert "1 \\x1b[31m\\u202e[bold] \\x1b[31m\\u202e[bold]" in text
    assert not {"\x1b", "\u202e"} & set(text)
    text = shown(capsys, "rejects", table, "--reason", "EMPTY", "--limit", 1)
    assert "it is empty" in text
    assert "[bold]" not in text


def test_names_that_are_no_text_can_be_listed_for_programs(table: str, capsys: pytest.CaptureFixture[str]):
    code, found, _ = softlabel(capsys, "rejects", table)
    assert (code, found["matching"], found["documents"][0]["document_id"]) == (0, 4, "a\\udcff")


def test_a_table_without_rejects_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert "could use every document" in shown(capsys, "rejects", make_table(tmp_path / "table", identity()).location)
