"""The row: one sequence of one document, and what the teacher said at its captured positions.

Types are the ones that Delta maps exactly, so that any Delta reader sees the same values. The soft labels are flat
lists, position after position, with a count a position; FORMAT.md says what each value means.
"""

from collections.abc import Iterable

import pyarrow as pa

from softlabel.storage.errors import UsageError

FORMAT = 1
"""Version of the layout that FORMAT.md specifies."""

PARTITION = "split"
"""The table's partition: its value is in the path of a shard, not in the shard."""

SEQUENCE = pa.schema(
    [
        pa.field("key", pa.binary(), nullable=False),
        pa.field("document_id", pa.string(), nullable=False),
        pa.field("chunk", pa.int32(), nullable=False),
        pa.field("chunks", pa.int32(), nullable=False),
        pa.field("fingerprint", pa.binary(), nullable=False),
        pa.field("label", pa.string()),
        pa.field("split", pa.string(), nullable=False),
        pa.field("token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("loss_mask", pa.list_(pa.bool_()), nullable=False),
        pa.field("tokens", pa.int32(), nullable=False),
        pa.field("positions", pa.int32(), nullable=False),
    ]
)
"""What is known of a sequence before the teacher has seen it."""

SOFT_LABELS = pa.schema(
    [
        pa.field("head_counts", pa.list_(pa.int16()), nullable=False),
        pa.field("head_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("head_codes", pa.list_(pa.int16()), nullable=False),
        pa.field("tail_counts", pa.list_(pa.int16()), nullable=False),
        pa.field("tail_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("tail_draws", pa.list_(pa.int16()), nullable=False),
        pa.field("tail_codes", pa.list_(pa.int16()), nullable=False),
        pa.field("tail_log_masses", pa.list_(pa.float32()), nullable=False),
        pa.field("entropies", pa.list_(pa.int16()), nullable=False),
        pa.field("next_logprobs", pa.list_(pa.float32()), nullable=False),
    ]
)
"""What the teacher said, encoded (see ``storage.codec``)."""

ROW_KEY = ("document_id", "chunk", "key")
"""A table holds each combination of these at most once."""

_CARRIED_TYPES = (pa.string(), pa.int64(), pa.float64(), pa.bool_(), pa.date32())


def row_schema(carried: pa.Schema) -> pa.Schema:
    """Schema of a table whose documents carry the given columns.

    Args:
        carried: names and types of the carried columns: string, int64, float64, bool or date32.

    Raises:
        UsageError: if a carried column has the name of a row's own, or another type.
    """
    own = {*SEQUENCE.names, *SOFT_LABELS.names}
    for field in carried:
        if field.name in own:
            raise UsageError(
                f"column {field.name!r} can't be carried: the table has a column of its own with that name",
                expected=f"a name other than {', '.join(sorted(own))}",
                found=f"columns.carry: {field.name}",
                do="rename the column in the documents",
            )
        if field.type not in _CARRIED_TYPES:
            raise UsageError(
                f"column {field.name!r} can't be carried: its type is not supported",
                expected=f"one of the types {', '.join(map(str, _CARRIED_TYPES))}",
                found=str(field.type),
                do="cast it in the documents, or leave it out of columns.carry",
            )
    return pa.schema([*SEQUENCE, *SOFT_LABELS, *carried])


def carried_schema(row: pa.Schema) -> pa.Schema:
    """The carried columns of a row's schema: those that are not the row's own."""
    own = {*SEQUENCE.names, *SOFT_LABELS.names}
    return pa.schema([field for field in row if field.name not in own])


def without(schema: pa.Schema, names: Iterable[str]) -> pa.Schema:
    """The schema less the named fields."""
    dropped = set(names)
    return pa.schema([field for field in schema if field.name not in dropped])


def row_keys(rows: pa.Table) -> list[tuple[object, ...]]:
    """What a table holds at most once, row by row."""
    return list(zip(*(rows.column(name).to_pylist() for name in ROW_KEY), strict=True))
