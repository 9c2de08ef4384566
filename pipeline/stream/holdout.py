"""Sequences to evaluate students on: a table's eval split, without what also occurs in its train split.

Left out are sequences that are also trained on, token for token, and sequences of documents that are: in a view, a
document that one table holds out may be in another's train split, cut or captured differently. The rest comes in the
table's order, so that every student is evaluated on the same sequences. Decodes no soft labels and knows no model.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from softlabel.pipeline.stream.batch import COLUMNS, Batch, Pack, Sequences, collate
from softlabel.pipeline.stream.epoch_plan import Ints, best_fit
from softlabel.storage.errors import TableError, UsageError
from softlabel.storage.reader import outline
from softlabel.storage.schema import SEQUENCE, SOFT_LABELS
from softlabel.storage.views.row_groups import load, outlines
from softlabel.storage.views.view import AnyTable

PART_TOKENS = 1 << 18
"""A batch ends with a row group at least once in about so many tokens: there, an evaluation can be continued."""
LARGEST_GROUPS = 20
"""Values of a column that are told apart, those with the most positions; all others count as one."""
OTHERS, NO_VALUE = "(others)", "(none)"


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
    _left_out_keys: pa.Array
    _left_out_ids: pa.Array

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
        _require_columns(table, by)
        columns = list(dict.fromkeys(["key", "document_id", "tokens", "positions", *by]))
        parts = [rows for _, rows in outlines(table, columns, "eval")]
        if not sum(map(len, parts)):
            raise _nothing(table, "no sequences in the eval split")
        held = pl.DataFrame(pa.concat_tables(parts)).with_columns(hash=_HASHED)
        trained = _trained(table)
        seen = held.join(trained, on="key", how="semi")
        rest = held.join(trained, on="key", how="anti")
        leaked = rest.join(trained, on="hash", how="semi")
        kept = rest.join(trained, on="hash", how="anti")
        if not kept.get_column("positions").sum():
            raise _nothing(table, f"{len(held)} sequences, all of which also occur in the train split")
        ids = kept.group_by("document_id").agg(pl.col("positions").sum()).get_column("positions")
        return cls(
            table=table,
            sequences=len(kept),
            positions=int(kept.get_column("positions").sum()),
            document_positions=ids.to_numpy().astype(np.int64),
            left_out=len(seen),
            left_out_documents=len(leaked),
            groups={name: _values(kept, name) for name in by},
            _longest=int(kept.get_column("tokens").max()),  # type: ignore[arg-type]
            _left_out_keys=seen.get_column("key").unique().to_arrow().cast(pa.binary()),
            _left_out_ids=leaked.get_column("document_id").unique().to_arrow().cast(pa.string()),
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
        return list(dict.fromkeys(["key", "document_id", "tokens", *COLUMNS, *self.groups]))

    def _rows(self, group: pa.Table, packing: bool) -> Iterator["_Row"]:
        left_out = pc.or_(
            pc.is_in(group.column("key"), self._left_out_keys),
            pc.is_in(group.column("document_id"), self._left_out_ids),
        )
        group = group.filter(pc.invert(left_out))
        tokens, sequences = group.column("tokens").to_numpy(), Sequences([group.drop_columns([*self.groups])])
        values = {name: _numbers(group, name, known) for name, known in self.groups.items()}
        packs = best_fit(tokens, self._longest) if packing else np.arange(len(tokens))
        documents = group.column("document_id").to_pylist()
        for pack in range(packs.max(initial=-1) + 1):
            members = np.flatnonzero(packs == pack)
            groups = {name: numbers[members] for name, numbers in values.items()}
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


_HASHED = pl.col("document_id").hash(seed=0)


def _trained(table: AnyTable) -> pl.DataFrame:
    """Key, and hash of the document's id, of every row that is trained on."""
    parts = [pl.DataFrame(schema={"key": pl.Binary, "hash": pl.UInt64})]
    for part in table.tables:
        for shard in part.shards():
            if shard.split != "eval":
                read = outline(part, shard, ["key", "document_id"])
                parts += [pl.DataFrame(rows).select("key", hash=_HASHED) for rows in read]
    return pl.concat(parts)


def _values(kept: pl.DataFrame, name: str) -> tuple[str, ...]:
    """The values of a column with the most positions, as text."""
    positions: dict[str, int] = {}
    for value, count in kept.group_by(name).agg(pl.col("positions").sum()).iter_rows():
        positions[_text(value)] = positions.get(_text(value), 0) + count
    ordered = sorted(positions, key=lambda text: (-positions[text], text))
    several = len(ordered) > LARGEST_GROUPS
    return (*ordered[: LARGEST_GROUPS - several], *([OTHERS] if several else []))


def _numbers(group: pa.Table, name: str, known: tuple[str, ...]) -> Ints:
    """(rows,) number of each row's value among the known ones."""
    numbers = {text: number for number, text in enumerate(known)}
    others = numbers.get(OTHERS, 0)
    texts = (_text(value) for value in group.column(name).to_pylist())
    return np.array([numbers.get(text, others) for text in texts], np.int64)


def _text(value: Any) -> str:
    return NO_VALUE if value is None else str(value)


def _require_columns(table: AnyTable, by: Sequence[str]) -> None:
    plain = {*SOFT_LABELS.names, "token_ids", "loss_mask", "key", "fingerprint", "split"}
    common = set.intersection(*(set(part.schema.names) for part in table.tables)) - plain
    missing = [name for name in by if name not in common]
    if missing:
        carried = sorted(common - set(SEQUENCE.names) | {"label"})
        raise UsageError(
            "the table has no such column to group the results by",
            expected=f"by: one of {', '.join(carried)}",
            found=f"by: {', '.join(missing)}",
            where=table.location,
            do="name a column that columns.carry stored, or leave it out",
        )


def _nothing(table: AnyTable, found: str) -> TableError:
    return TableError(
        "the table has no sequences to evaluate students on",
        expected="sequences in the eval split that do not also occur in the train split",
        found=f"{found}, in version {table.version}",
        where=table.location,
        do="capture more documents, or capture into a new table with a larger shards.eval_fraction",
    )
