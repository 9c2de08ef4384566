"""Sequences to evaluate students on: a table's eval split, without what also occurs in its train split.

Left out are sequences that are also trained on, token for token, and sequences of documents that are: in a view, a
document that one table holds out may be in another's train split, cut or captured differently, or under another id. The
rest comes in the table's order, so that every student is evaluated on the same sequences. Decodes no soft labels and
knows no model.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Self

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from softlabel.pipeline.stream.batch import COLUMNS, Batch, Pack, Sequences, collate
from softlabel.pipeline.stream.by_column import largest_values, numbers, require_columns
from softlabel.pipeline.stream.epoch_plan import Ints, best_fit
from softlabel.storage.errors import TableError
from softlabel.storage.reader import outline
from softlabel.storage.views.row_groups import load, outlines
from softlabel.storage.views.view import AnyTable

PART_TOKENS = 1 << 18
"""A batch ends with a row group at least once in about so many tokens: there, an evaluation can be continued."""


@dataclass(frozen=True)
class HeldOutBatch:
    """A batch of n held-out sequences, and what is known about each."""

    batch: Batch
    sequence: NDArray[np.int64]
    """(N,) number of each position's sequence in the batch."""
    documents: tuple[str, ...]
    """(n,) id of each sequence's document."""
    groups: Mapping[str, Ints]
    """By column: (n,) number of each sequence's value in ``Holdout.groups``."""
    done: int | None
    """Number of row groups that end with this batch; None if the next batch continues one of them."""


@dataclass(frozen=True)
class Holdout:
    """The held-out sequences of a table version or a view; ``batches`` reads them again on each call."""

    table: AnyTable
    sequences: int
    positions: int
    document_positions: NDArray[np.int64]
    """Number of positions of each document."""
    left_out: int
    """Number of eval sequences whose key also occurs in the train split (for a view: of any of its tables)."""
    left_out_documents: int
    """Number of further eval sequences whose document also occurs in the train split."""
    groups: Mapping[str, tuple[str, ...]]
    """By column: its values, those with the most positions first."""
    _longest: int
    _left_out: Mapping[str, pa.Array]
    """By column: the values of the rows that are left out."""

    @classmethod
    def of(cls, table: AnyTable, by: Sequence[str] = ()) -> Self:
        """Find the held-out sequences; reads only keys, ids, counts and the columns to group by.

        Args:
            table: table or view.
            by: carried columns, by whose values results will be grouped.

        Raises:
            TableError: if there are none.
            UsageError: if the table has no such column.
        """
        require_columns(table, by)
        columns = list(dict.fromkeys(["key", *_DOCUMENT, "tokens", "positions", *by]))
        numbered = outlines(table, columns, "eval")
        parts = [
            rows.append_column("table", pa.array([where.table] * len(rows), pa.int64())) for where, rows in numbered
        ]
        if not sum(map(len, parts)):
            raise _nothing(table, "no sequences in the eval split")
        held = pl.DataFrame(pa.concat_tables(parts)).with_columns(_HASHED).with_row_index("row")
        trained = _trained(table)
        seen = held.join(trained, on="key", how="semi")
        rest = held.join(trained, on="key", how="anti")
        same_id = rest.join(trained, on="document_id hash", how="semi")
        copies = rest.join(_of_other_tables(rest, trained), on="row", how="semi")
        kept = rest.join(pl.concat([same_id, copies]), on="row", how="anti")
        if not kept.get_column("positions").sum():
            raise _nothing(table, f"{len(held)} sequences, all of which also occur in the train split")
        ids = kept.group_by("document_id").agg(pl.col("positions").sum()).get_column("positions")
        return cls(
            table=table,
            sequences=len(kept),
            positions=int(kept.get_column("positions").sum()),
            document_positions=ids.to_numpy().astype(np.int64),
            left_out=len(seen),
            left_out_documents=len(rest) - len(kept),
            groups={name: largest_values(kept, name) for name in by},
            _longest=int(kept.get_column("tokens").max()),  # type: ignore[arg-type]
            _left_out={
                name: rows.get_column(name).unique().to_arrow().cast(table.tables[0].schema.field(name).type)
                for name, rows in (("key", seen), ("document_id", same_id), ("fingerprint", copies))
            },
        )

    def batches(self, batch_tokens: int, packing: bool, start: int = 0) -> Iterator[HeldOutBatch]:
        """Every sequence once, in batches.

        Args:
            batch_tokens: maximum tokens of a batch, including padding; a single longer row is a batch of its own.
            packing: whether sequences share rows, which is only right for a student that ``separates`` them.
            start: number of row groups to leave out, from ``HeldOutBatch.done``.
        """
        rows: list[_Row] = []
        longest = tokens = 0
        for number, (where, _) in enumerate(outlines(self.table, ["key"], "eval")):
            if number < start:
                continue
            for row in self._rows(load(self.table, where, self._columns), packing):
                longest = max(longest, row.pack.tokens)
                if rows and longest * (len(rows) + 1) > batch_tokens:
                    yield self._collate(rows, None)
                    rows, longest = [], row.pack.tokens
                rows.append(row)
                tokens += row.pack.tokens
            if rows and tokens >= PART_TOKENS:
                yield self._collate(rows, number + 1)
                rows, longest, tokens = [], 0, 0
        if rows:
            yield self._collate(rows, None)

    @property
    def _columns(self) -> list[str]:
        return list(dict.fromkeys(["key", *_DOCUMENT, "tokens", *COLUMNS, *self.groups]))

    def _rows(self, group: pa.Table, packing: bool) -> Iterator["_Row"]:
        left_out = [pc.is_in(group.column(name), values) for name, values in self._left_out.items()]
        group = group.filter(pc.invert(reduce(pc.or_, left_out)))
        tokens, sequences = (
            group.column("tokens").to_numpy(),
            Sequences([group.drop_columns([*self.groups])]),
        )
        values = {name: numbers(group, name, known) for name, known in self.groups.items()}
        packs = best_fit(tokens, self._longest) if packing else np.arange(len(tokens))
        documents = group.column("document_id").to_pylist()
        for pack in range(packs.max(initial=-1) + 1):
            members = np.flatnonzero(packs == pack)
            groups = {name: each[members] for name, each in values.items()}
            yield _Row(Pack(sequences, members), [documents[member] for member in members], groups)

    def _collate(self, rows: list["_Row"], done: int | None) -> HeldOutBatch:
        packs = [row.pack for row in rows]
        counts = np.concatenate([pack.sequences.counts("entropies", pack.rows) for pack in packs])
        return HeldOutBatch(
            batch=collate(packs, None, self.table, int(counts.sum())),
            sequence=np.repeat(np.arange(len(counts)), counts),
            documents=tuple(document for row in rows for document in row.documents),
            groups={name: np.concatenate([row.groups[name] for row in rows]) for name in self.groups},
            done=done,
        )


