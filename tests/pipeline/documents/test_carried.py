"""A carried column keeps every value unchanged; a document whose value would change is rejected."""

import datetime
import json
import math
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import Schema as DeltaSchema
from pydantic import ValidationError

from softlabel.pipeline.config.capture import ColumnsConfig
from softlabel.pipeline.documents.documents import Documents, Reject
from softlabel.storage.errors import UsageError
from softlabel.storage.schema import row_schema

DAY = datetime.date(2024, 2, 29)


def read(path: Path, *carry: str) -> tuple[pa.Table, list[Reject]]:
    batches = list(Documents(str(path), ColumnsConfig(carry=carry)).batches())
    return pa.concat_tables([b.documents for b in batches]), [r for b in batches for r in b.rejects]


def lines(path: Path, values: list[object]) -> Path:
    records = [{"id": str(i), "text": "x", "value": value} for i, value in enumerate(values)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def parquet(path: Path, values: pa.Array) -> None:
    names = [f"{path.stem}-{i}" for i in range(len(values))]
    pq.write_table(pa.table({"id": names, "text": names, "value": values}), path)


def test_carried_columns_keep_their_types(tmp_path: Path) -> None:
    table = pa.table(
        {
            "id": ["a", "b"],
            "text": ["x", "y"],
            "kind": pa.array(["p", None]).dictionary_encode(),
            "small": pa.array([1, None], pa.int8()),
            "score": pa.array([0.5, 1.5], pa.float32()),
            "good": [True, False],
            "day": pa.array([DAY, None], pa.date32()),
        }
    )
    pq.write_table(table, tmp_path / "x.parquet")
    carry = ("kind", "small", "score", "good", "day")
    documents, _ = read(tmp_path / "x.parquet", *carry)
    types = [pa.string(), pa.int64(), pa.float64(), pa.bool_(), pa.date32()]
    assert Documents(str(tmp_path / "x.parquet"), ColumnsConfig(carry=carry)).carried.types == types
    assert documents.select(carry).to_pylist() == table.select(carry).to_pylist()


def test_values_of_later_lines_that_do_not_fit_the_type_are_rejected_and_never_rounded(tmp_path: Path) -> None:
    later = [2.5, 0.99, True, "MMXX", 7, 7.0, None, 2**63]
    documents, rejects = read(lines(tmp_path / "x.jsonl", [*range(1000), *later]), "value")
    assert documents["value"].to_pylist() == [*range(1000), 7, 7, None]
    assert {reject.reason for reject in rejects} == {"the value of column 'value' can't be stored as int64"}
    assert [reject.document_id for reject in rejects] == ["1000", "1001", "1002", "1003", "1007"]


def test_a_column_of_integers_and_fractions_is_stored_as_float64(tmp_path: Path) -> None:
    documents, rejects = read(lines(tmp_path / "x.jsonl", [1, 2, 2.5, math.nan, "x"]), "value")
    assert documents["value"].to_pylist()[:3] == [1.0, 2.0, 2.5]
    assert math.isnan(documents["value"][3].as_py())
    assert rejects == [Reject("4", "the value of column 'value' can't be stored as double")]


@pytest.mark.parametrize(
    ("first", "second", "kept"),
    [
        (pa.array([1]), pa.array([0.75, 3.0, None]), [3, None]),
        (pa.array([0.5]), pa.array([2**53 + 1, 3]), [3.0]),
        (pa.array([0.5]), pa.array([True]), []),
        (pa.array([DAY]), pa.array([datetime.datetime(2024, 2, 29, 5), datetime.datetime(2024, 2, 29), None]), [None]),
        (pa.array([DAY]), pa.array([5]), []),
        (pa.array(["q"]), pa.array([b"\xff", b"ok"], pa.binary()), ["ok"]),
        (pa.array(["q"]), pa.array([b"\xff", "é".encode()], pa.binary()).view(pa.string()), ["é"]),
    ],
)
def test_values_of_later_files_that_do_not_fit_the_type_are_rejected_and_never_rounded(
    first: pa.Array, second: pa.Array, kept: list[object], tmp_path: Path
) -> None:
    parquet(tmp_path / "1.parquet", first)
    parquet(tmp_path / "2.parquet", second)
    documents, rejects = read(tmp_path, "value")
    assert documents["value"].to_pylist() == [first[0].as_py(), *kept]
    assert len(rejects) == len(second) - len(kept)


@pytest.mark.parametrize(
    "values",
    [
        pa.array([2**64 - 1], pa.uint64()),
        pa.array([[2**64 - 1]], pa.list_(pa.uint64())),
        pa.array([datetime.time(1)], pa.time64("us")),
        pa.array([{"a": datetime.timedelta(1)}], pa.struct([("a", pa.duration("us"))])),
        pa.array([Decimal(10) ** 45], pa.decimal256(50, 2)),
        pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())),
    ],
)
def test_a_column_of_an_unsupported_type_is_refused(values: pa.Array, tmp_path: Path) -> None:
    parquet(tmp_path / "x.parquet", values)
    with pytest.raises(UsageError, match="'value' can't be carried"):
        read(tmp_path / "x.parquet", "value")


