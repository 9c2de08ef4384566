"""Whatever stops a writer (a kill, a full disk, missing rights), the table is unchanged and each row is stored once."""

import os
import random
import resource
import signal
import time
from multiprocessing.queues import SimpleQueue as Queue
from pathlib import Path

import pytest

from softlabel.storage.codec import decode
from softlabel.storage.errors import TableError
from softlabel.storage.reader import read
from softlabel.storage.table import Table
from tests.storage.tables import PROCESSES, add, leftovers, names_in, process
from tests.storage.test_writer import A, B, C


def capture(location: str, names: list[str], seed: int) -> None:
    """Like a capture, add the rows that the table lacks, in random order, in shards of 25 rows."""
    table = Table.open(location)
    present = set(names_in(table))
    pending = [name for name in names if name not in present]
    random.Random(seed).shuffle(pending)
    for start in range(0, len(pending), 25):
        add(table, pending[start : start + 25])


@pytest.mark.parametrize("kills", [20, pytest.param(200, marks=pytest.mark.long)])
def test_after_every_kill_of_a_writer_each_row_is_there_once(table: Table, kills: int):
    kill_writers(table, kills)


def kill_writers(table: Table, kills: int) -> None:
    """Two writers of overlapping rows are killed at random moments, again and again, and others take their places."""
    chance, killed, window, version, before = random.Random(0), 0, 0.2, 0, set[str]()
    names = [f"d{i}" for i in range(50 * kills)]
    while killed < kills:
        parts = names[: 35 * kills], names[15 * kills :]
        writers = [process(capture, table.location, part, killed) for part in parts]
        for writer in writers:
            writer.start()
        for writer in writers:
            time.sleep(chance.uniform(0, window))
            writer.kill()
        for writer in writers:
            writer.join()
            killed += writer.exitcode == -signal.SIGKILL
        newest = table.newest()
        seen = names_in(newest)
        assert len(seen) == len(set(seen)), "each row once, after every kill"
        assert before <= set(seen), "what was committed stays"
        assert newest.version >= version
        # However busy the machine is, writers are killed after a commit or a few.
        window *= 0.8 ** (newest.version - version) if newest.version > version else 1.5
        version, before = newest.version, set(seen)
    assert 0 < len(seen) < len(names), "some died before a commit, some after"

    capture(table.location, names, 0)
    newest = table.newest()
    assert names_in(newest) == sorted(names)
    for shard in newest.shards():
        decode(read(newest, shard), newest.numbering)


def unwritable(table: Table) -> str:
    before = (table.newest().version, names_in(table.newest()))
    with pytest.raises(TableError, match="it is unchanged") as error:
        add(table, C)
    assert (table.newest().version, names_in(table.newest())) == before
    return str(error.value)


@pytest.mark.parametrize("folder", ["_softlabel/writing", "split=train", "_delta_log"])
def test_an_unwritable_folder_leaves_the_table_unchanged(filled: Table, folder: str, monkeypatch: pytest.MonkeyPatch):
    """A file in place of a folder makes writing fail, even for root."""
    path = Path(filled.location) / folder
    add(filled, ["z"])
    aside = path.with_name("aside")
    path.rename(aside)
    if folder == "_delta_log":  # must stay readable: only the new commit can't be made
        aside.rename(path)
        monkeypatch.setattr(Path, "hardlink_to", refuse)
    elif folder == "split=train":  # must stay readable: only new names can't be made
        aside.rename(path)
        monkeypatch.setattr(Path, "replace", refuse)
    else:
        path.write_text("")
    assert filled.location in unwritable(filled)


def refuse(self: Path, target: Path) -> None:
    raise PermissionError(13, "Permission denied", str(target))


def write_with(room: int, location: str, results: Queue) -> None:
    """Commit 300 rows while no file may be larger than ``room`` bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    table = Table.open(location)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    try:
        results.put(str(add(table, [f"f{i}" for i in range(300)], "train")))
    except TableError as error:
        results.put(str(error))


@pytest.mark.parametrize("room", [0, 4, 5_000, 60_000])
def test_a_full_disk_leaves_the_table_unchanged(filled: Table, room: int):
    """A limit on the size of files stops a write in the middle, as a full disk does."""
    before = (filled.version, names_in(filled))
    results = PROCESSES.SimpleQueue()
    writer = PROCESSES.Process(target=write_with, args=(room, filled.location, results))
    writer.start()
    message = results.get()
    writer.join()
    assert "the table could not be written; it is unchanged" in message
    assert "free disk space" in message
    newest = filled.newest()
    assert (newest.version, names_in(newest)) == before
    assert leftovers(newest) == []
    assert add(newest, ["c"]).sequences == 1


def test_the_same_writer_succeeds_on_a_disk_with_space(filled: Table):
    """Control for the test above: its writers were stopped by the limit."""
    results = PROCESSES.SimpleQueue()
    PROCESSES.Process(target=write_with, args=(10_000_000, filled.location, results)).start()
    assert "sequences=300" in results.get()


def test_a_clock_that_jumps_back_does_not_change_the_order_of_commits(filled: Table):
    """Commits are ordered by number: log files from the future change nothing."""
    future = time.time() + 10 * 365 * 86400
    for path in (Path(filled.location) / "_delta_log").glob("*.json"):
        os.utime(path, (future, future))
    assert add(filled.newest(), ["z"]).version == 3
    assert names_in(Table.open(f"{filled.location}@3")) == sorted([*A, *B, "z"])
