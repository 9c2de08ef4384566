"""Rows are added once or not at all, despite repetition, races and failures."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import softlabel.storage.writer
from softlabel.storage import committing
from softlabel.storage.codec import decode
from softlabel.storage.errors import TableError
from softlabel.storage.log.state import Shard
from softlabel.storage.places.place import content_hash
from softlabel.storage.reader import open_shard, outline, read
from softlabel.storage.table import Table
from softlabel.storage.writer import ShardWriter
from tests.numberings import by_id
from tests.storage.tables import add, leftovers, names_in, rows

A = [f"a{i}" for i in range(40)]
B = [f"b{i}" for i in range(40)]
C = [f"c{i}" for i in range(40)]


def test_committed_rows_are_in_the_newest_version(table: Table):
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


def test_rows_are_read_back_as_they_were_written(table: Table):
    sequences, labels = rows(A, split="train")
    add(table, A, split="train")
    newest = table.newest()
    (shard,) = newest.shards()
    found = read(newest, shard)
    assert found.drop_columns(list(set(found.column_names) - set(sequences.column_names))).equals(
        sequences.drop_columns(["split"]).cast(found.select(sequences.drop_columns(["split"]).column_names).schema)
    )
    decoded, labels = by_id(decode(found, newest.numbering)), by_id(labels)
    assert (decoded.head_ids == labels.head_ids).all()
    assert (decoded.tail_draws == labels.tail_draws).all()
    assert abs(decoded.head_logprobs - labels.head_logprobs).max() < 1 / 64
    groups = open_shard(newest, shard).metadata
    assert [groups.row_group(i).num_rows for i in range(groups.num_row_groups)] == [16, 16, 8]


def test_uncommitted_rows_leave_no_files(table: Table):
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


def test_an_empty_commit_makes_no_version(table: Table):
    with ShardWriter(table) as writer:
        assert writer.commit({}).version == 0
    assert table.newest().version == 0


def test_rows_that_are_added_twice_are_stored_once(table: Table):
    assert add(table, A).sequences == 40
    again = add(table, A)
    assert (again.version, again.sequences, again.bytes) == (1, 0, 0)
    assert names_in(table.newest()) == sorted(A)


def test_rows_that_are_added_twice_to_one_writer_are_stored_once(table: Table):
    with ShardWriter(table, row_group=7) as writer:
        writer.append(*rows(A[:30]))
        writer.append(*rows(A[20:]))
        writer.append(*rows(["c", "c"]))
        assert writer.commit({}).sequences == 41
    assert names_in(table.newest()) == sorted([*A, "c"])


def test_rows_that_the_table_has_already_are_left_out(filled: Table):
    """For a writer of any version, and any division of the rows into shards."""
    for version in range(3):
        table = Table.open(f"{filled.location}@{version}")
        assert add(table, [*A[35:], *B[:7], f"new{version}"]).sequences == 1
    assert names_in(filled.newest()) == sorted([*A, *B, "new0", "new1", "new2"])


def test_the_same_text_in_another_document_is_another_row(table: Table):
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


def test_overlapping_writers_store_each_row_once(table: Table):
    """Each commit returns what it added; each row is stored once."""
    with ShardWriter(table, row_group=16) as first, ShardWriter(table, row_group=16) as second:
        first.append(*rows(A + B[:20]))
        second.append(*rows(A[30:] + B))
        assert first.commit({"operation": "capture"}).sequences == 60
        assert second.commit({"operation": "capture"}).sequences == 20
    assert names_in(table.newest()) == sorted(A + B)
    history = table.newest().history()
    assert [commit.get("softlabel", {}).get("sequences") for commit in history] == [20, 60, None]
    assert leftovers(table) == []


def test_a_writer_that_loses_races_adds_only_missing_rows(table: Table, monkeypatch: pytest.MonkeyPatch):
    """Others commit the same rows between a writer's look at the table and its commit, again and again."""
    real, losses = committing.write_commit, [A[:10], A[5:25], A[20:30]]

    def beaten(*args, **kwargs):
        if losses:
            others = losses.pop()
            add(table, others)
        return real(*args, **kwargs)

    with ShardWriter(table, row_group=16) as writer:
        writer.append(*rows(A))
        monkeypatch.setattr(committing, "write_commit", beaten)
        assert writer.commit({}).sequences == 10
    assert names_in(table.newest()) == sorted(A)


def test_a_commit_that_failed_to_read_compares_the_rows_again(filled: Table, monkeypatch: pytest.MonkeyPatch):
    """A shard whose rows could not be compared must be compared by the next attempt."""

    def fail(table: Table, shard: Shard, columns: Sequence[str]) -> Iterator[pa.Table]:
        if "document_id" in columns:
            raise OSError("the network is gone")
        return outline(table, shard, columns)

    with ShardWriter(filled) as writer:
        writer.append(*rows([*A[35:], "new"]))
        with monkeypatch.context() as patch:
            patch.setattr(softlabel.storage.writer, "outline", fail)
            with pytest.raises(TableError, match="it is unchanged"):
                writer.commit({})
        assert writer.commit({}).sequences == 1
    assert names_in(filled.newest()) == sorted([*A, *B, "new"])


def test_identical_shards_of_two_writers_are_stored_once(table: Table):
    """The same rows make the same file; the second writer to commit finds it in the table."""
    with ShardWriter(table) as first, ShardWriter(table) as second:
        first.append(*rows(A))
        second.append(*rows(A))
        assert first.commit({}).sequences == 40
        assert second.commit({}).sequences == 0
    assert names_in(table.newest()) == sorted(A)


def test_commits_contain_no_statistics_but_the_number_of_rows(filled: Table):
    """Wrong minimum or maximum values would hide rows from queries."""
    for log in (Path(filled.location) / "_delta_log").glob("*.json"):
        actions = [json.loads(line) for line in log.read_text().splitlines()]
        for add_action in [action["add"] for action in actions if "add" in action]:
            assert list(json.loads(add_action["stats"])) == ["numRecords"]
