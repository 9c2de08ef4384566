"""What inspect says about the documents and the soft labels of a table is what its rows hold."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from softlabel.storage import reader as reading
from softlabel.storage.codec import decode
from softlabel.storage.labels import SoftLabels
from softlabel.storage.reader import read
from softlabel.storage.schema import SEQUENCE, SOFT_LABELS
from softlabel.storage.table import Table
from softlabel.storage.upkeep import contents as module
from softlabel.storage.upkeep import label_sample as sampling
from softlabel.storage.upkeep.contents import CarriedColumn, ValueCount, contents
from softlabel.storage.upkeep.inspection import inspect
from softlabel.storage.upkeep.label_sample import label_sample
from softlabel.storage.writer import ShardWriter
from tests.storage.tables import add, identity, random_labels, sequences


def captured(folder: Path, rows: list[dict[str, Any]], carried: dict[str, pa.DataType]) -> Table:
    """A table with one row for each of these, in two shards; what is not given is that of a document of its own."""
    made = [sequences([f"d{i}"], [3 + i], "train").to_pylist()[0] | row for i, row in enumerate(rows)]
    schema = pa.schema([*SEQUENCE, *(pa.field(name, kind) for name, kind in carried.items())])
    made = [{name: row.get(name) for name in schema.names} for row in made]
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir(parents=True)
    (tokenizer / "tokenizer.json").write_text("{}")
    table = Table.create(
        str(folder / "table"), identity(), pa.schema(list(schema)[len(SEQUENCE) :]), random_labels(9), tokenizer
    )
    half = (len(made) + 1) // 2
    for part in (made[:half], made[half:]):
        with ShardWriter(table.newest(), row_group=2) as writer:
            positions = sum(row["positions"] for row in part)
            writer.append(pa.Table.from_pylist(part, schema), random_labels(positions))
            writer.commit({"operation": "capture"})
    return table.newest()


def test_values_of_carried_columns_are_counted_with_their_positions(tmp_path: Path):
    rows = [{"source": source} for source in ("web", "book", None, "web", "web")]
    table = captured(tmp_path, rows, {"source": pa.string()})
    expected = (ValueCount("web", 3, 3 + 6 + 7), ValueCount(None, 1, 5), ValueCount("book", 1, 4))
    assert contents(table).carried == {"source": CarriedColumn("string", 3, expected, None, None)}


def test_of_many_values_only_the_range_is_said_and_of_nested_ones_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "_MOST_VALUES", 4)
    times = [datetime(2020, 1, day, tzinfo=UTC) for day in (5, 3, 9, 7, 8)]
    rows = [{"time": time, "tags": ["a"], "size": 1.5, "raw": b"\xff" * 200} for time in times]
    kinds = {"time": pa.timestamp("us", "UTC"), "tags": pa.list_(pa.string()), "size": pa.float64(), "raw": pa.binary()}
    found = contents(captured(tmp_path, rows, kinds)).carried
    assert (found["time"].distinct, found["time"].values) == (None, ())
    assert (found["time"].lowest, found["time"].highest) == ("2020-01-03 00:00:00+00:00", "2020-01-09 00:00:00+00:00")
    assert (found["tags"].distinct, found["tags"].lowest) == (None, None)
    assert (found["size"].distinct, found["size"].lowest) == (1, "1.5")
    assert (found["raw"].distinct, len(found["raw"].values[0].value or "")) == (1, 200)


def test_documents_that_have_changed_and_documents_that_lack_chunks_are_counted(tmp_path: Path):
    a, b, c, d = (bytes([n]) * 16 for n in range(4))
    rows = [
        {"document_id": "twice", "fingerprint": a},
        {"document_id": "twice", "fingerprint": b, "chunks": 2},  # its second chunk is missing
        {"document_id": "changed again", "fingerprint": a},
        {"document_id": "changed again", "fingerprint": b},
        {"document_id": "changed again", "fingerprint": c},
        {"document_id": "once", "fingerprint": d, "chunks": 2},
        {"document_id": "once", "fingerprint": d, "chunks": 2, "chunk": 1},
        {"document_id": "copy", "fingerprint": d},  # the same text in another document is no change
    ]
    found = contents(captured(tmp_path, rows, {}))
    assert (found.documents, found.changed, found.incomplete) == (4, 2, 1)
    assert found.splits["train"].documents == 4


def whole(table: Table) -> SoftLabels:
    return decode(pa.concat_tables(read(table, shard, SOFT_LABELS.names) for shard in table.shards()), table.numbering)


def test_the_soft_labels_of_a_small_table_are_described_as_they_are(table: Table):
    add(table, [f"n{i}" for i in range(40)])
    labels, found = whole(table.newest()), label_sample(table.newest())
    assert found.positions == labels.positions
    assert found.mass == pytest.approx(1 - np.exp(labels.tail_log_masses[0].astype(float)).mean())
    assert found.entropy == pytest.approx(labels.entropies.mean())
    assert found.cross_entropy == pytest.approx(-labels.next_logprobs.mean(), rel=1e-5)
    assert (found.ids, found.draws) == (labels.head_counts.mean(), labels.tail_counts.mean())
    for bar in found.histogram:
        inside = (labels.entropies >= bar.low) & (labels.entropies < bar.high)
        assert bar.positions == inside.sum()
    assert sum(bar.positions for bar in found.histogram) == labels.positions


def test_of_a_large_table_a_few_row_groups_are_read_from_all_over_it(table: Table, monkeypatch: pytest.MonkeyPatch):
    for i in range(5):
        add(table.newest(), [f"n{i}-{j}" for j in range(8)])
    monkeypatch.setattr(sampling, "_GROUPS", 3)
    asked, opened = [], sampling.Outline
    monkeypatch.setattr(sampling, "Outline", lambda table, shard: asked.append(shard.path) or opened(table, shard))
    newest = table.newest()
    paths = [shard.path for shard in newest.shards()]
    assert label_sample(newest).positions
    assert len(asked) == 3
    assert {asked[0], asked[-1]} == {paths[0], paths[-1]}


def test_the_progress_of_an_inspection_counts_the_shards_up_to_the_total(table: Table):
    for name in ("a", "b", "c"):
        add(table.newest(), [name], "train")
    seen = list[tuple[int, int]]()
    inspect(table.newest(), lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_an_inspection_computes_the_hash_of_no_shard_for_which_it_would_have_to_read_it_whole(
    table: Table, monkeypatch: pytest.MonkeyPatch
):
    add(table, [f"n{i}" for i in range(40)], "train")

    def fails(*_: object) -> str:
        raise AssertionError("a shard was read whole")

    monkeypatch.setattr(reading, "content_hash", fails)
    assert inspect(table.newest()).splits["train"].sequences == 40


def test_the_oldest_commit_with_rows_and_the_newest_commit_are_named(table: Table):
    assert inspect(table).oldest is None
    add(table, ["a"])
    add(table.newest(), ["b"])
    found = inspect(table.newest())
    assert found.oldest is not None
    assert (found.oldest.version, found.newest.version) == (1, 2)
