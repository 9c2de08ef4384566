"""Finds rows of several tables that belong to the same sequence, by their keys.

Computed once for a view, from the keys only; keeps 8 bytes for each row and table. Reads no soft labels.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from softlabel.storage.log.state import Shard
from softlabel.storage.reader import outline
from softlabel.storage.table import Table

Rows = NDArray[np.int64]


class Alignment:
    """Maps each row of the first of several tables to the rows of the others with the same sequence.

    If a table has a sequence in several documents, one of its rows is used: their soft labels are the same.

    Attributes:
        sequences: number of rows of the first table whose sequence is in all other tables.
        left_out: number of distinct sequences that are in some of the tables but not in all.
    """

    def __init__(self, tables: Sequence[Table]) -> None:
        read = [_read(table) for table in tables]
        self._groups = [groups for groups, _ in read]
        all_keys = [keys for _, keys in read]
        keys, *others = all_keys
        self._places = [_find(keys, other) for other in others]
        """For each other table: the row number there of each row of the first table, or -1 if it is missing."""
        self._common = np.logical_and.reduce([places >= 0 for places in self._places])
        self.sequences = int(self._common.sum())
        counts = pl.concat([one.unique() for one in all_keys]).value_counts(name="tables")
        self.left_out = counts.filter(pl.col("tables") < len(tables)).height

    def rows(self, shard: Shard, number: int) -> Rows:
        """Rows of a row group of the first table that are in all other tables."""
        return np.flatnonzero(self._common[self._groups[0].span(shard, number)])

    def counterparts(self, table: int, shard: Shard, number: int) -> Iterator[tuple[Shard, int, Rows, Rows]]:
        """Where another table has the rows of ``rows``.

        Args:
            table: index of the other table, from 1.
            shard: shard of the first table.
            number: number of the row group in that shard.

        Returns:
            For each row group that is needed: its shard, its number, its rows, and their indices in ``rows``.
        """
        places = self._places[table - 1][self._groups[0].span(shard, number)][self.rows(shard, number)]
        return self._groups[table].groups_of(places)


def _read(table: Table) -> tuple["_Groups", pl.Series]:
    """A table's row groups and its keys, in the order of its shards."""
    groups: list[tuple[Shard, int]] = []
    parts = [pl.Series("key", dtype=pl.Binary)]
    for shard in table.shards():
        for number, rows in enumerate(outline(table, shard, ["key"])):
            groups.append((shard, number))
            parts.append(pl.DataFrame(rows).get_column("key"))
    return _Groups(groups, np.cumsum([len(part) for part in parts])), pl.concat(parts)


def _find(keys: pl.Series, there: pl.Series) -> Rows:
    """(rows,) for each key, the index of the first equal key in ``there``, or -1."""
    numbered = there.to_frame().with_row_index("row").unique("key", keep="first")
    joined = keys.to_frame().join(numbered, on="key", how="left", maintain_order="left")
    return joined.get_column("row").cast(pl.Int64).fill_null(-1).to_numpy()


class _Groups:
    """A table's row groups and the row number at which each begins; ``starts`` ends with the number of rows."""

    def __init__(self, groups: list[tuple[Shard, int]], starts: Rows) -> None:
        self._groups, self._starts = groups, starts
        self._numbers = {group: place for place, group in enumerate(groups)}

    def span(self, shard: Shard, number: int) -> slice:
        place = self._numbers[shard, number]
        return slice(self._starts[place], self._starts[place + 1])

    def groups_of(self, rows: Rows) -> Iterator[tuple[Shard, int, Rows, Rows]]:
        groups = np.searchsorted(self._starts, rows, side="right") - 1
        for group in np.unique(groups).tolist():
            which = np.flatnonzero(groups == group)
            yield *self._groups[group], rows[which] - self._starts[group], which