def test_a_column_named_twice_is_refused() -> None:
    with pytest.raises(ValidationError, match="carry lists a column more than once: text"):
        ColumnsConfig(carry=("text", "text"))


UTC = datetime.UTC
RICH = pa.table(
    {
        "id": ["a", "b"],
        "text": ["x", "y"],
        "at": pa.array([datetime.datetime(2024, 2, 29, 5, 6, 7, 8, UTC), None], pa.timestamp("us", "Europe/Berlin")),
        "local": pa.array([datetime.datetime(2024, 2, 29, 5), None], pa.timestamp("ns")),
        "second": pa.array([1, None], pa.timestamp("s", "UTC")),
        "price": pa.array([Decimal("1.50"), None], pa.decimal256(20, 2)),
        "tags": pa.array([["p", None], []], pa.large_list(pa.large_string())),
        "pair": pa.array([[1, 2], None], pa.list_(pa.int32(), 2)),
        "meta": pa.array([{"a": [{"at": None, "n": 1}]}, {"a": None}], None),
        "raw": pa.array([b"\xff\0", None], pa.large_binary()),
    }
)


def test_timestamps_decimals_lists_and_structs_are_carried_unchanged(tmp_path: Path) -> None:
    pq.write_table(RICH, tmp_path / "x.parquet")
    carry = RICH.column_names[2:]
    documents, rejects = read(tmp_path / "x.parquet", *carry)
    assert not rejects
    found, written = documents.select(carry).to_pylist(), RICH.select(carry).to_pylist()
    assert found == written
    kinds = {name: str(documents.schema.field(name).type) for name in carry}
    assert kinds["at"] == kinds["second"] == "timestamp[us, tz=UTC]"
    assert (kinds["local"], kinds["price"], kinds["raw"]) == ("timestamp[us]", "decimal128(20, 2)", "binary")


def test_a_table_stores_these_columns_and_filters_by_them(tmp_path: Path) -> None:
    pq.write_table(RICH, tmp_path / "x.parquet")
    carry = RICH.column_names[2:]
    carried = Documents(str(tmp_path / "x.parquet"), ColumnsConfig(carry=tuple(carry))).carried
    schema = pa.schema(DeltaSchema.from_arrow(row_schema(carried)))
    assert schema.equals(row_schema(carried)), "Delta has the same types"


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (pa.array([1], pa.timestamp("ns")), "timestamp[us]"),
        (pa.array([2**60], pa.timestamp("us")), "timestamp[us]"),
    ],
)
def test_a_timestamp_that_microseconds_can_not_hold_is_rejected(values: pa.Array, reason: str, tmp_path: Path) -> None:
    parquet(tmp_path / "x.parquet", values)
    documents, rejects = read(tmp_path / "x.parquet", "value")
    assert not len(documents)
    assert reason in rejects[0].reason


def test_objects_in_json_lines_keep_every_key_or_are_rejected(tmp_path: Path) -> None:
    values: list[object] = [{"a": 1}, {"b": ["x"]}, {}, None] * 250
    path = lines(tmp_path / "x.jsonl", [*values, {"a": 1, "new": 2}, {"b": [1]}, [], {"a": 2}])
    documents, rejects = read(path, "value")
    assert documents["value"].to_pylist()[:3] == [{"a": 1, "b": None}, {"a": None, "b": ["x"]}, {"a": None, "b": None}]
    assert documents["value"].to_pylist()[-1] == {"a": 2, "b": None}
    assert [reject.document_id for reject in rejects] == ["1000", "1001", "1002"]
