"""A shard may be written by any program that writes Parquet, with any encoding, as FORMAT.md says."""

from collections.abc import Callable
from pathlib import Path

import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from softlabel.storage.committing import try_commit
from softlabel.storage.errors import IntegrityError
from softlabel.storage.log.state import Shard
from softlabel.storage.places.place import hash_of
from softlabel.storage.reader import index, read, soft_labels_by_key
from softlabel.storage.schema import SOFT_LABELS
from softlabel.storage.shard_file import add_action
from softlabel.storage.table import Table
from softlabel.storage.upkeep.inspection import inspect
from softlabel.storage.upkeep.verification import verify
from tests.storage.tables import add, identity, make_table, names_in

NAMES = ["a", "b", "c", "d", "e"]


def with_polars(rows: pa.Table, path: str) -> None:
    """With strings and lists of 64-bit lengths, statistics and dictionaries."""
    pl.DataFrame(pl.from_arrow(rows)).write_parquet(path, statistics="full", row_group_size=2)


def with_duckdb(rows: pa.Table, path: str) -> None:
    """Every column may be null there."""
    with duckdb.connect() as connection:
        connection.register("rows", rows)
        connection.execute(f"COPY rows TO '{path}' (FORMAT parquet)")


def with_indexes(rows: pa.Table, path: str) -> None:
    """Between the columns and the footer."""
    pq.write_table(rows, path, write_page_index=True, row_group_size=2)


def with_other_pages(rows: pa.Table, path: str) -> None:
    pq.write_table(rows, path, data_page_version="2.0", compression="gzip", store_schema=False)


def in_another_order(rows: pa.Table, path: str) -> None:
    pq.write_table(rows.select(rows.column_names[::-1]), path, use_compliant_nested_type=False)


def with_categories(rows: pa.Table, path: str) -> None:
    column = rows.column("source").dictionary_encode()
    pq.write_table(rows.set_column(rows.column_names.index("source"), "source", column), path)


Write = Callable[[pa.Table, str], None]
WRITERS = [with_polars, with_duckdb, with_indexes, with_other_pages, in_another_order, with_categories]


def committed(table: Table, write: Write, rows: pa.Table) -> Table:
    """The table with a shard that has been written like this."""
    path = Path(table.location, "shard.parquet")
    write(rows, str(path))
    shard = Shard(f"split=train/{hash_of(path.read_bytes())}.parquet", "train", len(rows), path.stat().st_size)
    Path(table.location, "split=train").mkdir(exist_ok=True)
    path.rename(Path(table.location, shard.path))
    assert try_commit(table.newest(), [add_action(shard)], {"operation": "import"})
    return table.newest()


@pytest.fixture
def rows(tmp_path: Path) -> pa.Table:
    """Rows as softlabel stores them."""
    source = make_table(tmp_path / "source", identity())
    add(source, NAMES, "train")
    (shard,) = source.newest().shards()
    return read(source.newest(), shard)


@pytest.mark.parametrize("write", WRITERS)
def test_it_is_read_like_one_of_softlabel(tmp_path: Path, rows: pa.Table, write: Write) -> None:
    table = committed(make_table(tmp_path / "table", identity()), write, rows)
    (shard,) = table.shards()
    assert verify(table).findings == ()
    assert read(table, shard).equals(rows)
    assert index(table, ["key", "chunk"]).num_rows == len(rows)
    assert soft_labels_by_key(table, rows["key"].to_pylist()).equals(rows.select(SOFT_LABELS.names))
    assert inspect(table).splits["train"].sequences == len(rows)
    assert inspect(table).columns["head_ids"].bytes > 0
    assert add(table, ["a", "new"], "train").sequences == 1
    assert names_in(table.newest()) == sorted([*NAMES, "new"])


@pytest.mark.parametrize("write", [with_polars, with_indexes])
def test_its_damage_is_named(tmp_path: Path, rows: pa.Table, write: Write) -> None:
    table = committed(make_table(tmp_path / "table", identity()), write, rows)
    path = Path(table.location, table.shards()[0].path)
    content = path.read_bytes()
    for place in range(len(content) - 40, len(content), 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(IntegrityError, match=path.name):
            inspect(table)


def test_columns_and_nulls_that_a_row_does_not_have_are_damage(tmp_path: Path, rows: pa.Table) -> None:
    nulls = pa.array([None] * len(rows), pa.int32())
    place = rows.column_names.index("chunk")
    for number, wrong in enumerate([rows.drop_columns("chunk"), rows.set_column(place, "chunk", nulls)]):
        table = committed(make_table(tmp_path / str(number), identity()), pq.write_table, wrong)
        (shard,) = table.shards()
        assert [finding.path for finding in verify(table).findings] == [shard.path]
        with pytest.raises(IntegrityError, match=shard.path):
            read(table, shard)
