"""Sizes add up, entropies are close to them, and the history shows each commit."""

import json
import re
from pathlib import Path

import pyarrow as pa
import pytest

from softlabel.storage.errors import IntegrityError
from softlabel.storage.reader import read
from softlabel.storage.schema import SOFT_LABELS
from softlabel.storage.table import Table
from softlabel.storage.upkeep.inspection import column_bytes, history, inspect, last_capture
from softlabel.storage.writer import ShardWriter
from tests.storage.tables import random_labels, sequences


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Table:
    """A table of 6,000 positions, so that the values take more bytes than the footers."""
    from tests.storage.tables import identity, make_table

    table = make_table(tmp_path_factory.mktemp("inspection") / "table", identity())
    with ShardWriter(table) as writer:
        writer.append(sequences([f"a{i}" for i in range(60)], [100] * 60), random_labels(6000))
        writer.commit({"operation": "capture", "circumstances": {"user": "ada"}})
    return table.newest()


def test_sizes_add_up_to_the_files(large: Table):
    found = inspect(large)
    files = [Path(large.location) / shard.path for shard in large.shards()]
    total = sum(file.stat().st_size for file in files)
    footers = sum(int.from_bytes(file.read_bytes()[-8:-4], "little") + 12 for file in files)
    assert sum(column.bytes for column in found.columns.values()) == total - footers
    assert set(found.columns) == set(large.schema.names) - {"split"}
    assert sum(split.bytes for split in found.splits.values()) == total
    assert column_bytes(large) == {name: column.bytes for name, column in found.columns.items()}
    for column in found.columns.values():
        assert column.bytes_per_position == column.bytes / 6000
    entropies = [found.columns[name].entropy_per_position for name in SOFT_LABELS.names]
    assert found.soft_label_entropy_per_position == pytest.approx(sum(entropies))
    assert found.soft_label_bytes_per_position == pytest.approx(
        sum(found.columns[name].bytes for name in SOFT_LABELS.names) / 6000
    )


def test_counts_equal_those_of_the_rows(large: Table):
    found = inspect(large)
    assert (found.location, found.version) == (large.location, 1)
    assert set(found.splits) == {"train", "eval"}
    for name, split in found.splits.items():
        rows = [row for shard in large.shards(name) for row in read(large, shard, ["tokens", "positions"]).to_pylist()]
        assert (split.shards, split.documents, split.sequences) == (1, len(rows), len(rows))
        assert split.tokens == sum(row["tokens"] for row in rows)
        assert split.positions == sum(row["positions"] for row in rows)
    assert sum(split.positions for split in found.splits.values()) == 6000


def test_entropies_are_close_to_the_sizes(large: Table):
    """Values that are independent of their neighbors take little more than their entropy."""
    columns = inspect(large).columns
    for name in ("head_ids", "head_codes", "tail_ids", "tail_codes", "entropies"):
        entropy, paid = columns[name].entropy_per_position, columns[name].bytes_per_position
        assert entropy is not None
        assert 0.9 * entropy < paid < 1.5 * entropy + 1, name
    assert columns["document_id"].entropy_per_position is None


def test_an_empty_table_has_size_0(table: Table):
    found = inspect(table)
    assert (found.splits, found.columns, found.soft_label_bytes_per_position) == ({}, {}, 0)


def test_documents_are_counted_once(table: Table):
    """Two sequences of one document, in two shards."""
    for chunk in range(2):
        with ShardWriter(table.newest()) as writer:
            rows = sequences(["a"], [5], "train")
            at = rows.schema.get_field_index("chunk")
            rows = rows.set_column(at, rows.schema.field(at), pa.array([chunk], pa.int32()))
            writer.append(rows, random_labels(5, chunk))
            writer.commit({})
    split = inspect(table.newest()).splits["train"]
    assert (split.shards, split.documents, split.sequences) == (2, 1, 2)


def test_history_lists_commits_newest_first(large: Table):
    added, created = history(large)
    assert (created.version, created.operation, created.sequences) == (0, "create table", 0)
    assert (added.version, added.operation, added.user) == (1, "capture", "ada")
    assert (added.sequences, added.positions) == (60, 6000)
    assert added.bytes == sum(shard.bytes for shard in large.shards())
    assert added.time.endswith("+00:00")
    assert history(Table.open(f"{large.location}@0")) == [created]


@pytest.mark.parametrize(
    ("written", "named"),
    [
        ({"sequences": "many"}, "softlabel.sequences"),
        ({"teacher": 7}, "softlabel.teacher"),
        ({"circumstances": {"user": ["ada"]}}, "softlabel.circumstances.user"),
    ],
)
def test_a_commit_that_softlabel_could_not_have_written_is_an_error_that_names_the_field(
    written: dict[str, object], named: str, tmp_path: Path
):
    from tests.storage.tables import identity, make_table

    table = make_table(tmp_path / "table", identity())
    with ShardWriter(table) as writer:
        writer.append(sequences(["a"], [10]), random_labels(10))
        writer.commit({"operation": "capture"})
    log = sorted((tmp_path / "table" / "_delta_log").glob("*.json"))[-1]
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    next(line["commitInfo"] for line in lines if "commitInfo" in line)["softlabel"] |= written
    log.write_text("\n".join(map(json.dumps, lines)))
    for reads in (history, last_capture):
        with pytest.raises(IntegrityError, match=re.escape(named)):
            reads(table.newest())
