"""Rows come into a table whole, once, or not at all: over repeats, races, kills and full disks."""

import json
import os
import random
import resource
import signal
import time
from collections.abc import Iterator, Sequence
from multiprocessing.queues import SimpleQueue as Queue
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable

import storage.writer
from storage.codec import decode
from storage.errors import TableError
from storage.place import content_hash
from storage.reader import footer, outline, read
from storage.table import Shard, Table
from storage.writer import ShardWriter
from tests.storage.tables import PROCESSES, add, leftovers, names_in, process, rows

A = [f"a{i}" for i in range(40)]
B = [f"b{i}" for i in range(40)]
C = [f"c{i}" for i in range(40)]


def test_what_is_committed_is_there(table: Table):
    commit = add(table, A)
    newest = table.newest()
    assert names_in(newest) == sorted(A)
    assert (commit.version, commit.sequences) == (1, 40)
    assert commit.bytes == sum(shard.bytes for shard in newest.shards())
    assert commit.positions == newest.scan().collect()["positions"].sum()
    assert leftovers(table) == []
    for shard in newest.shards():
        with table.place.fetch(shard.path) as file:
            assert Path(shard.path).stem == content_hash(file)
            assert shard.rows == pq.read_metadata(file).num_rows
        assert shard.bytes == table.place.stat(shard.path).bytes
        assert shard.path.startswith(f"split={shard.split}/")


def test_rows_come_back_as_they_went_in(table: Table):
    sequences, labels = rows(A, split="train")
    add(table, A, split="train")
    newest = table.newest()
    (shard,) = newest.shards()
    found = read(newest, shard)
    assert found.drop_columns(list(set(found.column_names) - set(sequences.column_names))).equals(
        sequences.drop_columns(["split"]).cast(found.select(sequences.drop_columns(["split"]).column_names).schema)
    )
    decoded = decode(found, newest.vocabulary)
    assert (decoded.head_ids == labels.head_ids).all()
    assert (decoded.tail_draws == labels.tail_draws).all()
    assert abs(decoded.head_logprobs - labels.head_logprobs).max() < 1 / 64
    groups = footer(newest, shard)
    assert [groups.row_group(i).num_rows for i in range(groups.num_row_groups)] == [16, 16, 8]


def test_what_is_not_committed_leaves_nothing(table: Table):
    with ShardWriter(table) as writer:
        writer.append(*rows(A))
        assert len(leftovers(table)) == 2 * table.place.sees_writers
    assert leftovers(table) == []
    with ShardWriter(table) as writer:
        writer.append(*rows(A))
        with pytest.raises(AssertionError, match="every row"):
            writer.append(rows(A)[0], rows(B[:3])[1])
    assert leftovers(table) == []
    assert table.newest().version == 0
    assert not [file for file in table.place.files() if file.name.startswith("split=")]


def test_nothing_to_commit_is_no_commit(table: Table):
    with ShardWriter(table) as writer:
        assert writer.commit({}).version == 0
    assert table.newest().version == 0


def test_the_same_rows_twice_are_there_once(table: Table):
    assert add(table, A).sequences == 40
    again = add(table, A)
    assert (again.version, again.sequences, again.bytes) == (1, 0, 0)
    assert names_in(table.newest()) == sorted(A)


def test_the_same_rows_twice_in_one_shard_are_there_once(table: Table):
    with ShardWriter(table, row_group=7) as writer:
        writer.append(*rows(A[:30]))
        writer.append(*rows(A[20:]))
        writer.append(*rows(["c", "c"]))
        assert writer.commit({}).sequences == 41
    assert names_in(table.newest()) == sorted([*A, "c"])


def test_rows_that_the_table_has_already(filled: Table):
    """Whatever version a writer was given, and however the rows are cut into shards."""
    for version in range(3):
        table = Table.open(f"{filled.location}@{version}")
        assert add(table, [*A[35:], *B[:7], f"new{version}"]).sequences == 1
    assert names_in(filled.newest()) == sorted([*A, *B, "new0", "new1", "new2"])


def test_the_same_text_in_another_document(table: Table):
    """The same key under another document is another row."""
    add(table, A)
    sequences, labels = rows(A)
    renamed = pa.array([f"copy of {name}" for name in A])
    at = sequences.schema.get_field_index("document_id")
    with ShardWriter(table.newest()) as writer:
        writer.append(sequences.set_column(at, sequences.schema.field(at), renamed), labels)
        writer.append(*rows(A[:3]))
        assert writer.commit({}).sequences == 40
    assert len(names_in(table.newest())) == 80


def test_overlapping_writers(table: Table):
    """Each is told what it added; together every row is there once."""
    with ShardWriter(table, row_group=16) as first, ShardWriter(table, row_group=16) as second:
        first.append(*rows(A + B[:20]))
        second.append(*rows(A[30:] + B))
        assert first.commit({"operation": "capture"}).sequences == 60
        assert second.commit({"operation": "capture"}).sequences == 20
    assert names_in(table.newest()) == sorted(A + B)
    history = table.newest().history()
    assert [commit.get("softlabel", {}).get("sequences") for commit in history] == [20, 60, None]
    assert leftovers(table) == []


def test_a_race_lost_at_the_last_moment(table: Table, monkeypatch: pytest.MonkeyPatch):
    """Others commit the same rows between a writer's look at the table and its commit, again and again."""
    real, losses = DeltaTable.create_write_transaction, [A[:10], A[5:25], A[20:30]]

    def beaten(self, *args, **kwargs):
        if losses:
            others = losses.pop()
            add(table, others)
        return real(self, *args, **kwargs)

    with ShardWriter(table, row_group=16) as writer:
        writer.append(*rows(A))
        monkeypatch.setattr(DeltaTable, "create_write_transaction", beaten)
        assert writer.commit({}).sequences == 10
    assert names_in(table.newest()) == sorted(A)


