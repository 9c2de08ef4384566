"""Documents are read as they are found: JSON as lines or one array, Arrow, CSV, several paths, and without ids."""

import csv
import gzip
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from softlabel.pipeline.config.capture import ColumnsConfig
from softlabel.pipeline.documents import json_records
from softlabel.pipeline.documents.documents import Documents, Reject
from softlabel.storage.errors import DocumentsError, SoftlabelError, UsageError

RECORDS = [{"id": f"d{i}", "text": f'text "{i}", [x] {{y}} \\ é\n' * 3, "n": [i, {"a": None}]} for i in range(300)]


def read(*paths: object, **columns: Any) -> tuple[pa.Table, list[Reject]]:
    batches = list(Documents([str(path) for path in paths], ColumnsConfig(**columns)).batches())
    return pa.concat_tables([b.documents for b in batches]), [r for b in batches for r in b.rejects]


def lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def arrow(path: Path, table: pa.Table, make: Callable[..., Any] = pa.ipc.new_stream) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with make(path, table.schema) as file:
        file.write_table(table, max_chunksize=7)
    return path


@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.ndjson", "x", "part-00000", "x.json.gz", "x.gz"])
@pytest.mark.parametrize("how", ["lines", "array", "indented", "indented with a mark", "after blank lines"])
def test_json_is_read_as_lines_or_as_one_array_by_its_first_bytes(
    name: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_records, "READ_AHEAD", 1000)  # so that records reach over many reads
    content = {
        "lines": "".join(json.dumps(record) + "\n" for record in RECORDS),
        "array": json.dumps(RECORDS),
        "indented": json.dumps(RECORDS, indent=2, ensure_ascii=False) + "\n\n",
        "indented with a mark": "\ufeff" + json.dumps(RECORDS, indent="\t"),
        "after blank lines": "\n\n " + json.dumps(RECORDS, separators=(",", ":")),
    }[how].encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    documents, rejects = read(tmp_path / name)
    assert not rejects
    assert documents["document_id"].to_pylist() == [record["id"] for record in RECORDS]
    assert documents["content"].to_pylist() == [record["text"] for record in RECORDS]


def test_a_bad_element_of_an_array_is_rejected_alone(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(
        b'[{"id": 1, "text": "a"}, 7, {"id": 2, "text": "caf\xe9"}, {"id": 3, "text": }, [{"id": 4}], '
        b'{"id": 5, "text": "b"}]'
    )
    documents, rejects = read(tmp_path / "x.json")
    assert documents["document_id"].to_pylist() == ["1", "5"]
    assert [(name, reason.partition(":")[0]) for name, reason in rejects] == [
        ("x.json:2", "the element must be a JSON object, but is int"),
        ("x.json:3", "the element is not valid UTF-8 at byte 23"),
        ("x.json:4", "the element is not valid JSON"),
        ("x.json:5", "the element must be a JSON object, but is list"),
    ]


def test_lines_that_are_arrays_are_rejected_line_by_line(tmp_path: Path) -> None:
    documents, rejects = read(lines(tmp_path / "x.jsonl", [["no"], {"id": 1, "text": "a"}, []]))
    assert documents["document_id"].to_pylist() == ["1"]
    assert [reject.document_id for reject in rejects] == ["x.jsonl:1", "x.jsonl:3"]


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (lambda text: text[:-1], "in the middle of element 300"),
        (lambda text: text[: len(text) // 2], "in the middle of element"),
        (lambda text: text.replace('"}', "}", 1), "in the middle of element"),
        (lambda text: text + "[]", "something follows the end of the array"),
    ],
)
def test_a_damaged_array_is_an_error(damage: Callable[[str], str], found: str, tmp_path: Path) -> None:
    records = [{"id": i, "text": "words"} for i in range(300)]
    (tmp_path / "x.json").write_text(damage(json.dumps(records)))
    with pytest.raises(DocumentsError, match=found):
        read(tmp_path / "x.json")


def test_a_large_array_is_not_read_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_records, "SAMPLE_BYTES", 1 << 20)
    path = tmp_path / "x.json"
    path.write_text(json.dumps([{"id": i, "text": "some words " * 10_000} for i in range(200)]))
    tracemalloc.start()
    documents = Documents(str(path), ColumnsConfig())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 2 * peak < path.stat().st_size
    assert sum(len(batch.documents) for batch in documents.batches()) == 200


