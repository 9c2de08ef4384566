"""Sequences to evaluate students on: a table's eval split, without those that also occur in its train split.

They come in the table's order, so that every student is evaluated on the same sequences. Decodes no soft labels and
knows no model.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from softlabel.pipeline.stream.batch import COLUMNS, Batch, Pack, Sequences, collate
from softlabel.pipeline.stream.epoch_plan import best_fit
from softlabel.storage.errors import TableError
from softlabel.storage.reader import index
from softlabel.storage.views.row_groups import load, outlines
from softlabel.storage.views.view import AnyTable


@dataclass(frozen=True)
class Holdout:
    """The held-out sequences of a table version or a view; ``batches`` reads them again on each call."""

    table: AnyTable
    sequences: int
    positions: int
    left_out: int
    """Number of eval sequences whose key also occurs in the train split (for a view: of any of its tables)."""
    _longest: int
    _left_out_keys: pa.Array
    """Keys that are left out."""

    @classmethod
    def of(cls, table: AnyTable) -> Self:
        """Find the held-out sequences; reads only keys and counts.

        Raises:
            TableError: if there are none.
        """
        parts = [rows for _, rows in outlines(table, ["key", "tokens", "positions"], "eval")]
        if not sum(map(len, parts)):
            raise _nothing(table, "no sequences in the eval split")
        held = pl.LazyFrame(pa.concat_tables(parts))
        rows = pl.LazyFrame(pa.concat_tables(index(part, ["key"]) for part in table.tables))
        trained = rows.filter(pl.col("split") != "eval").select("key")
        seen = held.join(trained, on="key", how="semi").select("key").collect()
        counts, total = pl.collect_all(
            [
                held.join(trained, on="key", how="anti").select(
                    pl.len(), pl.col("positions").sum(), longest=pl.col("tokens").max()
                ),
                held.select(pl.len()),
            ]
        )
        sequences, positions, longest = counts.row(0)
        if not positions:
            raise _nothing(table, f"{total.item()} sequences, all of which also occur in the train split")
        left_out = total.item() - sequences
        return cls(
            table, sequences, positions, left_out, longest, seen.get_column("key").unique().to_arrow().cast(pa.binary())
        )

    def batches(self, batch_tokens: int, packing: bool) -> Iterator[Batch]:
        """Every sequence once, in batches.

        Args:
            batch_tokens: maximum tokens of a batch, including padding; a single longer row is a batch of its own.
            packing: whether sequences share rows, which is only right for a student that ``separates`` them.
        """
        packs: list[Pack] = []
        longest = 0
        for pack in self._packs(packing):
            longest = max(longest, pack.tokens)
            if packs and longest * (len(packs) + 1) > batch_tokens:
                yield self._collate(packs)
                packs, longest = [], pack.tokens
            packs.append(pack)
        yield self._collate(packs)

    def _packs(self, packing: bool) -> Iterator[Pack]:
        for where, _ in outlines(self.table, ["key"], "eval"):
            group = load(self.table, where, ["key", "tokens", *COLUMNS])
            group = group.filter(pc.invert(pc.is_in(group.column("key"), self._left_out_keys)))
            tokens, sequences = group.column("tokens").to_numpy(), Sequences([group])
            packs = best_fit(tokens, self._longest) if packing else np.arange(len(tokens))
            for pack in range(packs.max(initial=-1) + 1):
                yield Pack(sequences, np.flatnonzero(packs == pack))

    def _collate(self, packs: list[Pack]) -> Batch:
        positions = sum(int(pack.sequences.counts("entropies", pack.rows).sum()) for pack in packs)
        return collate(packs, None, self.table, positions)


def _nothing(table: AnyTable, found: str) -> TableError:
    return TableError(
        "the table has no sequences to evaluate students on",
        expected="sequences in the eval split that do not also occur in the train split",
        found=f"{found}, in version {table.version}",
        where=table.location,
        do="capture more documents, or capture into a new table with a larger shards.eval_fraction",
    )
