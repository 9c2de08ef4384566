"""Small files that decode to much are read in bounded memory, and damaged ones are still found."""

from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from softlabel.pipeline.config.capture import ColumnsConfig
from softlabel.pipeline.documents.documents import Documents
from softlabel.storage.errors import DocumentsError

PROMPT = "a shared prompt " * 33_000  # 530 KB
DELTAS = {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}, "store_schema": False}


def shared(text: str, rows: int) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), [text])


def chats(rows: int) -> pa.Array:
    kind = pa.list_(pa.struct([("role", pa.string()), ("content", pa.dictionary(pa.int32(), pa.string()))]))
    texts = pa.DictionaryArray.from_arrays(pa.array([0, 1] * rows, pa.int32()), [PROMPT, "Yes."])
    messages = pa.StructArray.from_arrays([pa.array(["user", "assistant"] * rows), texts], fields=list(kind.value_type))
    return pa.ListArray.from_arrays(pa.array(range(0, 2 * rows + 1, 2), pa.int32()), messages)


def parquet(path: Path, column: pa.Array, **options: Any) -> Path:
    names = [f"d{i}" for i in range(len(column))]
    pq.write_table(pa.table({"id": names, "text": column, "answer": names}), path, compression="zstd", **options)
    assert path.stat().st_size < 1_000_000
    return path


@pytest.mark.parametrize(
    ("column", "options", "columns"),
    [
        (shared(PROMPT, 4096), {"store_schema": False}, {}),
        (shared(PROMPT, 4096), {}, {"prompt": "text", "completion": "answer"}),
        (shared(PROMPT, 200), DELTAS, {}),
        (shared(PROMPT, 4096), {"data_page_version": "2.0", "row_group_size": 1000}, {}),
        (chats(2000), {}, {"messages": "text"}),
        (chats(2000), {"store_schema": False}, {"messages": "text"}),
        (shared("x" * (20 << 20), 40), {"dictionary_pagesize_limit": 1 << 30}, {}),
    ],
    ids=[
        "text",
        "prompt of a dictionary",
        "deltas",
        "small row groups",
        "chats of dictionaries",
        "chats",
        "a value of 20 MB",
    ],
)
def test_a_small_file_that_decodes_to_much_is_read_in_bounded_memory(
    column: pa.Array, options: dict[str, Any], columns: dict[str, str], tmp_path: Path
) -> None:
    path = parquet(tmp_path / "x.parquet", column, **options)
    usual, pool = pa.default_memory_pool(), pa.system_memory_pool()  # its peak is of these tests alone
    pa.set_memory_pool(pool)
    try:
        for batch in islice(Documents(str(path), ColumnsConfig(**columns)).batches(), 3):
            assert batch.documents.nbytes < 64 << 20
    finally:
        pa.set_memory_pool(usual)
    assert pool.max_memory() < 384 << 20


def test_the_issues_file_of_4096_rows_with_one_prompt_is_read_right(tmp_path: Path) -> None:
    path = parquet(tmp_path / "x.parquet", shared(PROMPT, 4096))
    batches = Documents(str(path), ColumnsConfig()).batches()
    batch = next(batches)
    assert set(batch.documents["content"].to_pylist()) == {PROMPT}
    assert batch.names == [f"d{i}" for i in range(len(batch.names))]
    assert 1 < len(batch.names) < 100


def test_rows_keep_their_order_and_places_across_batches_and_row_groups(tmp_path: Path) -> None:
    texts = [None if i % 9 == 0 else PROMPT if i % 7 == 0 else f"text {i}" for i in range(2000)]
    pq.write_table(
        pa.table({"id": list(range(2000)), "text": pa.array(texts).dictionary_encode()}),
        tmp_path / "x.parquet",
        row_group_size=300,
    )
    found = dict[str, str]()
    rejected = []
    for batch in Documents(str(tmp_path / "x.parquet"), ColumnsConfig()).batches():
        assert batch.documents.nbytes < 40 << 20
        found |= zip(*(batch.documents[name].to_pylist() for name in ("document_id", "content")), strict=True)
        rejected += [reject.document_id for reject in batch.rejects]
    assert list(found) == [str(i) for i in range(2000) if texts[i]]
    assert list(found.values()) == [text for text in texts if text]
    assert rejected == [str(i) for i in range(0, 2000, 9)]


@pytest.mark.parametrize("damage", ["cut", "dictionary", "data"])
def test_real_damage_in_a_dictionary_encoded_file_is_still_an_error(damage: str, tmp_path: Path) -> None:
    path = parquet(tmp_path / "x.parquet", shared(PROMPT, 1000))
    chunk = pq.read_metadata(path).row_group(0).column(1)
    content = bytearray(path.read_bytes())
    start = {"dictionary": chunk.dictionary_page_offset, "data": chunk.data_page_offset, "cut": 0}[damage]
    if damage == "cut":
        del content[-20:]
    else:
        content[start : start + 40] = b"\xff" * 40
    path.write_bytes(content)
    with pytest.raises(DocumentsError, match=r"can't be read[\s\S]*complete, undamaged Parquet[\s\S]*x\.parquet"):
        list(Documents(str(path), ColumnsConfig()).batches())


def test_arrow_files_with_dictionaries_are_read_in_bounded_pieces(tmp_path: Path) -> None:
    table = pa.table({"id": list(range(300)), "text": shared(PROMPT, 300)})
    with pa.ipc.new_stream(tmp_path / "x.arrow", table.schema) as file:
        file.write_table(table)
    batches = Documents(str(tmp_path / "x.arrow"), ColumnsConfig()).batches()
    assert all(batch.documents.nbytes < 40 << 20 for batch in batches)
