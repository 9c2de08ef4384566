"""Copying sequences from the list columns that were read."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from softlabel.pipeline.stream import batch
from softlabel.pipeline.stream.batch import Sequences

COLUMNS = {"token_ids": pa.int32(), "counts": pa.int16(), "masses": pa.float32(), "mask": pa.bool_()}
VALUES = {"token_ids": st.integers(-(2**31), 2**31 - 1), "counts": st.integers(0, 9), "mask": st.booleans()}
VALUES["masses"] = st.floats(width=32, allow_nan=False)


@st.composite
def row_groups(draw: st.DrawFn) -> list[pa.Table]:
    """Row groups as read: filtered, or slices of a larger one, of several chunks, or empty."""
    groups = []
    for _ in range(draw(st.integers(1, 3))):
        size = draw(st.integers(0, 5))
        lists = {name: st.lists(st.lists(VALUES[name], max_size=4), min_size=size, max_size=size) for name in COLUMNS}
        columns = {name: pa.array(draw(lists[name]), pa.list_(kind)) for name, kind in COLUMNS.items()}
        rows = pa.table(columns | {"tokens": pa.array(range(size), pa.int32())})
        rows = pa.concat_tables([rows, rows.slice(size // 2)]) if draw(st.booleans()) else rows
        first = draw(st.integers(0, len(rows)))
        groups.append(rows.slice(first, draw(st.integers(0, len(rows)))))
    return groups


@pytest.mark.parametrize("long", [0, 10], ids=["long sequences", "short sequences"])
@given(groups=row_groups(), data=st.data())
def test_any_sequences_can_be_taken_in_any_order(long: int, groups: list[pa.Table], data: st.DataObject) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(batch, "_LONG_SEQUENCE", long)
        sequences, whole = Sequences(groups), pa.concat_tables(groups)
    number = st.integers(0, len(whole) - 1)
    rows = np.array(data.draw(st.lists(number, max_size=6)) if len(whole) else [], np.int64)
    for name, kind in COLUMNS.items():
        lists = [whole.column(name)[int(row)].as_py() for row in rows]
        found = sequences.values(name, rows)
        assert found.dtype == kind.to_pandas_dtype()
        assert found.tolist() == [value for values in lists for value in values]
        assert sequences.counts(name, rows).tolist() == [len(values) for values in lists]
