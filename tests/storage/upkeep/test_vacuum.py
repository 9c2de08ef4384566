"""A vacuum drops old versions without tags or pins, and deletes no file that another version uses."""

import os
from collections.abc import Callable
from multiprocessing.queues import SimpleQueue as Queue
from pathlib import Path

import pytest

from softlabel.storage.errors import TableNotFoundError, UsageError
from softlabel.storage.records.versions import pin, tag, unpin, untag
from softlabel.storage.table import Table
from softlabel.storage.upkeep import maintenance
from softlabel.storage.upkeep.maintenance import maintain
from softlabel.storage.upkeep.verification import verify
from softlabel.storage.writer import ShardWriter
from tests.storage.tables import PROCESSES, names_in, rows
from tests.storage.upkeep.test_maintenance import paths, replaced


def test_vacuum_drops_old_versions_and_lists_them(filled: Table):
    old = {shard.path for shard in filled.shards()}
    newest = replaced(filled)
    assert maintain(filled.location, grace_hours=0).deleted == (), "nothing is dropped unless asked"
    assert maintain(filled.location, keep_versions=2, grace_hours=0).deleted == ()
    done = maintain(filled.location, keep_versions=1, grace_hours=0)
    assert paths(done.deleted) == old - {shard.path for shard in newest.shards()}
    assert done.vacuumed == (1, 2)
    assert done.bytes == sum(leftover.bytes for leftover in done.deleted) > 0
    for version in (1, 2):
        with pytest.raises(TableNotFoundError, match="remains: 0, 3"):
            Table.open(f"{filled.location}@{version}")
    assert Table.open(f"{filled.location}@0").shards() == []
    assert names_in(Table.open(filled.location)) == names_in(newest)
    assert verify(newest, all_versions=True).findings == ()


def hold_tag(table: Table) -> Callable[[], object]:
    tag(table.location, table.version, "gold")
    return lambda: untag(table.location, "gold")


def hold_pin(table: Table) -> Callable[[], object]:
    pin(table.location, table.version, Path("/student"))
    return lambda: unpin(table.location, "/student")


@pytest.mark.parametrize("hold", [hold_tag, hold_pin])
def test_tagged_and_pinned_versions_are_kept_until_they_are_released(filled: Table, hold):
    let_go = hold(filled)
    replaced(filled)
    assert maintain(filled.location, keep_versions=1, grace_hours=0).deleted == ()
    assert len(names_in(Table.open(f"{filled.location}@2"))) == 80
    let_go()
    assert maintain(filled.location, keep_versions=1, grace_hours=0).vacuumed == (1, 2)


def test_keeping_no_version_is_refused(filled: Table):
    with pytest.raises(UsageError, match="newest version is always kept"):
        maintain(filled.location, keep_versions=0)


def vacuum(location: str, deletions: int, dying: Queue) -> None:
    """Kill this process after so many deletions."""
    real = maintenance._delete

    def delete(*args: object) -> bool:
        nonlocal deletions
        if not deletions:
            dying.put(None)
            os.kill(os.getpid(), 9)
        deletions -= 1
        return real(*args)

    maintenance._delete = delete
    maintain(location, keep_versions=1, grace_hours=0)


@pytest.mark.parametrize("deletions", [0, 1])
def test_a_killed_vacuum_leaves_a_valid_table_and_can_be_run_again(filled: Table, deletions: int):
    newest = replaced(replaced(filled))
    dying = PROCESSES.SimpleQueue()
    killed = PROCESSES.Process(target=vacuum, args=(filled.location, deletions, dying))
    killed.start()
    dying.get()
    killed.join()
    assert names_in(Table.open(filled.location)) == names_in(newest)
    with pytest.raises(TableNotFoundError, match="vacuumed"):
        Table.open(f"{filled.location}@2")
    assert verify(newest, all_versions=True).findings == ()
    assert len(maintain(filled.location, grace_hours=0).deleted) == 2 - deletions


def test_a_shard_that_was_captured_again_is_not_vacuumed(filled: Table):
    """Removed and captured again, the same rows make the same file, which the newest version uses."""
    names = names_in(filled)
    replaced(filled)
    missing = sorted(set(names) - set(names_in(filled.newest())))
    shards = {shard.path for shard in filled.shards()}
    with ShardWriter(filled.newest(), row_group=16) as writer:
        order = [name for name in [f"{part}{i}" for part in "ab" for i in range(40)] if name in missing]
        writer.append(*rows(order))
        writer.commit({})
    assert {shard.path for shard in filled.newest().shards()} == shards
    assert maintain(filled.location, keep_versions=1, grace_hours=0).deleted == ()
    assert names_in(filled.newest()) == names
