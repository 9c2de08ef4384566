"""Reads the rows of a table or a view, row group by row group, as students are trained on them.

Rows of a table are returned as they are stored. Rows of a view write token ids as the view's numbering does, and have
tail masses at the temperatures that all its tables have. Rows of an average have the soft-label columns once for each
table (``column_of``). The caller decides which rows to read, and in which order.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from softlabel.storage.codec import NUMBERED, flatten, renumber
from softlabel.storage.log.state import Shard
from softlabel.storage.reader import outline, read
from softlabel.storage.schema import SOFT_LABELS
from softlabel.storage.table import Table
from softlabel.storage.views.view import AnyTable, View


@dataclass(frozen=True)
class Group:
    """A row group, the smallest unit that is read."""

    table: int
    """Index in ``source.tables``; 0 for an average."""
    shard: Shard
    number: int


def outlines(source: AnyTable, columns: Sequence[str], split: str | None = None) -> Iterator[tuple[Group, pa.Table]]:
    """Each row group with a few small columns of its rows, in order; checked as by ``storage.reader.outline``.

    Raises:
        IntegrityError: if a shard is missing, truncated, or damaged in these columns.
    """
    average = isinstance(source, View) and source.average
    for number, table in enumerate(source.tables[:1] if average else source.tables):
        for shard in table.shards(split):
            for group, rows in enumerate(outline(table, shard, columns)):
                yield Group(number, shard, group), _common(source, shard, group, rows)


def load(source: AnyTable, group: Group, columns: Sequence[str]) -> pa.Table:
    """The rows of a group from ``outlines``, in the same order.

    Args:
        source: table or view that has the group.
        group: a group from ``outlines``.
        columns: names of the columns to read.

    Raises:
        IntegrityError: if a shard is missing or damaged.
    """
    table = source.tables[group.table]
    if not isinstance(source, View):
        return read(table, group.shard, columns, [group.number])
    rows = read(table, group.shard, _needed(columns), [group.number])
    rows = _in_common_terms(source, table, _common(source, group.shard, group.number, rows)).select(columns)
    names = [name for name in columns if name in SOFT_LABELS.names]
    if source.average and names:
        for number in range(1, len(source.tables)):
            for name, column in zip(names, _counterparts(source, number, group, names).columns, strict=True):
                rows = rows.append_column(column_of(name, number), column)
    return rows


def column_of(name: str, table: int) -> str:
    """Name of a soft-label column of one of an average's tables, by the index of the table."""
    return f"{name}:{table}" if table else name


def flat(rows: pa.Table, name: str) -> tuple[NDArray[Any], NDArray[np.int32]]:
    """Flat values of a column of lists, and the offsets at which each row begins and the last one ends."""
    lists = rows.column(name).combine_chunks()
    offsets = lists.offsets.to_numpy()
    return lists.flatten().to_numpy(zero_copy_only=False), offsets - offsets[0]


def _common(source: AnyTable, shard: Shard, number: int, rows: pa.Table) -> pa.Table:
    """For an average, the rows of its first table that are in all others; otherwise all rows."""
    if not (isinstance(source, View) and source.average):
        return rows
    return rows.take(pa.array(source.alignment.rows(shard, number)))


def _counterparts(view: View, number: int, group: Group, columns: Sequence[str]) -> pa.Table:
    """The soft labels of the same sequences in another table of an average."""
    table, places = view.tables[number], [np.zeros(0, np.int64)]
    wanted = _needed(columns)
    parts = [pa.schema([SOFT_LABELS.field(name) for name in wanted]).empty_table()]
    for shard, there, rows, which in view.alignment.counterparts(number, group.shard, group.number):
        parts.append(read(table, shard, wanted, [there]).take(pa.array(rows)))
        places.append(which)
    order = np.argsort(np.concatenate(places))
    return _in_common_terms(view, table, pa.concat_tables(parts).take(pa.array(order))).select(columns)


def _needed(columns: Sequence[str]) -> list[str]:
    """The given columns, and those without which ids can't be numbered otherwise."""
    return list(dict.fromkeys([*columns, *(NUMBERED if set(NUMBERED).intersection(columns) else ())]))


def _in_common_terms(view: View, table: Table, rows: pa.Table) -> pa.Table:
    """The same rows with the numbering and the temperatures of the view."""
    if set(NUMBERED) <= set(rows.column_names):
        numbered = renumber(flatten(rows), table.numbering, view.numbering)
        for name in NUMBERED:
            kind = SOFT_LABELS.field(name).type.value_type.to_pandas_dtype()
            rows = _with(rows, name, numbered[name].astype(kind), flat(rows, name)[1])
    if "tail_log_masses" in rows.column_names and view.temperatures != table.temperatures:
        values, offsets = flat(rows, "tail_log_masses")
        stored, wanted = len(table.temperatures), [table.temperatures.index(T) for T in view.temperatures]
        values = values.reshape(-1, stored)[:, wanted].ravel()
        rows = _with(rows, "tail_log_masses", values, offsets // stored * len(wanted))
    return rows


def _with(rows: pa.Table, name: str, values: NDArray[Any], offsets: NDArray[np.int32]) -> pa.Table:
    lists = pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
    return rows.set_column(rows.column_names.index(name), name, lists)
