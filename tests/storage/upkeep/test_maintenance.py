"""Maintenance deletes only what is not needed, despite killed and active writers and wrong clocks."""

import os
import random
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
import pytest

from softlabel.storage.committing import try_commit
from softlabel.storage.errors import TableError
from softlabel.storage.log.state import Shard
from softlabel.storage.places import folder
from softlabel.storage.shard_file import add_action
from softlabel.storage.table import Table
from softlabel.storage.upkeep.maintenance import maintain
from softlabel.storage.upkeep.verification import Finding, Verification, remove_damaged, verify
from softlabel.storage.writer import ShardWriter
from tests.storage.tables import CARRIED, PROCESSES, add, identity, leftovers, names_in, random_labels, rows
from tests.storage.test_writer_failures import capture


def everything(table: Table) -> dict[str, int]:
    """Size of each file, except the lock file of maintenance."""
    return {file.name: file.bytes for file in table.place.files() if not file.name.endswith("maintenance.lock")}


def replaced(table: Table) -> Table:
    """A new version without one of the shards of the newest, that of the first commit if it is still there."""
    old = Table.open(f"{table.location}@1").shards("train")
    shard = min(table.shards("train"), key=lambda shard: shard not in old)
    found = Verification(table.location, 0, 0, 0, 0, (Finding(shard.path, "for once, nothing"),), ())
    remove_damaged(found)
    return table.newest()


def paths(leftovers) -> set[str]:
    return {leftover.path for leftover in leftovers}


def orphan(table: Table) -> Path:
    """A file like a shard that was published but not committed."""
    path = Path(table.location, "split=train", f"{random.randbytes(16).hex()}.parquet")
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"never committed")
    return path


def write_slowly(location: str, names: list[str], halfway: Event, go_on: Event) -> None:
    with ShardWriter(Table.open(location), row_group=4) as writer:
        writer.append(*rows(names[:20]))
        halfway.set()
        assert go_on.wait(60)
        writer.append(*rows(names[20:]))
        writer.commit({})


def kill_halfway(table: Table, names: list[str]) -> None:
    """Kill a writer that has an unfinished shard of each split."""
    halfway, go_on = PROCESSES.Event(), PROCESSES.Event()
    writer = PROCESSES.Process(target=write_slowly, args=(table.location, names, halfway, go_on))
    writer.start()
    assert halfway.wait(60)
    writer.kill()
    writer.join()


def test_a_table_without_leftovers_stays_unchanged(filled: Table):
    before = everything(filled)
    done = maintain(filled.location, keep_versions=1, grace_hours=0)
    assert (done.deleted, done.spared, done.vacuumed) == ((), (), ())
    assert everything(filled) == before
    assert Table.open(f"{filled.location}@1").version == 1, "it lost nothing, so it stays"


def test_leftovers_of_killed_writers_are_found_and_removed(table: Table):
    chance, names = random.Random(3), [f"d{i}" for i in range(200)]
    for seed in range(8):
        writers = [PROCESSES.Process(target=capture, args=(table.location, names, seed + n)) for n in (0, 100)]
        for writer in writers:
            writer.start()
        for writer in writers:
            time.sleep(chance.uniform(0.02, 0.15))
            writer.kill()
            writer.join()
    kill_halfway(table, names)
    orphan(table)
    capture(table.location, names, 0)
    newest = table.newest()
    before = everything(newest)
    assert len(leftovers(newest)) >= 2, "what the last one was writing"
    would = maintain(newest.location, grace_hours=0, dry_run=True)
    assert everything(newest) == before
    done = maintain(newest.location, grace_hours=0)
    assert done.deleted == would.deleted
    assert {leftover.path: leftover.bytes for leftover in done.deleted} == {
        name: size for name, size in before.items() if name not in everything(newest)
    }
    assert leftovers(newest) == []
    assert verify(newest, all_versions=True).findings == verify(newest).orphans == ()
    assert names_in(newest) == sorted(names)


def test_maintenance_deletes_no_committed_file_while_writers_are_killed(table: Table):
    """Even without a grace period, no committed file is deleted while two writers work and are killed."""
    chance, names = random.Random(5), [f"d{i}" for i in range(300)]
    rounds = 0
    for seed in range(6):
        parts = names[:200], names[100:]
        writers = [PROCESSES.Process(target=capture, args=(table.location, part, seed)) for part in parts]
        for writer in writers:
            writer.start()
        until = time.monotonic() + chance.uniform(0.1, 0.4)
        while time.monotonic() < until or rounds < 4 * (seed + 1):  # also on a busy machine
            maintain(table.location, keep_versions=1, grace_hours=0)
            rounds += 1
        for writer in writers:
            writer.kill()
            writer.join()
        assert verify(table.newest(), all_versions=True).findings == ()
    capture(table.location, names, 0)
    assert rounds > 20
    assert names_in(table.newest()) == sorted(names)


def test_files_of_an_active_writer_are_spared_however_old(table: Table):
    names = [f"a{i}" for i in range(40)]
    halfway, go_on = PROCESSES.Event(), PROCESSES.Event()
    writer = PROCESSES.Process(target=write_slowly, args=(table.location, names, halfway, go_on))
    writer.start()
    assert halfway.wait(60)
    for path in Path(table.location).glob("_softlabel/writing/*"):
        os.utime(path, (0, 0))
    done = maintain(table.location, grace_hours=0)
    assert done.deleted == ()
    assert len(done.spared) == 2
    go_on.set()
    writer.join()
    assert names_in(table.newest()) == sorted(names)