def test_a_commit_that_could_not_read_is_tried_again(filled: Table, monkeypatch: pytest.MonkeyPatch):
    """A shard whose rows could not be compared has to be compared then."""

    def fail(table: Table, shard: Shard, columns: Sequence[str]) -> Iterator[pa.Table]:
        if "document_id" in columns:
            raise OSError("the network is gone")
        return outline(table, shard, columns)

    with ShardWriter(filled) as writer:
        writer.append(*rows([*A[35:], "new"]))
        with monkeypatch.context() as patch:
            patch.setattr(storage.writer, "outline", fail)
            with pytest.raises(TableError, match="as it was"):
                writer.commit({})
        assert writer.commit({}).sequences == 1
    assert names_in(filled.newest()) == sorted([*A, *B, "new"])


def test_equal_shards_at_once(table: Table):
    """The very same rows make the very same file; whoever commits second finds it there."""
    with ShardWriter(table) as first, ShardWriter(table) as second:
        first.append(*rows(A))
        second.append(*rows(A))
        assert first.commit({}).sequences == 40
        assert second.commit({}).sequences == 0
    assert names_in(table.newest()) == sorted(A)


def test_commits_claim_nothing_but_the_number_of_rows(filled: Table):
    """Minima and maxima that are wrong would hide rows from queries."""
    for log in (Path(filled.location) / "_delta_log").glob("*.json"):
        actions = [json.loads(line) for line in log.read_text().splitlines()]
        for add_action in [action["add"] for action in actions if "add" in action]:
            assert list(json.loads(add_action["stats"])) == ["numRecords"]


def capture(location: str, names: list[str], seed: int) -> None:
    """What a capture does: whatever the table lacks, in some order, a shard of 25 rows at a time."""
    table = Table.open(location)
    present = set(names_in(table))
    pending = [name for name in names if name not in present]
    random.Random(seed).shuffle(pending)
    for start in range(0, len(pending), 25):
        add(table, pending[start : start + 25])


@pytest.mark.parametrize("kills", [20, pytest.param(200, marks=pytest.mark.long)])
def test_killed_writers(table: Table, kills: int):
    kill_writers(table, kills)


def kill_writers(table: Table, kills: int) -> None:
    """Two writers of overlapping rows are killed at random moments, again and again, and others take their places."""
    chance, killed, window, version = random.Random(0), 0, 0.2, 0
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
        # However busy the machine is, writers are killed after a commit or a few.
        window *= 0.8 ** (newest.version - version) if newest.version > version else 1.5
        version = newest.version
    assert 0 < len(seen) < len(names), "some died before a commit, some after"

    capture(table.location, names, 0)
    newest = table.newest()
    assert names_in(newest) == sorted(names)
    for shard in newest.shards():
        decode(read(newest, shard), newest.vocabulary)


def unwritable(table: Table) -> str:
    before = (table.newest().version, names_in(table.newest()))
    with pytest.raises(TableError, match="as it was") as error:
        add(table, C)
    assert (table.newest().version, names_in(table.newest())) == before
    return str(error.value)


@pytest.mark.parametrize("folder", ["_softlabel/writing", "split=train", "_delta_log"])
def test_a_folder_that_can_not_be_written(filled: Table, folder: str, monkeypatch: pytest.MonkeyPatch):
    """A file where a folder should be refuses to be written under, to root as well."""
    path = Path(filled.location) / folder
    add(filled, ["z"])
    aside = path.with_name("aside")
    path.rename(aside)
    if folder == "_delta_log":  # must stay readable: only the new commit can't be made
        aside.rename(path)
        (path / f"{filled.newest().version + 1:020}.json").mkdir()
    elif folder == "split=train":  # must stay readable: only new names can't be made
        aside.rename(path)
        monkeypatch.setattr(Path, "replace", refuse)
    else:
        path.write_text("")
    assert filled.location in unwritable(filled)


def refuse(self: Path, target: Path) -> None:
    raise PermissionError(13, "Permission denied", str(target))


def write_with(room: int, location: str, said: Queue) -> None:
    """Commit 300 rows where no file may be longer than so many bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    table = Table.open(location)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    try:
        said.put(str(add(table, [f"f{i}" for i in range(300)], "train")))
    except TableError as error:
        said.put(str(error))


@pytest.mark.parametrize("room", [0, 4, 5_000, 60_000])
def test_a_full_disk(filled: Table, room: int):
    """A limit on the size of files stops a write in the middle, as a full disk does."""
    before = (filled.version, names_in(filled))
    said = PROCESSES.SimpleQueue()
    writer = PROCESSES.Process(target=write_with, args=(room, filled.location, said))
    writer.start()
    message = said.get()
    writer.join()
    assert "the table could not be written; it is as it was" in message
    assert "make room" in message
    newest = filled.newest()
    assert (newest.version, names_in(newest)) == before
    assert leftovers(newest) == []
    assert add(newest, ["c"]).sequences == 1


def test_a_disk_with_room(filled: Table):
    """The control of the test above: what stopped its writers was the limit."""
    said = PROCESSES.SimpleQueue()
    PROCESSES.Process(target=write_with, args=(10_000_000, filled.location, said)).start()
    assert "sequences=300" in said.get()


def test_a_clock_that_jumps_back(filled: Table):
    """Commits are ordered by number: log files from the future change nothing."""
    future = time.time() + 10 * 365 * 86400
    for path in (Path(filled.location) / "_delta_log").glob("*.json"):
        os.utime(path, (future, future))
    assert add(filled.newest(), ["z"]).version == 3
    assert names_in(Table.open(f"{filled.location}@3")) == sorted([*A, *B, "z"])