@pytest.mark.parametrize("make", [pa.ipc.new_stream, pa.ipc.new_file])
def test_arrow_files_are_read_in_either_format(make: Callable[..., Any], tmp_path: Path) -> None:
    names = [f"d{i}" for i in range(20)]
    invalid = pa.array([b"caf\xe9", *[b"text"] * 19], pa.binary()).view(pa.string())
    kinds = pa.array(["a", "b"] * 10).dictionary_encode()
    chats = [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": n}] for n in names]
    path = arrow(tmp_path / "x.arrow", pa.table({"id": names, "text": invalid, "kind": kinds, "chat": chats}), make)
    documents, rejects = read(path, carry=("kind",))
    assert documents["document_id"].to_pylist() == names[1:]
    assert documents["kind"].to_pylist() == (["a", "b"] * 10)[1:]
    assert rejects == [Reject("d0", "the text is not valid UTF-8 at byte 3")]
    contents = read(path, messages="chat")[0]["content"].to_pylist()
    assert [json.loads(content)[1]["content"] for content in contents] == names


def test_a_saved_data_set_is_read_without_the_caches_beside_it(tmp_path: Path) -> None:
    for split in ("test", "train"):
        for part in ("data-0", "data-1", "cache-12ab"):
            arrow(tmp_path / split / f"{part}.arrow", pa.table({"id": [f"{split} {part}"], "text": ["x"]}))
        listed = [{"filename": "data-0.arrow"}, {"filename": "data-1.arrow"}]
        (tmp_path / split / "state.json").write_text(json.dumps({"_data_files": listed, "_split": split}))
        (tmp_path / split / "dataset_info.json").write_text("{}")
    assert read(tmp_path / "train")[0]["document_id"].to_pylist() == ["train data-0", "train data-1"]
    assert read(tmp_path)[0].num_rows == 4
    (tmp_path / "train" / "data-1.arrow").unlink()
    with pytest.raises(DocumentsError, match=r"no train/data-1\.arrow"):
        read(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "changed offsets"])
def test_a_damaged_arrow_file_is_an_error(damage: str, tmp_path: Path) -> None:
    path = arrow(tmp_path / "x.arrow", pa.table({"id": ["a", "b"], "text": ["x" * 40, "y" * 40]}))
    content = path.read_bytes()
    offsets = b"".join(n.to_bytes(4, "little") for n in (0, 40, 80))
    assert content.count(offsets) == 1
    far = b"".join(n.to_bytes(4, "little") for n in (0, 40, 1 << 30))
    path.write_bytes(content[:-200] if damage == "cut" else content.replace(offsets, far))
    with pytest.raises(DocumentsError, match=r"can't be read[\s\S]*x\.arrow"):
        read(path)


@pytest.mark.parametrize("name", ["x.csv", "x.csv.gz", "x.tsv"])
def test_csv_is_read_with_every_value_as_it_is_written(name: str, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    with plain.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file, delimiter="\t" if "tsv" in name else ",")
        writer.writerow(["id", "text", "n"])
        writer.writerows(
            [
                ["007", 'two\r\nlines, "quoted"', "1.50"],
                ["8", "a\ttab", ""],
                ["9", "", "1"],
                ["10", "caf\u00e9", "2", "3"],
            ]
        )
        file.write("11,caf\udce9,\n".replace(",", "\t" if "tsv" in name else ",").replace("\udce9", "\ufffd"))
    content = plain.read_bytes().replace("\ufffd".encode(), b"\xe9")
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    documents, rejects = read(tmp_path / name, carry=("n",))
    assert documents["document_id"].to_pylist() == ["007", "8"]
    assert documents["content"].to_pylist() == ['two\r\nlines, "quoted"', "a\ttab"]
    assert documents["n"].to_pylist() == ["1.50", None]
    assert rejects == [
        Reject("9", "the text is null"),
        Reject(f"{name}:4", "the row has 4 values for 3 columns"),
        Reject("11", "the text is not valid UTF-8"),
    ]


def test_damaged_csv_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text('id,text\n1,"an open quote\n2,b\n')
    with pytest.raises(DocumentsError, match="line 3: unexpected end of data"):
        read(tmp_path / "x.csv")
    (tmp_path / "x.csv").write_text("id;text\n1;a\n")
    with pytest.raises(UsageError, match=r"no column 'id'[\s\S]*id;text"):
        read(tmp_path / "x.csv")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le"])
@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.csv"])
def test_a_mark_of_utf_8_is_no_text_and_utf_16_is_an_error_that_names_it(
    name: str, encoding: str, tmp_path: Path
) -> None:
    content = {"x.txt": "Mars", "x.jsonl": '{"id": "x.txt", "text": "Mars"}\n', "x.csv": "id,text\nx.txt,Mars\n"}[name]
    (tmp_path / name).write_bytes(content.encode(encoding))
    if encoding == "utf-8-sig":
        assert read(tmp_path / name)[0].select(["document_id", "content"]).to_pylist() == [
            {"document_id": "x.txt", "content": "Mars"}
        ]
    elif name == "x.txt":
        assert read(tmp_path / name)[1] == [
            Reject(name, "the file is not UTF-8: it contains zero bytes, as UTF-16 and compressed files do")
        ]
    else:
        with pytest.raises(SoftlabelError, match=r"not UTF-8|no column 'id'"):
            read(tmp_path / name)


