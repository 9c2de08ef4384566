"""The lock file of a table's folder: if something else is at its path, that is not created, changed or deleted."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from softlabel.storage.errors import TableError
from softlabel.storage.table import Table
from softlabel.storage.upkeep.maintenance import maintain
from tests.storage.tables import add


def to_a_file(lock: Path, other: Path) -> None:
    lock.symlink_to(other)


def to_nothing(lock: Path, other: Path) -> None:
    lock.symlink_to(other.with_name("missing"))


def to_a_folder(lock: Path, other: Path) -> None:
    lock.symlink_to(other.parent)


def pipe(lock: Path, other: Path) -> None:
    os.mkfifo(lock)


@pytest.mark.parametrize("put", [to_a_file, to_nothing, to_a_folder, pipe])
def test_no_lock_is_taken_through_a_link(put: Callable[[Path, Path], None], filled: Table, tmp_path: Path):
    lock, other = Path(filled.location, "_softlabel", "maintenance.lock"), tmp_path / "others" / "thesis"
    other.parent.mkdir()
    other.write_text("years of work")
    os.utime(other, ns=(0, 0))
    lock.unlink()
    put(lock, other)
    with pytest.raises(TableError, match=r"has the name of softlabel's lock file(.|\n)*maintenance\.lock"):
        add(filled, ["c"])
    with pytest.raises(TableError, match="has the name of softlabel's lock file"):
        maintain(filled.location)
    assert [path.name for path in other.parent.iterdir()] == ["thesis"]
    assert (other.read_text(), other.stat().st_mtime_ns) == ("years of work", 0)


def test_a_hard_link_of_the_lock_file_stays_unchanged(filled: Table, tmp_path: Path):
    """As in a copy of the table by hard links."""
    lock, other = Path(filled.location, "_softlabel", "maintenance.lock"), tmp_path / "thesis"
    other.write_text("years of work")
    os.utime(other, ns=(0, 0))
    lock.unlink()
    lock.hardlink_to(other)
    add(filled, ["c"])
    maintain(filled.location)
    assert (other.read_text(), other.stat().st_mtime_ns, other.stat().st_nlink) == ("years of work", 0, 2)


def test_maintenance_follows_no_link_among_unfinished_shards(filled: Table, tmp_path: Path):
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "thesis").write_text("years of work")
    writing = Path(filled.location, "_softlabel", "writing")
    for name, target in {"file": "others/thesis", "folder": "others", "nothing": "missing"}.items():
        (writing / f"{name}.parquet").symlink_to(tmp_path / target)
    maintain(filled.location, grace_hours=0)
    assert (tmp_path / "others" / "thesis").read_text() == "years of work"
    assert not (tmp_path / "missing").exists()
