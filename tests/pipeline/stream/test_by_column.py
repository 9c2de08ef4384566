"""Groups by a carried column: every row counts in the group of its own value."""

from datetime import UTC, datetime
from decimal import Decimal

import polars as pl
import pyarrow as pa
import pytest

from softlabel.pipeline.stream.by_column import NO_VALUE, OTHERS, largest_values, numbers

COLUMNS = {
    "doubles": (pa.array([1.5, -0.0, None, 0.0, float("nan")]), ["1.5", "0.0", NO_VALUE, "0.0", "nan"]),
    "floats": (pa.array([0.1, -0.0, 0.1, 0.0, 1e30], pa.float32()), ["0.1", "0.0", "0.1", "0.0", "1e+30"]),
    "truths": (pa.array([True, None, False, True, None]), ["True", NO_VALUE, "False", "True", NO_VALUE]),
    "times": (
        pa.array([datetime(2020, 1, 1, tzinfo=UTC), None] * 2, pa.timestamp("us", "UTC")),
        ["2020-01-01 00:00:00+00:00", NO_VALUE] * 2,
    ),
    "amounts": (pa.array([Decimal("1.50"), Decimal("-1.00"), None]), ["1.50", "-1.00", NO_VALUE]),
    "lists": (pa.array([["a"], [], None, ["a", None]]), ["['a']", "[]", NO_VALUE, "['a', None]"]),
    "structs": (pa.array([{"a": 1}, {"a": None}, None]), ["{'a': 1}", "{'a': None}", NO_VALUE]),
}


@pytest.mark.parametrize(("column", "texts"), COLUMNS.values(), ids=COLUMNS)
def test_a_row_counts_in_the_group_of_its_value(column, texts):
    rows = pa.table({"value": column, "positions": pa.array(range(len(column), 0, -1), pa.int64())})
    groups = largest_values(pl.DataFrame(rows), "value")
    assert sorted(groups) == sorted(set(texts))
    assert [groups[number] for number in numbers(rows, "value", groups)] == texts


def test_of_thousands_of_values_the_rare_ones_count_together():
    rows = pa.table({"value": [f"{i}" for i in range(5000)] * 2, "positions": pa.array(range(10_000), pa.int64())})
    groups = largest_values(pl.DataFrame(rows), "value")
    assert (groups[0], groups[-1], len(groups)) == ("4999", OTHERS, 20)
    found = [groups[number] for number in numbers(rows, "value", groups)]
    assert found.count(OTHERS) == 2 * (5000 - 19)
    assert found[4999] == found[9999] == "4999"
