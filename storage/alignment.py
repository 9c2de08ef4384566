"""Which rows of several tables are about the same sequence, by their keys.

Made once for a view, from the keys alone; of each row it keeps 8 bytes a table. Reads no soft labels.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from storage.reader import outline
from storage.table import Shard, Table

Rows = NDArray[np.int64]


class Alignment:
    """For each row of the first of several tables, where its sequence is in the others.

    What a table holds under several documents is found under one of them: its teacher said the same of each.

    Attributes:
        sequences: rows of the first table whose sequence all others have, too.
        left_out: different sequences that some of the tables have and others lack.
    """

    def __init__(self, tables: Sequence[Table]) -> None:
        keyed = [_Keyed(table) for table in tables]
        self._keyed = keyed
        self._places = [keyed[0].find(other) for other in keyed[1:]]
        """Of each row of the first table, its number in each other one; -1 if that lacks it."""
        self._common = np.logical_and.reduce([places >= 0 for places in self._places])
        self.sequences = int(self._common.sum())
        counts = pl.concat([table.keys.unique() for table in keyed]).value_counts(name="tables")
        self.left_out = counts.filter(pl.col("tables") < len(keyed)).height

    def rows(self, shard: Shard, number: int) -> Rows:
        """Rows of a row group of the first table that all others have."""
        return np.flatnonzero(self._common[self._keyed[0].span(shard, number)])

    def counterparts(self, table: int, shard: Shard, number: int) -> Iterator[tuple[Shard, int, Rows, Rows]]:
        """Where a table holds those rows.

        Args:
            table: which of the tables, from 1.
            shard: of the first table.
            number: of the row group.

        Returns:
            Shard and number of each row group that is needed, which of its rows, and which of ``rows`` these are.
        """
        places = self._places[table - 1][self._keyed[0].span(shard, number)][self.rows(shard, number)]
        return self._keyed[table].groups_of(places)


class _Keyed:
    """A table's keys in the order of its shards, and where its row groups begin."""

    def __init__(self, table: Table) -> None:
        self._groups: list[tuple[Shard, int]] = []
        parts, counts = [pl.Series("key", dtype=pl.Binary)], [0]
        for shard in table.shards():
            for number, rows in enumerate(outline(table, shard, ["key"])):
                self._groups.append((shard, number))
                parts.append(pl.DataFrame(rows).get_column("key"))
                counts.append(len(rows))
        self.keys = pl.concat(parts)
        self._starts = np.cumsum(counts)
        self._numbers = {group: place for place, group in enumerate(self._groups)}

    def find(self, other: "_Keyed") -> Rows:
        """(rows,) number of a row of another table with the same key, or -1."""
        there = other.keys.to_frame().with_row_index("row").unique("key", keep="first")
        joined = self.keys.to_frame().join(there, on="key", how="left", maintain_order="left")
        return joined.get_column("row").cast(pl.Int64).fill_null(-1).to_numpy()

    def span(self, shard: Shard, number: int) -> slice:
        place = self._numbers[shard, number]
        return slice(self._starts[place], self._starts[place + 1])

    def groups_of(self, rows: Rows) -> Iterator[tuple[Shard, int, Rows, Rows]]:
        groups = np.searchsorted(self._starts, rows, side="right") - 1
        for group in np.unique(groups).tolist():
            which = np.flatnonzero(groups == group)
            yield *self._groups[group], rows[which] - self._starts[group], which
