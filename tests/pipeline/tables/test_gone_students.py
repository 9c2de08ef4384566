"""A table need not keep versions for students that were deleted; whoever might still exist stays pinned."""

import shutil
from pathlib import Path

import pytest

from softlabel.flows.cli import run
from softlabel.pipeline.config.tables import MaintainConfig
from softlabel.pipeline.tables.maintain import MaintainReport, maintain
from softlabel.storage.records import versions
from softlabel.storage.records.versions import pin, pins
from softlabel.storage.table import Table
from tests.pipeline.captured import make_table

OLD = "2020-01-01T00:00:00+00:00"


@pytest.fixture
def table(tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Table:
    """A table that students are pinned to; each line says why it stays, or that it is gone."""
    monkeypatch.setattr(versions, "now", lambda: OLD)
    table = make_table(tmp_path / "table", tiny_teacher, train=2, held_out=0)
    students = tmp_path / "students"
    for name in ("there", "unfinished.training"):
        (students / name).mkdir(parents=True)
    (tmp_path / "not-mounted").mkdir()
    for name in ("gone", "there", "unfinished"):
        pin(table.location, table.version, students / name)
    pin(table.location, table.version, tmp_path / "not-mounted" / "student")
    pin(table.location, table.version, tmp_path / "other-machine" / "student")
    pin(table.location, table.version, str(students / "gone-view"), "view")
    monkeypatch.undo()
    pin(table.location, table.version, students / "of-today")
    return table


def unpinned(report: MaintainReport) -> set[str]:
    return {Path(pin.student).name for pin in report.unpinned}


def test_only_students_that_are_surely_gone_are_unpinned(table: Table):
    before = len(pins(table.location))
    assert unpinned(maintain(MaintainConfig(table=table.location))) == set()
    asked = MaintainConfig(table=table.location, unpin_gone_after_days=30)
    assert unpinned(maintain(asked, dry_run=True)) == {"gone"}
    assert len(pins(table.location)) == before
    report = maintain(asked)
    assert unpinned(report) == {"gone"}
    assert {pin.student for pin in pins(table.location)} == {pin.student for pin in report.pins}
    assert len(report.pins) == before - 1
    assert report.deletion, "what nothing needs is deleted in the same run"
    assert unpinned(maintain(asked)) == set()


def test_a_student_that_comes_back_before_its_time_is_over_stays_pinned(table: Table, tmp_path: Path):
    shutil.copytree(tmp_path / "students" / "there", tmp_path / "students" / "gone")
    assert unpinned(maintain(MaintainConfig(table=table.location, unpin_gone_after_days=30))) == set()


def test_the_command_names_the_unpinned_students(table: Table, capsys: pytest.CaptureFixture[str]):
    from softlabel.flows.display.tables import show_maintain

    show_maintain(maintain(MaintainConfig(table=table.location, unpin_gone_after_days=30)))
    out = capsys.readouterr().out
    assert "unpinned, because their folders are gone" in out
    assert "students/gone" in "".join(out.split("\n"))


def test_a_time_below_zero_is_refused(table: Table, capsys: pytest.CaptureFixture[str]):
    assert run(["maintain", table.location, "--unpin-gone-after-days", "-1"]) == 2
    assert "unpin" in capsys.readouterr().err
