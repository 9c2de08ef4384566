"""Programs that know FORMAT.md only (a reader in numpy, DuckDB's SQL, polars) read the same numbers as softlabel."""

import json
from collections.abc import Callable
from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable

from softlabel.storage.codec import decode
from softlabel.storage.reader import read
from softlabel.storage.table import Table
from tests.storage.tables import add, identity, make_table

ENTRIES = ("document_id", "position", "token_id", "value")
"""An id in the head of a position with its probability, or one in the tail with the number of its draws."""

Read = tuple[pl.DataFrame, pl.DataFrame]
"""The entries of all heads and of all tails, in any order."""


def by_numpy(shards: list[str], vocabulary: str, temperatures: int) -> Read:
    voc = pq.read_table(vocabulary).to_pandas()
    common, own = voc[voc.cluster.isna()], voc[voc.cluster.notna()]
    place_of = np.zeros(voc.number.max() + 1, np.int64)
    place_of[voc.number] = voc.place
    tokens = np.zeros((int(own.cluster.max()) + 1 if len(own) else 1, voc.place.max() + 1), np.int64)
    tokens[:, common.place] = common.token_id
    tokens[own.cluster.astype(int), own.place] = own.token_id
    heads, tails = [], []
    for row in (row for shard in shards for row in pq.read_table(shard).to_pylist()):
        row |= {name: np.array(values) for name, values in row.items() if isinstance(values, list)}
        at_head, at_tail = (np.repeat(np.arange(row["positions"]), row[f"{p}_counts"]) for p in ("head", "tail"))
        for at in range(row["positions"]):
            here, mass = at_head == at, -np.expm1(row["tail_log_masses"][at * temperatures])
            weights = np.exp(np.cumsum(row["head_codes"][here]) / -64)
            weights *= mass / max(weights.sum(), 1e-300)
            cluster = row["head_clusters"][at]
            ids = tokens[cluster, place_of[row["head_ids"][here]]]
            heads += [(row["document_id"], at, token, weight) for token, weight in zip(ids, weights, strict=True)]
            here = at_tail == at
            ids = tokens[cluster, np.cumsum(place_of[row["tail_ids"][here].astype(int)])]
            tails += [(row["document_id"], at, *pair) for pair in zip(ids, row["tail_draws"][here], strict=True)]
    return pl.DataFrame(heads, ENTRIES, orient="row"), pl.DataFrame(tails, ENTRIES, orient="row")


def by_duckdb(shards: list[str], vocabulary: str, temperatures: int) -> Read:
    spans = f"""
        WITH vocabulary AS (FROM read_parquet('{vocabulary}')),
        places AS (SELECT DISTINCT number, place FROM vocabulary),
        every AS (
            SELECT document_id, chunk, unnest(range(positions)) AS position, unnest(head_clusters) AS cluster,
                   unnest(head_counts) AS heads, unnest(tail_counts) AS tails,
                   unnest(tail_log_masses[1:len(tail_log_masses):{temperatures}]) AS log_mass
            FROM read_parquet({shards})
        ), spans AS (
            SELECT *, sum(heads) OVER earlier - heads AS head, sum(tails) OVER earlier - tails AS tail
            FROM every WINDOW earlier AS (PARTITION BY document_id, chunk ORDER BY position)
        )"""
    heads = duckdb.sql(f"""{spans}, entries AS (
            SELECT document_id, chunk, unnest(range(len(head_ids))) AS i, unnest(head_ids) AS number,
                   unnest(head_codes) AS gap
            FROM read_parquet({shards})
        ), weights AS (
            SELECT *, exp(sum(gap) OVER (PARTITION BY document_id, chunk, position ORDER BY i) / -64.0) AS weight
            FROM entries JOIN spans USING (document_id, chunk)
            WHERE i >= head AND i < head + heads
        )
        SELECT document_id, position, token_id,
               weight / sum(weight) OVER (PARTITION BY document_id, chunk, position)
                   * (1 - exp(log_mass::DOUBLE)) AS value
        FROM weights JOIN vocabulary AS v
          ON v.number = weights.number AND coalesce(v.cluster, weights.cluster) = weights.cluster
    """).pl()
    tails = duckdb.sql(f"""{spans}, entries AS (
            SELECT document_id, chunk, unnest(range(len(tail_ids))) AS i, unnest(tail_ids) AS number,
                   unnest(tail_draws) AS value
            FROM read_parquet({shards})
        ), sums AS (
            SELECT document_id, position, cluster, value,
                   sum(place) OVER (PARTITION BY document_id, chunk, position ORDER BY i) AS place
            FROM entries JOIN places USING (number) JOIN spans USING (document_id, chunk)
            WHERE i >= tail AND i < tail + tails
        )
        SELECT document_id, position, token_id, value
        FROM sums JOIN vocabulary AS v ON v.place = sums.place AND coalesce(v.cluster, sums.cluster) = sums.cluster
    """).pl()
    return heads, tails


