"""A power cut while a table is made or committed to leaves every version that was reported, and nothing torn."""

from pathlib import Path

import pytest
from deltalake import DeltaTable

from softlabel.storage import committing
from softlabel.storage.table import Table
from softlabel.storage.upkeep.verification import verify
from tests.crashes import Disk, recorded
from tests.storage.tables import add, identity, make_table, names_in


def left_behind(recording: Disk, scratch: Path) -> list[tuple[int, list[str]]]:
    """Version and rows of the table in each state that a power cut may leave; -1 if there is no table."""
    scratch.mkdir()
    seen = []
    for number, tree in enumerate({tree for whole, cuts in recording.moments for tree in {whole, *cuts}}):
        folder = recording.rebuild(tree, scratch / str(number)) / "table"
        if not Table.exists(str(folder)):
            seen.append((-1, list[str]()))
            continue
        table = Table.open(str(folder))
        assert verify(table).findings == ()
        assert DeltaTable(table.location).version() == table.version, "other programs read it, too"
        assert len(DeltaTable(table.location).file_uris()) == len(table.shards())
        seen.append((table.version, names_in(table)))
    return seen


def test_a_power_cut_leaves_no_table_or_a_whole_one(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    with recorded(disk) as recording:
        make_table(disk / "table", identity())
    assert {version for version, _ in left_behind(recording, tmp_path / "all")} == {-1, 0}
    recording.moments = recording.moments[-1:]
    assert {version for version, _ in left_behind(recording, tmp_path / "end")} == {0}, "a reported table stays"


@pytest.mark.parametrize("interval", [2, 3])
def test_a_power_cut_leaves_every_reported_commit(
    interval: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the commit makes a checkpoint, the first one or a further one."""
    monkeypatch.setattr(committing, "VERSIONS_PER_CHECKPOINT", interval)
    disk = tmp_path / "disk"
    disk.mkdir()
    table = make_table(disk / "table", identity())
    names = [["a", "b"], ["c"], ["d"]]
    for number, added in enumerate(names):
        before = sorted(name for part in names[:number] for name in part)
        with recorded(disk) as recording:
            add(table.newest(), added)
        seen = left_behind(recording, tmp_path / f"all-{number}")
        assert {version for version, _ in seen} == {number, number + 1}
        assert all(rows == (before if version == number else sorted([*before, *added])) for version, rows in seen)
        recording.moments = recording.moments[-1:]
        assert {version for version, _ in left_behind(recording, tmp_path / f"end-{number}")} == {number + 1}
    assert len(list(disk.glob("table/_delta_log/*.checkpoint.parquet"))) == {2: 2, 3: 1}[interval]