def test_files_of_a_dead_writer_on_this_machine_are_deleted_at_once(table: Table):
    kill_halfway(table, [f"a{i}" for i in range(40)])
    assert len(maintain(table.location).deleted) == 2
    assert leftovers(table) == []


def test_files_of_writers_on_other_machines_are_spared_for_the_grace_period(
    table: Table, monkeypatch: pytest.MonkeyPatch
):
    """Locks of other machines may be invisible, so only the age counts."""
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(folder, "_machine", lambda: "elsewhere")
        draft = table.place.draft()
        draft.file.close()
        path = Path(draft.file.name)
    assert paths(maintain(table.location).spared) == {f"_softlabel/writing/{path.name}"}
    assert path.exists()
    assert len(maintain(table.location, grace_hours=0).deleted) == 1
    assert not path.exists()


def test_published_files_are_spared_for_the_grace_period(table: Table):
    path = orphan(table)
    assert paths(maintain(table.location).spared) == {f"split=train/{path.name}"}
    time.sleep(1.1)
    assert len(maintain(table.location, grace_hours=1 / 3600).deleted) == 1


def test_files_from_the_future_are_spared(filled: Table):
    path = orphan(filled)
    future = time.time() + 10 * 365 * 86400
    os.utime(path, (future, future))
    assert maintain(filled.location, grace_hours=0).deleted == ()
    assert path.exists()


def test_unused_vocabularies_and_tokenizers_are_deleted(filled: Table):
    """A lost race to create the table leaves a vocabulary; a kill leaves part of a tokenizer."""
    Table.create(filled.location, identity(), CARRIED, random_labels(50, seed=9), filled.tokenizer)
    side = Path(filled.location, "_softlabel")
    half = side / "tokenizer-0.1.tmp"
    half.mkdir()
    (half / "tokenizer.json").write_text("{")
    (side / "vocabulary-0.parquet.2.tmp").write_text("PAR")
    (side / "rejects.jsonl").write_text("{}")
    (side / "rewritten").mkdir()
    (side / "rewritten" / "0-1.parquet").write_text("PAR")
    done = maintain(filled.location, grace_hours=0)
    assert len(done.deleted) == 4
    assert not list((side / "rewritten").iterdir())
    (side / "rewritten").rmdir()
    assert sum(leftover.bytes for leftover in done.deleted) > 4
    assert sorted(path.name.split("-")[0] for path in side.iterdir()) == [
        "maintenance.lock",
        "rejects.jsonl",
        "tokenizer",
        "vocabulary",
        "writing",
    ]
    assert verify(filled).findings == ()


def test_files_that_softlabel_did_not_write_are_kept(filled: Table):
    for name in ("notes.txt", "split=train/notes.txt", "split=train/part-0.parquet"):
        Path(filled.location, name).write_text("mine")
    assert maintain(filled.location, grace_hours=0).deleted == ()
    assert verify(filled).orphans == ("notes.txt", "split=train/notes.txt", "split=train/part-0.parquet")


def test_a_file_that_cannot_be_deleted_is_reported(filled: Table, monkeypatch: pytest.MonkeyPatch):
    path = orphan(filled)

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(
        TableError, match=r"some files that the table does not need could not be deleted(.|\n)*" + path.name
    ):
        maintain(filled.location, grace_hours=0)


def test_a_dry_run_needs_no_write_permission(filled: Table, monkeypatch: pytest.MonkeyPatch):
    path = orphan(filled)

    def refuse(*args: object, **more: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "utime", refuse)
    monkeypatch.setattr(folder.Folder, "gate", refuse)
    done = maintain(filled.location, grace_hours=0, dry_run=True)
    assert [leftover.path for leftover in done.deleted] == [str(path.relative_to(filled.location))]


def many_shards(table: Table, commits: int, shards: int) -> None:
    """Commit shards whose files do not exist."""
    for commit in range(commits):
        paths = [f"split=train/{commit * shards + i:032x}.parquet" for i in range(shards)]
        assert try_commit(table.newest(), [add_action(Shard(path, "train", 10, 1000)) for path in paths], {})


def test_ten_thousand_shards_open_within_a_second(table: Table):
    many_shards(table, 20, 500)
    seconds = []
    for _ in range(3):
        began = time.process_time()  # not of other processes
        opened = Table.open(table.location)
        assert sum(shard.rows for shard in opened.shards()) == 100_000
        seconds.append(time.process_time() - began)
    assert np.median(seconds) < 1
    began = time.process_time()
    assert maintain(table.location, keep_versions=1).deleted == ()
    assert time.process_time() - began < 5


def test_a_writer_waits_for_maintenance(filled: Table):
    """Otherwise a published file could be deleted as an orphan before its commit."""
    with filled.place.gate(exclusive=True):
        writer = PROCESSES.Process(target=add, args=(filled, ["c"]))
        writer.start()
        writer.join(0.5)
        assert writer.is_alive()
    writer.join(60)
    assert writer.exitcode == 0
    assert "c" in names_in(filled.newest())