@dataclass(frozen=True)
class _Row:
    """Sequences that share a row of a batch."""

    pack: Pack
    documents: list[str]
    groups: dict[str, Ints]


_DOCUMENT = ("document_id", "fingerprint")
"""Columns that say which document a row is from: its id, and its content, whose id may differ elsewhere."""
_HASHED = [pl.col(name).hash(seed=0).alias(f"{name} hash") for name in _DOCUMENT]


def _trained(table: AnyTable) -> pl.DataFrame:
    """Key, table, and hashes of the document's id and content, of every row that is trained on."""
    schema = {"key": pl.Binary, **{f"{name} hash": pl.UInt64 for name in _DOCUMENT}, "table": pl.Int64}
    parts = [pl.DataFrame(schema=schema)]
    for number, part in enumerate(table.tables):
        for shard in part.shards():
            if shard.split != "eval":
                read = outline(part, shard, ["key", *_DOCUMENT])
                parts += [pl.DataFrame(rows).select("key", *_HASHED, _table(number)) for rows in read]
    return pl.concat(parts)


def _table(number: int) -> pl.Expr:
    return pl.lit(number, pl.Int64).alias("table")


def _of_other_tables(rows: pl.DataFrame, trained: pl.DataFrame) -> pl.DataFrame:
    """Which rows are of documents that another table trains on; in one table, copies of a document have equal keys."""
    same = rows.join(trained.select("fingerprint hash", "table").unique(), on="fingerprint hash")
    return same.filter(pl.col("table") != pl.col("table_right")).select("row").unique()


def _nothing(table: AnyTable, found: str) -> TableError:
    return TableError(
        "the table has no sequences to evaluate students on",
        expected="sequences in the eval split that do not also occur in the train split",
        found=f"{found}, in version {table.version}",
        where=table.location,
        do="capture more documents, or capture into a new table with a larger shards.eval_fraction",
    )