def test_files_that_describe_others_in_a_folder_are_not_documents(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["a"], "text": ["x"]}), tmp_path / "x.parquet")
    (tmp_path / "dataset_infos.json").write_text('{"default": {}}')
    (tmp_path / "LICENSE").write_text("[not JSON")
    assert read(tmp_path)[0].num_rows == 1
    (tmp_path / "x.parquet").unlink()
    (tmp_path / "dataset_infos.json").unlink()
    lines(tmp_path / "part-00000", [{"id": "b", "text": "x"}])
    (tmp_path / "LICENSE").write_text("not JSON")
    assert read(tmp_path)[0]["document_id"].to_pylist() == ["b"]


def test_several_paths_are_read_in_their_order_and_each_file_once(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        lines(tmp_path / name / f"{name}.jsonl", [{"id": name, "text": f"text {name}", "n": 1}])
    pq.write_table(pa.table({"id": ["p"], "text": ["x"], "n": ["one"]}), tmp_path / "p.parquet")
    documents, rejects = read(
        tmp_path / "c", tmp_path / "p.parquet", tmp_path / "*" / "*.jsonl", tmp_path / "c", carry=("n",)
    )
    assert documents["document_id"].to_pylist() == ["c", "a", "b"]
    assert rejects == [Reject("p", "the value of column 'n' can't be stored as int64")]
    for other in (tmp_path / "no*where", tmp_path / "none.jsonl"):
        with pytest.raises(UsageError, match="no documents at this path"):
            read(tmp_path / "a", other)
    lines(tmp_path / "d.jsonl", [{"id": 1, "body": "x"}])
    with pytest.raises(UsageError, match=r"no column 'text'[\s\S]*d\.jsonl"):
        read(tmp_path / "a", tmp_path / "d.jsonl")


def test_without_ids_equal_contents_are_one_document_whose_id_is_its_hash(tmp_path: Path) -> None:
    first = [{"text": "same", "id": 1}, {"text": "other"}, {"text": "same", "id": 2}, {"text": None}]
    paths = [
        lines(tmp_path / f"{i}.jsonl", records)
        for i, records in enumerate([first, [{"text": "same"}, {"text": "new"}]])
    ]
    batches = list(Documents([str(path) for path in paths], ColumnsConfig(id="none")).batches())
    documents = pa.concat_tables([batch.documents for batch in batches])
    assert documents["content"].to_pylist() == ["same", "other", "new"]
    assert sum(batch.repeated for batch in batches) == 2
    assert [reject for batch in batches for reject in batch.rejects] == [Reject("0.jsonl:4", "the text is null")]
    ids = documents["document_id"].to_pylist()
    assert len(set(ids)) == 3
    assert all(len(name) == 32 for name in ids)
    assert read(paths[1], id=None)[0]["document_id"].to_pylist() == [ids[0], ids[2]], (
        "the id depends only on the content"
    )


def test_without_ids_a_text_with_two_labels_is_not_decided_by_chance(tmp_path: Path) -> None:
    records = [{"text": text, "y": y} for text, y in [("a", "p"), ("b", "p"), ("a", "q"), ("a", "p"), ("b", "p")]]
    [batch] = Documents(str(lines(tmp_path / "x.jsonl", records)), ColumnsConfig(id="none", label="y")).batches()
    assert batch.documents["content"].to_pylist() == ["a", "b"]
    assert [reject.reason for reject in batch.rejects] == ["another document has the same content and another label"]
    assert batch.repeated == 2


def test_a_missing_id_column_is_explained_with_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="or to none, if the documents have no ids"):
        read(lines(tmp_path / "x.jsonl", [{"text": "a"}]))


def zstd_frame(window_log: int, content: bytes) -> bytes:
    """A frame that announces this window, with the content in one block as it is."""
    window, block = bytes([(window_log - 10) << 3]), (len(content) << 3 | 1).to_bytes(3, "little")
    return b"\x28\xb5\x2f\xfd" + b"\x00" + window + block + content


@pytest.mark.parametrize("place", ["first", "second"])
def test_a_zstd_window_that_is_too_long_is_explained_with_how_to_recompress(place: str, tmp_path: Path) -> None:
    content = b'{"id": 1, "text": "a"}\n'
    path = tmp_path / "x.jsonl.zst"
    path.write_bytes(zstd_frame(27, content))
    assert read(path)[0].num_rows == 1
    path.write_bytes((zstd_frame(20, content) if place == "second" else b"") + zstd_frame(31, content))
    with pytest.raises(DocumentsError, match=r"zstd -dc --long=31 FILE \| zstd -o NEW_FILE"):
        read(path)
    path.write_bytes(zstd_frame(20, content)[:-3])
    with pytest.raises(DocumentsError, match="complete, undamaged JSON file"):
        read(path)
