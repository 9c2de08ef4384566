"""The values of carried columns, by which the results of an evaluation are grouped."""

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import polars as pl
import pyarrow as pa

from softlabel.pipeline.stream.epoch_plan import Ints
from softlabel.storage.errors import UsageError
from softlabel.storage.schema import SEQUENCE, SOFT_LABELS
from softlabel.storage.views.view import AnyTable

LARGEST_GROUPS = 20
"""Values of a column that are told apart, those with the most positions; all others count as one."""
OTHERS, NO_VALUE = "(others)", "(none)"


def require_columns(table: AnyTable, by: Sequence[str]) -> None:
    """Refuse names of columns that a table does not have, or that nothing can be grouped by.

    Raises:
        UsageError: if there is one.
    """
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


def largest_values(rows: pl.DataFrame, name: str) -> tuple[str, ...]:
    """The values of a column as text, those with the most positions first.

    Args:
        rows: with the column, and the ``positions`` of each row.
        name: the column.
    """
    positions: Counter[str] = Counter()
    for text, count in zip(_texts(rows.get_column(name).to_arrow()), rows.get_column("positions"), strict=True):
        positions[text] += count
    ordered = sorted(positions, key=lambda text: (-positions[text], text))
    several = len(ordered) > LARGEST_GROUPS
    return (*ordered[: LARGEST_GROUPS - several], *([OTHERS] if several else []))


def numbers(rows: pa.Table, name: str, known: tuple[str, ...]) -> Ints:
    """(rows,) number of each row's value among those of ``largest_values``."""
    number_of = {text: number for number, text in enumerate(known)}
    texts = _texts(rows.column(name))
    return np.array([number_of[text] if text in number_of else number_of[OTHERS] for text in texts], np.int64)


def _texts(column: pa.Array | pa.ChunkedArray) -> Iterator[str]:
    """Each value as text; equal values have equal texts."""
    single = pa.types.is_float32(column.type)
    for value in column.to_pylist():
        if isinstance(value, float):
            value += 0.0  # -0.0 becomes 0.0
        yield NO_VALUE if value is None else str(np.float32(value) if single else value)
