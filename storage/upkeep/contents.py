"""What the columns of a table's documents hold: counts by split and by value, and documents that have changed.

One pass over the footers and small columns of the shards. Takes some 16 bytes of memory for each document and chunk,
whatever is in them.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from softlabel.storage.reader import Outline
from softlabel.storage.table import Table

_MOST_VALUES = 1_000
"""Distinct values of a carried column that are counted one by one."""
_LISTED = 10
"""Values of a carried column that are reported, the most frequent ones."""
_LONGEST = 200
"""Characters of a value that are reported."""


@dataclass(frozen=True)
class SplitSize:
    """Size of one split."""

    shards: int
    documents: int
    sequences: int
    tokens: int
    positions: int
    bytes: int


@dataclass(frozen=True)
class ValueCount:
    """How often a carried column has a value."""

    value: str | None
    """The value as text; None where the document has none."""
    sequences: int
    positions: int


@dataclass(frozen=True)
class CarriedColumn:
    """What a carried column holds."""

    type: str
    distinct: int | None
    """Number of distinct values, none included; None if there are too many to count, or the type is nested."""
    values: tuple[ValueCount, ...]
    """The most frequent values; empty if they are not counted."""
    lowest: str | None
    highest: str | None
    """The lowest and the highest value of numbers, dates and timestamps."""


@dataclass(frozen=True)
class Contents:
    """What the columns of the documents hold."""

    splits: dict[str, SplitSize]
    column_bytes: dict[str, int]
    """Compressed bytes of each column."""
    documents: int
    carried: dict[str, CarriedColumn]
    changed: int
    """Documents that are stored with several texts: they have changed since their first capture, and the rows of the
    earlier text have stayed."""
    incomplete: int
    """Texts of documents of which chunks are missing: a capture was interrupted, or rows were dropped."""


def contents(table: Table, watch: Callable[[int, int], None] = lambda done, total: None) -> Contents:
    """Count what a table holds.

    Args:
        table: version to count.
        watch: called after each shard, with the number of shards that are counted, and of all.

    Raises:
        IntegrityError: if a shard is missing, or damaged in these columns.
    """
    columns = ["document_id", "fingerprint", "chunk", "chunks", "tokens", "positions"]
    names = {split: _Texts() for split in sorted({shard.split for shard in table.shards()}, reverse=True)}
    carried = {name: _Values(table.carried.field(name).type) for name in table.carried.names}
    sizes = {split: Counter[str]() for split in names}
    column_bytes = Counter[str]()
    shards = table.shards()
    for done, shard in enumerate(shards, 1):
        sizes[shard.split].update(shards=1, bytes=shard.bytes)
        with Outline(table, shard) as opened:
            column_bytes.update(opened.column_bytes())
            for part in opened.parts([*columns, *carried]):
                size = {name: pc.sum(part.column(name)).as_py() or 0 for name in ("tokens", "positions")}
                sizes[shard.split].update(size, sequences=len(part))
                names[shard.split].add(part)
                for name, values in carried.items():
                    values.add(part.column(name), part.column("positions"))
        watch(done, len(shards))
    texts = {split: found.joined() for split, found in names.items()}
    everything = pl.concat([_Texts.EMPTY, *texts.values()])
    by_text = everything.group_by("document", "text").agg(pl.col("chunk").n_unique(), pl.col("chunks").max())
    texts_of_each = by_text.group_by("document").len("texts")
    return Contents(
        splits={
            split: SplitSize(documents=texts[split]["document"].n_unique(), **size) for split, size in sizes.items()
        },
        column_bytes=dict(column_bytes),
        documents=texts_of_each.height,
        carried={name: values.found() for name, values in carried.items()},
        changed=texts_of_each.filter(pl.col("texts") > 1).height,
        incomplete=by_text.filter(pl.col("chunk") < pl.col("chunks")).height,
    )


class _Texts:
    """Which chunks of which text of which document there are, by hashes."""

    EMPTY = pl.DataFrame(schema={"document": pl.UInt64, "text": pl.UInt64, "chunk": pl.Int32, "chunks": pl.Int32})

    def __init__(self) -> None:
        self._parts = [self.EMPTY]

    def add(self, rows: pa.Table) -> None:
        found = pl.DataFrame(rows.select(["document_id", "fingerprint", "chunk", "chunks"]))
        self._parts.append(
            found.select(
                pl.col("document_id").hash().alias("document"),
                pl.col("fingerprint").hash().alias("text"),
                "chunk",
                "chunks",
            )
        )

    def joined(self) -> pl.DataFrame:
        return pl.concat(self._parts)


@dataclass
class _Values:
    """Counts the values of a carried column, as long as there are few."""

    type: pa.DataType
    sequences: Counter[str | None] = field(default_factory=Counter)
    positions: Counter[str | None] = field(default_factory=Counter)
    too_many: bool = False
    extremes: list[pa.Scalar] = field(default_factory=list)

    def add(self, values: pa.ChunkedArray, positions: pa.ChunkedArray) -> None:
        if pa.types.is_nested(self.type):
            self.too_many = True
            return
        if _is_ordered(self.type):
            self._keep_extremes(values)
        if self.too_many:
            return
        grouped = (
            pa.table({"value": values, "positions": positions})
            .group_by("value")
            .aggregate([("positions", "sum"), ("positions", "count")])
        )
        for value, total, count in zip(*(grouped.column(i).to_pylist() for i in _order(grouped)), strict=True):
            self.sequences[_as_text(value)] += count
            self.positions[_as_text(value)] += total
        if len(self.sequences) > _MOST_VALUES:
            self.too_many = True
            self.sequences.clear()
            self.positions.clear()

    def _keep_extremes(self, values: pa.ChunkedArray) -> None:
        found = pc.min_max(values)
        known = [value for value in (found["min"], found["max"], *self.extremes) if value.is_valid]
        if known:
            both = pc.min_max(pa.array([value.as_py() for value in known], self.type))
            self.extremes = [both["min"], both["max"]]

    def found(self) -> CarriedColumn:
        listed = sorted(self.positions.items(), key=lambda item: (-item[1], item[0] is None, item[0] or ""))[:_LISTED]
        low, high = (_as_text(each.as_py()) for each in self.extremes) if self.extremes else (None, None)
        return CarriedColumn(
            type=str(self.type),
            distinct=None if self.too_many else len(self.sequences),
            values=tuple(ValueCount(value, self.sequences[value], total) for value, total in listed),
            lowest=low,
            highest=high,
        )


def _order(grouped: pa.Table) -> Iterable[int]:
    return (grouped.column_names.index(name) for name in ("value", "positions_sum", "positions_count"))


def _is_ordered(kind: pa.DataType) -> bool:
    tests = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_temporal)
    return any(test(kind) for test in tests)


def _as_text(value: object) -> str | None:
    if value is None:
        return None
    text = value.hex() if isinstance(value, bytes) else str(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
