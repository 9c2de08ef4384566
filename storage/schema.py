"""The schema of a row: one sequence of one document, with the teacher's soft labels at its captured positions.

All types have an exact equivalent in Delta, so that every Delta reader sees the same values. Soft labels are flat
lists, position after position, with a count for each position; FORMAT.md describes each value.
"""

from collections.abc import Iterable

import pyarrow as pa

from softlabel.storage.errors import UsageError

FORMAT = 2
"""Version of the layout that FORMAT.md specifies, and that tables are written in."""

PARTITION = "split"
"""The table's partition column: its value is in the path of a shard, not in the file."""

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
"""The columns that do not depend on the teacher's output."""

SOFT_LABELS = pa.schema(
    [
        pa.field("head_counts", pa.list_(pa.int16()), nullable=False),
        pa.field("head_clusters", pa.list_(pa.int16()), nullable=False),
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
"""The encoded soft labels (see ``storage.codec``)."""

ROW_KEY = ("document_id", "chunk", "key")
"""Columns whose values together are unique in a table."""
RowKey = tuple[str, int, bytes]
"""Their values in one row."""

_CARRIED_TYPES = (
    pa.string(),
    pa.binary(),
    pa.int64(),
    pa.float64(),
    pa.bool_(),
    pa.date32(),
    pa.timestamp("us"),
    pa.timestamp("us", "UTC"),
)


def _can_be_carried(kind: pa.DataType) -> bool:
    if pa.types.is_decimal128(kind):
        return bool(0 <= kind.scale <= kind.precision)
    if pa.types.is_list(kind):
        return _can_be_carried(kind.value_type)
    if pa.types.is_struct(kind):
        return kind.num_fields > 0 and all(_can_be_carried(field.type) for field in kind)
    return bool(kind in _CARRIED_TYPES)


def row_schema(carried: pa.Schema) -> pa.Schema:
    """Schema of a table whose documents carry the given columns.

    Args:
        carried: names and types of the carried columns: ``_CARRIED_TYPES``, decimals of up to 38 digits, and lists and
            structs of these.

    Raises:
        UsageError: if a carried column has the name of another column, or an unsupported type.
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
        if not _can_be_carried(field.type):
            raise UsageError(
                f"column {field.name!r} can't be carried: its type is not supported",
                expected=f"{', '.join(map(str, _CARRIED_TYPES))},\n"
                "               decimal of at most 38 digits, or a list or struct of these",
                found=str(field.type),
                do="cast it in the documents, or leave it out of columns.carry",
            )
    return pa.schema([*SEQUENCE, *SOFT_LABELS, *carried])


def carried_schema(row: pa.Schema) -> pa.Schema:
    """The carried columns in the schema of a row."""
    own = {*SEQUENCE.names, *SOFT_LABELS.names}
    return pa.schema([field for field in row if field.name not in own])


def without(schema: pa.Schema, names: Iterable[str]) -> pa.Schema:
    """The schema without the named fields."""
    dropped = set(names)
    return pa.schema([field for field in schema if field.name not in dropped])


def stored_as(kind: pa.DataType) -> pa.DataType:
    """The type of a table that Parquet stores like this one: a program may note in its files which of them it used."""
    if pa.types.is_dictionary(kind):
        return stored_as(kind.value_type)
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return pa.binary()
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.list_(stored_as(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(stored_as(field.type)) for field in kind])
    return kind


def conforming(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    """Rows with the types of a schema, and its columns in their order, whatever program wrote them.

    Raises:
        ValueError: if they have other columns, or values that do not fit; or an ArrowException.
    """
    if rows.schema.equals(schema):
        return rows
    if sorted(rows.column_names) != sorted(schema.names):
        raise ValueError(f"columns {', '.join(sorted(rows.column_names))}, not {', '.join(sorted(schema.names))}")
    return rows.select(schema.names).cast(schema)


def row_keys(rows: pa.Table) -> list[RowKey]:
    """The unique key of each row (see ``ROW_KEY``)."""
    return list(zip(*(rows.column(name).to_pylist() for name in ROW_KEY), strict=True))