def by_polars(shards: list[str], vocabulary: str, temperatures: int) -> Read:
    voc, rows = pl.read_parquet(vocabulary), pl.concat(map(pl.read_parquet, shards))
    own, common = voc.filter(pl.col("cluster").is_not_null()), voc.filter(pl.col("cluster").is_null())
    where = ("document_id", "chunk", "position")
    every = rows.select(
        "document_id",
        "chunk",
        pl.int_ranges("positions").alias("position"),
        pl.col("head_clusters").alias("cluster"),
        "head_counts",
        "tail_counts",
        pl.col("tail_log_masses").list.gather_every(temperatures).alias("log_mass"),
    ).explode(pl.exclude("document_id", "chunk"))

    def entries(part: str, value: str) -> pl.DataFrame:
        """The entries of a flat list, each with its position."""
        counted = every.filter(pl.col(f"{part}_counts") > 0)
        of_each = counted.select(*where, "cluster", "log_mass", pl.int_ranges(f"{part}_counts").alias("i")).explode("i")
        flat = rows.select(number=f"{part}_ids", value=value).explode("number", "value").drop_nulls()
        return pl.concat([of_each, flat], how="horizontal")

    def tokens(places: pl.DataFrame, on: str) -> pl.DataFrame:
        own_ids, common_ids = (
            table.select(*keys, "token_id") for table, keys in ((own, (on, "cluster")), (common, (on,)))
        )
        found = places.join(own_ids, on=[on, "cluster"], how="left").join(common_ids, on=on, how="left", suffix="_any")
        return found.with_columns(token_id=pl.coalesce("token_id", "token_id_any"))

    heads = entries("head", "head_codes").with_columns(weight=(pl.col("value").cum_sum().over(where) / -64).exp())
    mass = 1 - pl.col("log_mass").cast(pl.Float64).exp()
    heads = heads.with_columns(value=pl.col("weight") / pl.col("weight").sum().over(where) * mass)
    tails = entries("tail", "tail_draws").join(
        voc.select("number", "place").unique(), on="number", maintain_order="left"
    )
    tails = tails.with_columns(pl.col("place").cum_sum().over(where))
    return tokens(heads, "number").select(ENTRIES), tokens(tails, "place").select(ENTRIES)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    table = make_table(tmp_path_factory.mktemp("readers") / "table", identity(temperatures=(1.0, 2.0)))
    add(table, [f"a{i}" for i in range(30)])
    add(table.newest(), [f"b{i}" for i in range(10)])
    return table.newest()


def ours(table: Table) -> Read:
    heads, tails = [], []
    for rows in (read(table, shard) for shard in table.shards()):
        for i, name in enumerate(rows.column("document_id").to_pylist()):
            labels = decode(rows.slice(i, 1), table.numbering)
            every = np.arange(labels.positions)
            at_head, at_tail = np.repeat(every, labels.head_counts), np.repeat(every, labels.tail_counts)
            probabilities = np.exp(labels.head_logprobs.astype(float))
            heads += [(name, *entry) for entry in zip(at_head, labels.head_ids, probabilities, strict=True)]
            tails += [(name, *entry) for entry in zip(at_tail, labels.tail_ids, labels.tail_draws, strict=True)]
    return pl.DataFrame(heads, ENTRIES, orient="row"), pl.DataFrame(tails, ENTRIES, orient="row")


@pytest.mark.parametrize("reader", [by_numpy, by_duckdb, by_polars])
def test_a_program_that_knows_only_the_specification_reads_the_same_soft_labels(
    reader: Callable[[list[str], str, int], Read], table: Table
):
    delta = DeltaTable(table.location)
    properties = delta.metadata().configuration
    vocabulary = str(Path(table.location) / "_softlabel" / properties["softlabel.vocabulary"])
    temperatures = len(json.loads(properties["softlabel.identity"])["temperatures"])
    assert len(pl.read_parquet(vocabulary).filter(pl.col("cluster") > 0)), "the table has clusters"
    for found, expected in zip(reader(delta.file_uris(), vocabulary, temperatures), ours(table), strict=True):
        found, expected = (part.sort(ENTRIES[:3]) for part in (found, expected))
        assert found.select(ENTRIES[:3]).rows() == expected.select(ENTRIES[:3]).rows()
        np.testing.assert_allclose(found["value"], expected["value"], rtol=1e-4)
