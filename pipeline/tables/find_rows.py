"""Finds rows of a table or a view: those of a document, those that an expression is true for, or a random sample.

Reads only the columns that decide about a row; memory is bounded by the rows that are found.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from softlabel.pipeline.tables.row_expression import row_expression
from softlabel.storage.log.state import Shard
from softlabel.storage.reader import outline, with_split
from softlabel.storage.schema import PARTITION, SEQUENCE
from softlabel.storage.views.row_groups import Group, outlines
from softlabel.storage.views.view import AnyTable, View

Predicate = Callable[[pa.Table], NDArray[np.bool_]]


@dataclass(frozen=True)
class Place:
    """Where a row is: its row group, and its number in what ``row_groups.load`` returns for it."""

    group: Group
    row: int


@dataclass(frozen=True)
class Found:
    """Some of the rows that match."""

    places: tuple[Place, ...]
    matching: int
    """How many match in all."""


@dataclass
class _Smallest:
    """Keeps the places with the smallest keys."""

    limit: int
    keys: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    places: list[Place] = field(default_factory=list)

    def add(self, keys: NDArray[np.float64], group: Group, rows: NDArray[np.int64]) -> None:
        if len(self.keys) >= self.limit:
            near = keys < self.keys[-1]
            keys, rows = keys[near], rows[near]
        if len(keys):
            joined = np.append(self.keys, keys)
            places = [*self.places, *(Place(group, int(row)) for row in rows)]
            order = np.argsort(joined, kind="stable")[: self.limit]
            self.keys, self.places = joined[order], [places[i] for i in order]


class Condition:
    """An expression over the rows of a table or a view, whose tables may carry different columns.

    Raises:
        UsageError: if it can't be evaluated in one of the tables.
    """

    def __init__(self, source: AnyTable, where: str | None) -> None:
        self._predicates: list[Predicate] = []
        needed: set[str] = set()
        for table in source.tables if where is not None else ():
            predicate, columns = row_expression(where or "", pa.schema([*SEQUENCE, *table.carried]))
            self._predicates.append(predicate)
            needed |= columns
        self.columns = sorted(needed - {PARTITION})
        """Columns that it reads, besides the split."""

    def __call__(self, group: Group, rows: pa.Table) -> NDArray[np.bool_]:
        """(R,) for which of R rows of a group it is true."""
        if not self._predicates:
            return np.ones(len(rows), bool)
        return self._predicates[group.table](with_split(rows, group.shard))


def sample(source: AnyTable, rows: int, seed: int, where: str | None = None) -> Found:
    """Rows drawn at random from all rows, or from those that an expression is true for; in the source's order.

    Raises:
        UsageError: if the expression can't be evaluated.
    """
    rng = np.random.default_rng(seed)
    if where is None and not (isinstance(source, View) and source.average):
        return _drawn(source, rows, rng)
    return _matching(source, Condition(source, where), rows, lambda count: rng.random(count))


def first(source: AnyTable, rows: int, where: str) -> Found:
    """The first rows, in the source's order, that an expression is true for.

    Raises:
        UsageError: if the expression can't be evaluated.
    """
    return _matching(source, Condition(source, where), rows, np.zeros)


def of_document(source: AnyTable, document: str, rows: int, where: str | None = None) -> Found:
    """The first rows of a document: chunk by chunk and, if several texts of it are stored, text by text.

    Raises:
        UsageError: if the expression can't be evaluated.
    """
    condition = Condition(source, where)
    columns = sorted({"document_id", "fingerprint", "chunk", *condition.columns})
    found: list[tuple[int, int, int, int, Place]] = []
    texts: dict[bytes, int] = {}
    for order, (group, part) in enumerate(outlines(source, columns)):
        is_document = pc.equal(part.column("document_id"), document).to_numpy()
        for row in np.flatnonzero(is_document & condition(group, part)).tolist() if is_document.any() else ():
            text = texts.setdefault(part.column("fingerprint")[row].as_py(), len(texts))
            found.append((group.table, text, part.column("chunk")[row].as_py(), order, Place(group, row)))
    found.sort(key=lambda each: each[:-1])
    return Found(tuple(place for *_, place in found[:rows]), len(found))


def some_documents(source: AnyTable, near: str, limit: int) -> list[str]:
    """A few document ids that contain a text or, failing that, any; for an error message."""
    alike: dict[str, None] = {}
    others: dict[str, None] = {}
    for _, part in outlines(source, ["document_id"]):
        for name in part.column("document_id").to_pylist():
            if near.lower() in name.lower():
                alike[name] = None
            elif len(others) < limit:
                others[name] = None
        if len(alike) >= limit:
            break
    return list(alike or others)[:limit]


def _matching(source: AnyTable, condition: Condition, limit: int, keys: Callable[[int], NDArray[np.float64]]) -> Found:
    kept, matching, order = _Smallest(limit), 0, {}
    for number, (group, part) in enumerate(outlines(source, condition.columns or ["chunk"])):
        rows = np.flatnonzero(condition(group, part))
        matching += len(rows)
        order[group] = number
        kept.add(keys(len(rows)), group, rows)
    places = sorted(kept.places, key=lambda place: (order[place.group], place.row))
    return Found(tuple(places), matching)


def _drawn(source: AnyTable, rows: int, rng: np.random.Generator) -> Found:
    """Rows drawn by their numbers, so that only the shards that have them are read."""
    shards = [(i, shard) for i, table in enumerate(source.tables) for shard in table.shards()]
    ends = np.cumsum([shard.rows for _, shard in shards], dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    numbers = np.sort(rng.choice(total, min(rows, total), replace=False)) if total else np.zeros(0, np.int64)
    places: list[Place] = []
    for (i, shard), end in zip(shards, ends, strict=True):
        wanted = numbers[(numbers >= end - shard.rows) & (numbers < end)] - (end - shard.rows)
        if len(wanted):
            places += _in_shard(source, i, shard, wanted)
    return Found(tuple(places), total)


def _in_shard(source: AnyTable, table: int, shard: Shard, numbers: NDArray[np.int64]) -> Iterator[Place]:
    """The places of a shard's rows with these numbers, which ascend."""
    start = 0
    for group, part in enumerate(outline(source.tables[table], shard, ["chunk"])):
        for number in numbers[(numbers >= start) & (numbers < start + len(part))]:
            yield Place(Group(table, shard, group), int(number) - start)
        start += len(part)
