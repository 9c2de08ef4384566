"""Rows of format 1, as rows of the current format: everything but the reader of shards knows only these.

Numbers were ranks, and the ids of a tail in the order of their logits, with codes that continued those of the head.
FORMAT.md lists the differences.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from softlabel.storage.codec import ZERO_CODE, Flat, assemble, flatten, number
from softlabel.storage.numbering import Numbering, gaps_of, running_sums
from softlabel.storage.schema import SOFT_LABELS

_CHANGED = ("head_clusters", "head_codes", "tail_ids", "tail_draws", "tail_codes")


def columns_for(columns: Sequence[str]) -> list[str]:
    """The stored columns from which ``converted`` makes the given ones."""
    needed = ["positions", *SOFT_LABELS.names] if set(_CHANGED).intersection(columns) else []
    return [name for name in dict.fromkeys([*columns, *needed]) if name != "head_clusters"]


def converted(rows: pa.Table, columns: Sequence[str], numbering: Numbering) -> pa.Table:
    """The given columns of rows with the columns of ``columns_for``.

    Args:
        rows: as they are stored.
        columns: columns of the current format.
        numbering: of the table, by ranks.
    """
    if set(_CHANGED).isdisjoint(columns):
        return rows.select(columns)
    positions = rows.column("positions").to_numpy().astype(np.int64)
    labels = assemble(number(_with_token_ids(flatten(rows), numbering), positions, numbering), positions)
    changed = {name: labels.column(name) for name in SOFT_LABELS.names}
    return pa.table({name: changed[name] if name in changed else rows.column(name) for name in columns})


def _with_token_ids(flat: Flat, numbering: Numbering) -> Flat:
    heads, tails = flat["head_counts"].astype(np.int64), flat["tail_counts"].astype(np.int64)
    starts = (np.cumsum(heads) - heads)[heads > 0]
    codes = running_sums(flat["head_codes"], heads)
    last, relative = np.zeros(len(heads), np.int32), codes - np.repeat(codes[starts], heads[heads > 0])
    last[heads > 0] = codes[starts + heads[heads > 0] - 1]
    relative[codes >= ZERO_CODE] = ZERO_CODE
    return flat | {
        "head_ids": numbering.vocabulary[flat["head_ids"]],
        "head_codes": gaps_of(relative, heads),
        "tail_ids": numbering.vocabulary[flat["tail_ids"]],
        "tail_codes": running_sums(flat["tail_codes"], tails) + np.repeat(last, tails),
    }
