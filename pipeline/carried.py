"""Columns of documents that the table keeps beside the soft labels, each value as it was or not at all."""

import datetime
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

_MISFIT = (pa.ArrowException, OverflowError, UnicodeError)


def carried_field(field: pa.Field) -> pa.Field:
    """The column as a table keeps it: as one of the few types of ``storage.schema.row_schema``, if that loses nothing.

    uint64 stays what it is, and so is refused there: its upper half is no int64.
    """
    kind = field.type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind) or pa.types.is_null(kind):
        kind = pa.string()
    elif pa.types.is_integer(kind) and not pa.types.is_uint64(kind):
        kind = pa.int64()
    elif pa.types.is_floating(kind):
        kind = pa.float64()
    return pa.field(field.name, kind)


def carried(values: Sequence[Any], kind: pa.DataType) -> tuple[pa.Array, set[int]]:
    """Values as a column of this type, and the numbers of those that it can't hold as they are, which are null there.

    The type is that of the column's first values or first file; later ones may be of another, and Arrow cuts a
    fraction or the time of a day off without a word.
    """
    try:
        kept = pa.array(values, kind).to_pylist()
    except _MISFIT:
        kept = [_kept(value, kind) for value in values]
    misfits = {i for i, pair in enumerate(zip(values, kept, strict=True)) if not _are_same(*pair)}
    return pa.array([None if i in misfits else value for i, value in enumerate(kept)], kind), misfits


def _kept(value: Any, kind: pa.DataType) -> Any:
    try:
        return pa.scalar(value, kind).as_py()
    except _MISFIT:
        return None


def _are_same(value: Any, kept: Any) -> bool:
    if isinstance(value, bytes):  # a string of Parquet; one that is broken was not kept
        return kept is not None and value == kept.encode()
    if isinstance(value, bool | datetime.date) and type(value) is not type(kept):
        return False  # True equals 1
    return bool(value == kept) or (value != value and kept != kept)  # NaN equals nothing
