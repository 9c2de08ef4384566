"""``softlabel reprocess`` on the command line: its output, its errors, and its entries in the history."""

from pathlib import Path

import pytest

from softlabel.flows.cli import run
from softlabel.storage.records.versions import pin
from softlabel.storage.table import Table
from tests.flows.commands import softlabel
from tests.storage.tables import add, identity, make_table, names_in


@pytest.fixture
def table(tmp_path: Path) -> str:
    made = make_table(tmp_path / "table", identity())
    add(made, [f"a{i}" for i in range(20)])
    return made.location


@pytest.mark.usefixtures("prefect")
def test_a_smaller_table_is_made_and_reported(table: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, report, err = softlabel(
        capsys, "reprocess", table, tmp_path / "small", "--selection.max-k", 4, "--where", "tokens > 4"
    )
    assert (code, report["operation"], report["version"]) == (0, "narrow + filter", 1)
    assert report["rows"]["sequences"] + report["rows"]["dropped"] == 20
    assert "20/20 sequences" in err
    assert run(["reprocess", table, "--compact"]) == 0
    assert "0 sequences dropped" in capsys.readouterr().out


@pytest.mark.usefixtures("prefect")
def test_a_take_down_removes_documents_and_lists_what_remains(
    table: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pin(table, Table.open(table).version, tmp_path / "student")
    (tmp_path / "ids").write_text("a1\na2\n")
    assert run(["reprocess", table, "--purge", str(tmp_path / "ids")]) == 0
    shown = capsys.readouterr().out
    assert "2 documents taken down (2 of them found in the table)" in shown
    assert f"student {tmp_path}/student" in shown
    assert "these may still hold the documents or traces of them, and softlabel can't change them" in shown
    assert not {"a1", "a2"} & {*names_in(Table.open(table))}
    assert run(["history", table]) == 0
    assert "purge" in capsys.readouterr().out
    code, error, _ = softlabel(capsys, "inspect", f"{table}@1")
    assert (code, error["error"]) == (1, "PurgedError")


@pytest.mark.usefixtures("prefect")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to do"),
        (["--selection.max-k", "99"], "can't be used to narrow this table"),
        (["--purge", "ids", "--compact"], "purge can't be combined with other changes"),
        (["--shards.eval-fraction", "2"], "invalid value for shards.eval_fraction"),
        (["--where", "label IN (SELECT x FROM read_csv('/etc/passwd'))"], "            ^^^^^^\n"),
        (["--where", "tokens > 4 OR " * 5000 + "true"], "at most 50,000 are allowed"),
        (["--where", "label = \x1b[2J"], "--where label = \\x1b[2J\n"),
        (["--where", ""], "the end instead of a value"),
    ],
)
def test_wrong_usage_is_refused_and_changes_nothing(
    arguments: list[str], message: str, table: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["reprocess", table, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert Table.open(table).version == 1
