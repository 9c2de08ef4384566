"""A damaged log, checkpoint or record is named, or the damage changes nothing that a reader sees."""

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable
from deltalake.transaction import AddAction

from softlabel.storage.errors import IntegrityError, SoftlabelError
from softlabel.storage.records.takedown import purges, refuse
from softlabel.storage.records.versions import pin, pins, tag, tags
from softlabel.storage.table import Table
from softlabel.storage.upkeep.maintenance import maintain
from softlabel.storage.upkeep.replay import read_log
from softlabel.storage.upkeep.verification import verify
from tests.storage.tables import add, names_in

EVERYTHING = (
    "_delta_log/*.json",
    "_delta_log/*.parquet",
    "_delta_log/_last_checkpoint",
    "_softlabel/tags/*",
    "_softlabel/pins/*",
    "_softlabel/purged/*",
)
"""Small files, which the tests damage byte by byte."""


@pytest.fixture
def known(filled: Table, tmp_path: Path) -> Table:
    """A table with a checkpoint, a commit after it, and one of each record."""
    DeltaTable(filled.location).create_checkpoint()
    tag(filled.location, 1, "paper")
    pin(filled.location, 2, tmp_path / "student")
    refuse(filled.location, ["never-seen"])
    add(filled, ["c"])
    return filled.newest()


def log(table: Table, version: int) -> Path:
    return Path(table.location, "_delta_log", f"{version:020}.json")


def contents(location: str) -> list[Any]:
    """Everything that a reader sees."""
    table = Table.open(location)
    files = [table.vocabulary_name, table.tokenizer_name]
    records = [tags(location), pins(location), purges(location)]
    return [table.version, table.identity, table.carried, table.shards(), *files, *records]


def problems_of(location: str) -> str:
    """The files that verify names, or its error."""
    try:
        return " ".join(finding.path for finding in verify(Table.open(location)).findings)
    except SoftlabelError as error:
        return str(error)


def flips(path: Path, count: int) -> Iterator[int]:
    """A bit flips in one byte after another, and back."""
    content, chance = path.read_bytes(), random.Random(0)
    for at in sorted(chance.sample(range(len(content)), min(count, len(content)))):
        flipped = content[at] ^ 1 << chance.randrange(8)
        path.write_bytes(content[:at] + bytes([flipped]) + content[at + 1 :])
        yield at
    path.write_bytes(content)


@pytest.mark.parametrize("pattern", EVERYTHING)
def test_any_flipped_byte_is_named_or_changes_nothing(known: Table, pattern: str) -> None:
    before = contents(known.location)
    for path in sorted(Path(known.location).glob(pattern)):
        for at in flips(path, 12):
            found = problems_of(known.location)
            if path.suffix == ".json":
                assert path.name in found or "softlabel.format" in found, f"byte {at} of {path}: {found}"
            assert found or contents(known.location) == before, f"byte {at} of {path}"
    assert problems_of(known.location) == ""


def replaced(old: str, new: str, version: int = 1) -> Callable[[Table], Path]:
    def damage(table: Table) -> Path:
        path = log(table, version)
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
        return path

    return damage


def copy_of_the_one_before(table: Table) -> Path:
    return Path(shutil.copy(log(table, table.version - 1), log(table, table.version)))


DAMAGES = {
    "split": replaced('"split":"train"', '"split":"trahn"'),
    "rows": replaced('numRecords\\": ', 'numRecords\\": 1'),
    "temperature": replaced("[1.0]", "[3.0]", 0),
    "newest split": replaced('"split":"train"', '"split":"trahn"', 2),
    "newest commit": copy_of_the_one_before,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_log_stops_every_reader(filled: Table, damage: Callable[[Table], Path]) -> None:
    path = damage(filled)
    opened = Table.open(filled.location)
    for work in (opened.shards, opened.scan, lambda: add(opened, ["c"])):
        with pytest.raises(IntegrityError, match=r"the table's log is damaged(.|\n)*_delta_log"):
            work()
    with pytest.raises(IntegrityError, match="_delta_log"):
        maintain(filled.location, grace_hours=0)
    finding = verify(opened).findings[0]
    assert path.name in finding.path + finding.problem


def test_missing_properties_are_reported_with_their_commit(filled: Table) -> None:
    path = replaced("softlabel.identity", "softlabel.identitx", 0)(filled)
    with pytest.raises(IntegrityError, match=f"softlabel.identity(.|\n)*{path.name}"):
        Table.open(filled.location)


def test_a_commit_of_another_program_is_refused(filled: Table) -> None:
    """It has no state hash, so damage to it could not be detected."""
    delta, shard = DeltaTable(filled.location), filled.shards()[0]
    action = AddAction("split=train/x.parquet", shard.bytes, {"split": "train"}, 0, True, '{"numRecords": 1}')
    delta.create_write_transaction([action], "append", delta.schema(), ["split"])
    with pytest.raises(
        IntegrityError,
        match=r"a program other than softlabel made this version(.|\n)*3\.json(.|\n)*version before, .*@2",
    ):
        filled.newest().shards()
    with pytest.raises(IntegrityError, match="this commit was not made by softlabel"):
        read_log(filled)
    assert names_in(Table.open(f"{filled.location}@2")) == names_in(filled)


def test_a_checkpoint_with_wrong_shards_is_named(filled: Table) -> None:
    """Delta reads it instead of the commits before it."""
    path, content = log(filled, 1), log(filled, 1).read_text()
    path.write_text(content.replace('"split":"train"', '"split":"trahn"'))
    DeltaTable(filled.location).create_checkpoint()
    path.write_text(content)
    (finding,) = verify(Table.open(filled.location)).findings
    assert finding.path == f"_delta_log/{2:020}.checkpoint.parquet"


def test_shards_of_a_deleted_commit_are_listed_as_orphans(filled: Table) -> None:
    gone = {shard.path for shard in filled.shards()} - {s.path for s in Table.open(f"{filled.location}@1").shards()}
    log(filled, 2).unlink()
    found = verify(Table.open(filled.location))
    assert (found.findings, {*found.orphans}) == ((), gone)


def test_unknown_files_are_listed_as_orphans(known: Table) -> None:
    assert verify(known).orphans == ()
    names = ("evil.parquet", "_softlabel/junk.bin", "_softlabel/tags/x.txt", "_delta_log/x")
    for name in names:
        known.place.write(name, b"?")
    assert verify(known).orphans == tuple(sorted(names))
