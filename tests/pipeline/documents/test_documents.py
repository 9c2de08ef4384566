"""Documents are read unchanged; a bad one is rejected alone, and a problem with all of them is an error at once."""

import datetime
import gzip
import hashlib
import json
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from softlabel.pipeline.config.capture import ColumnsConfig
from softlabel.pipeline.documents import json_records
from softlabel.pipeline.documents.documents import DOCUMENT, Documents, Reject
from softlabel.storage.errors import DocumentsError, UsageError

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def read(path: object, **columns: object) -> tuple[pa.Table, list[Reject]]:
    batches = list(Documents(str(path), ColumnsConfig(**columns)).batches())
    return pa.concat_tables([b.documents for b in batches]), [r for b in batches for r in b.rejects]


def lines(path: Path, records: list[object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


DEEP = json.loads('[{"a":' * 50 + "0" + "}]" * 50)
RECORDS = [{"id": f"d{i}", "text": f"text {i}", "lang": "en", "year": 2000 + i} for i in range(5)]


def test_every_format_gives_the_same_documents(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "a.parquet")
    plain = lines(tmp_path / "a.jsonl", RECORDS)
    (tmp_path / "b.ndjson.gz").write_bytes(gzip.compress(plain.read_bytes()))
    with pa.OSFile(str(tmp_path / "c.jsonl.zst"), "wb") as file, pa.CompressedOutputStream(file, "zstd") as stream:
        stream.write(plain.read_bytes())
    first, rejects = read(tmp_path / "a.parquet", carry=("lang", "year"))
    assert not rejects
    assert first.schema == pa.schema([*DOCUMENT, ("lang", pa.string()), ("year", pa.int64())])
    assert first["content"].to_pylist() == [record["text"] for record in RECORDS]
    for name in ("a.jsonl", "b.ndjson.gz", "c.jsonl.zst", "*.jsonl"):
        assert read(tmp_path / name, carry=("lang", "year"))[0].equals(first), name


def test_a_folder_is_read_file_by_file_in_order_of_name_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b/2.jsonl", "a/1.jsonl", "_hidden/x.jsonl", ".cache/x.jsonl"):
        (tmp_path / name).parent.mkdir()
        lines(tmp_path / name, [{"id": name, "text": "x"}])
    (tmp_path / "LICENSE").write_text("not a document")
    assert read(tmp_path)[0]["document_id"].to_pylist() == ["a/1.jsonl", "b/2.jsonl"]
    assert read(tmp_path / "*" / "*.jsonl")[0].num_rows == 4, "a glob also finds hidden files"


def test_a_second_document_with_the_same_id_is_rejected(tmp_path: Path) -> None:
    for name in ("1.jsonl", "2.jsonl"):
        lines(tmp_path / name, [{"id": "same", "text": name}, {"id": name, "text": "x"}])
    documents, rejects = read(tmp_path)
    assert documents["content"].to_pylist() == ["1.jsonl", "x", "x"]
    assert rejects == [Reject("same", "another document has this id")]


def test_a_text_file_is_one_document_whose_id_is_its_path(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "one.txt").write_text("One\nmore")
    (tmp_path / "two.md").write_text("Two")
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9")
    documents, rejects = read(tmp_path)
    rows = dict(zip(documents["document_id"].to_pylist(), documents["content"].to_pylist(), strict=True))
    assert rows == {"sub/one.txt": "One\nmore", "two.md": "Two"}
    assert rejects == [Reject("bad.txt", "the text is not valid UTF-8 at byte 3")]
    assert read(tmp_path / "two.md")[0]["document_id"].to_pylist() == ["two.md"]


def test_a_fingerprint_depends_only_on_content_and_label(tmp_path: Path) -> None:
    def fingerprints(records: list[dict[str, object]], **columns: object) -> list[bytes]:
        path = lines(tmp_path / "x.jsonl", records)
        return read(path, **columns)[0]["fingerprint"].to_pylist()

    first = fingerprints(RECORDS)
    assert len(set(first)) == 5
    assert {len(f) for f in first} == {16}
    assert fingerprints([r | {"lang": "de", "id": f"other {r['id']}"} for r in reversed(RECORDS)]) == first[::-1]
    assert not set(fingerprints([r | {"text": r["text"] + "."} for r in RECORDS])) & set(first)
    labelled = fingerprints(RECORDS, label="year")
    assert not set(labelled) & set(first)
    assert not set(fingerprints([r | {"year": 7} for r in RECORDS], label="year")) & set(labelled)


CALL = {"name": "f", "arguments": {"a": 1}}
CALLED = '"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]'
HEARD = '[{"role": "user", "content": "Grüße"}, {"role": "assistant", "content": "x", "weight": 1}]'
SAID = [{"from": "human", "value": "Grüße"}, {"weight": 1, "from": "chatgpt", "value": "x", "name": None}]
TOLD = [{"from": "human", "value": "x"}, {"from": "function_call", "value": json.dumps(CALL)}]
CONTENTS = {
    "text": ({"text": "Grüße\r\n\t"}, {}, "Grüße\r\n\t"),
    "chat": ({"messages": SAID}, {"messages": "messages"}, HEARD),
    "chat as JSON": ({"messages": json.dumps(SAID)}, {"messages": "messages"}, HEARD),
    "calls": (
        {"messages": TOLD},
        {"messages": "messages"},
        '[{"role": "user", "content": "x"}, {"role": "assistant", ' + CALLED + "}]",
    ),
    "tools": (
        {"messages": SAID, "tools": [json.dumps(CALL)]},
        {"messages": "messages", "tools": "tools"},
        f'{{"messages": {HEARD}, "tools": [{json.dumps(CALL)}]}}',
    ),
    "other names": (
        {"messages": [{"from": "observation", "value": "x"}, {"from": "critic", "value": "y"}]},
        {"messages": "messages"},
        '[{"role": "tool", "content": "x"}, {"role": "critic", "content": "y"}]',
    ),
    "completion": (
        {"p": "Grüße", "c": "x"},
        {"prompt": "p", "completion": "c"},
        '{"prompt": "Grüße", "completion": "x"}',
    ),
}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("label", [None, "ö"])
def test_a_fingerprint_can_be_computed_as_the_format_says(tmp_path: Path, content: str, label: str | None) -> None:
    """FORMAT.md, Fingerprints."""
    record, columns, text = CONTENTS[content]
    path = lines(tmp_path / "x.jsonl", [{"id": "a", **record, "label": label}])
    written = len(text.encode()).to_bytes(8, "little") + text.encode() + (b"\1" + label.encode() if label else b"")
    for name in ("x.jsonl", "x.parquet"):
        if name == "x.parquet":
            pq.write_table(pa.Table.from_pylist([json.loads(path.read_text())]), tmp_path / name)
        found, rejects = read(tmp_path / name, label="label", **columns)
        assert not rejects
        assert found["content"].to_pylist() == [text]
        assert found["fingerprint"].to_pylist() == [hashlib.blake2b(written, digest_size=16).digest()]


def test_a_document_that_can_not_be_used_is_rejected_and_the_others_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    good = [{"id": "good", "text": "fine", "year": 1}, {"id": 7, "text": "an integer as id", "year": 2}]
    bad = [
        {"id": "null", "text": None},
        {"id": "absent"},
        {"id": "empty", "text": ""},
        {"id": "blank", "text": " \n"},
        {"id": "number", "text": 3},
        {"id": "good", "text": "twice"},
        {"text": "no id"},
        {"id": "carried", "text": "x", "year": "the year 3"},
        {"id": "half a pair", "text": "\ud83d"},
        {"id": "\ud83d\uff01", "text": "half a pair and another character", "\ud83d": 1},
        ["no", "object"],
    ]
    broken = [b"{\n", b'{"id": "latin", "text": "caf\xe9"}\n', b"\n"]
    path.write_bytes(b"".join([json.dumps(r).encode() + b"\n" for r in good + bad] + broken))
    documents, rejects = read(path, carry=("year",))
    assert documents["document_id"].to_pylist() == ["good", "7"]
    assert documents["year"].to_pylist() == [1, 2]
    reasons = {name: reason.partition(" Expecting")[0] for name, reason in rejects}
    assert reasons == {
        "null": "the text is null",
        "absent": "the text is null",
        "empty": "the text is empty",
        "blank": "the text is empty",
        "number": "the text must be a string, but is int",
        "good": "another document has this id",
        "carried": "the value of column 'year' can't be stored as int64",
        "x.jsonl:9": "the id is null",
        "half a pair": "the text is not valid UTF-8",
        "x.jsonl:12": "the id is not valid UTF-8",
        "x.jsonl:13": "the line must be a JSON object, but is list",
        "x.jsonl:14": "the line is not valid JSON:",
        "x.jsonl:15": "the line is not valid UTF-8 at byte 28",
    }


def test_an_invalid_string_in_parquet_rejects_only_its_own_document(tmp_path: Path) -> None:
    text = pa.array([b"fine", b"caf\xe9", None, b"too"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"id": [1, 2, 3, 4], "text": text}), tmp_path / "x.parquet")
    documents, rejects = read(tmp_path / "x.parquet")
    assert documents["document_id"].to_pylist() == ["1", "4"]
    assert rejects == [Reject("2", "the text is not valid UTF-8 at byte 3"), Reject("3", "the text is null")]


def test_chats_from_parquet_and_json_are_the_same(tmp_path: Path) -> None:
    records = [{"id": "a", "chat": CHAT}, {"id": "b", "chat": [CHAT[0], CHAT[1] | {"name": "bot"}]}]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "x.parquet")
    pq.write_table(
        pa.table({"id": ["a", "b"], "chat": [json.dumps(r["chat"]) for r in records]}), tmp_path / "y.parquet"
    )
    first, rejects = read(lines(tmp_path / "x.jsonl", records), messages="chat")
    assert not rejects
    assert [json.loads(content) for content in first["content"].to_pylist()] == [r["chat"] for r in records]
    assert read(tmp_path / "x.parquet", messages="chat")[0].equals(first)
    assert read(tmp_path / "y.parquet", messages="chat")[0].equals(first)


@pytest.mark.parametrize(
    ("chat", "reason"),
    [
        (None, "the chat must be a list of messages, but is null"),
        ("Hi", "the chat is neither a list of messages in valid UTF-8 nor a string of valid JSON"),
        ([], "the chat has no messages"),
        ("[" * 100_000, "the chat nests lists and objects more than 100 levels deep"),
        ([CHAT[1] | {"more": DEEP}], "the chat nests lists and objects more than 100 levels deep"),
        (["Hi"], "message 0 (counting from 0) is not an object"),
        ([{"content": "Hi"}], "message 0 (counting from 0) has no role"),
        (
            [CHAT[0], {"role": "assistant", "content": None}],
            "message 1 (counting from 0) has neither text content nor tool calls",
        ),
    ],
)
def test_an_invalid_chat_is_rejected(chat: object, reason: str, tmp_path: Path) -> None:
    path = lines(tmp_path / "x.jsonl", [{"id": "good", "messages": CHAT}, {"id": "bad", "messages": chat}])
    documents, rejects = read(path, messages="messages")
    assert documents["document_id"].to_pylist() == ["good"]
    assert rejects == [Reject("bad", reason)]


def test_a_message_with_a_date_is_rejected(tmp_path: Path) -> None:
    dated = [message | {"at": datetime.datetime(2026, 1, 1)} for message in CHAT]
    pq.write_table(pa.table({"id": ["good", "bad"], "messages": [CHAT, dated]}), tmp_path / "x.parquet")
    documents, [reject] = read(tmp_path / "x.parquet", messages="messages")
    assert documents["document_id"].to_pylist() == ["good"]
    assert reject == Reject(
        "bad", "a message can't be written as JSON: Object of type datetime is not JSON serializable"
    )


def test_an_invalid_label_is_named_in_the_reason(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "x.jsonl", [{"id": "good", "text": "x", "y": "a"}, {"id": "bad", "text": "x", "y": "\ud83d"}]
    )
    assert read(path, label="y")[1] == [Reject("bad", "the label is not valid UTF-8")]


def test_lines_in_another_encoding_than_utf_8_are_refused(tmp_path: Path) -> None:
    records = "".join(json.dumps(record) + "\n" for record in RECORDS)
    for encoding in ("utf-16", "utf-16-le", "utf-32"):
        (tmp_path / "x.jsonl").write_bytes(records.encode(encoding))
        with pytest.raises(
            DocumentsError, match=r"x\.jsonl:1: the line is not UTF-8: it contains zero bytes"
        ) as caught:
            read(tmp_path / "x.jsonl")
        one_screen(caught.value, "in UTF-8")
    (tmp_path / "x.jsonl").write_bytes(records.encode("utf-8-sig"))
    assert read(tmp_path / "x.jsonl")[0].num_rows == len(RECORDS)


def test_rejects_can_be_put_in_the_order_of_their_records(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(
        '{"id": "a", "text": "x"}\n{"id": "late", "text": "refused later"}\n{"id": "b"}\n'
        'no json\n{"id": "a", "text": "y"}\n{"id": "c"}\n'
    )
    [batch] = Documents(str(tmp_path / "x.jsonl"), ColumnsConfig()).batches()
    ordered = batch.in_order([*batch.rejects, Reject("late", "")])
    assert [name for name, _ in ordered] == ["late", "b", "x.jsonl:4", "a", "c"]


def test_finding_the_columns_does_not_read_all_large_lines_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_records, "SAMPLE_BYTES", 1 << 20)
    path = lines(tmp_path / "x.jsonl", [{"id": i, "text": "some words " * 10_000} for i in range(100)])
    tracemalloc.start()
    Documents(str(path), ColumnsConfig())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 2 * peak < path.stat().st_size


def one_screen(error: Exception, *parts: str) -> None:
    message = str(error)
    assert len(message.splitlines()) < 10
    for part in ("expected:", "found:", "where:", *parts):
        assert part in message


def test_a_missing_path_is_an_error(tmp_path: Path) -> None:
    for name in ("nowhere.parquet", "no*where"):
        with pytest.raises(UsageError) as caught:
            Documents(str(tmp_path / name), ColumnsConfig())
        one_screen(caught.value, str(tmp_path / name))


def test_the_error_for_a_missing_column_names_the_existing_ones(tmp_path: Path) -> None:
    path = lines(tmp_path / "x.jsonl", [{"id": 1, "texts": "x", "lang": "en"}])
    with pytest.raises(UsageError, match="did you mean 'texts'") as caught:
        Documents(str(path), ColumnsConfig())
    one_screen(caught.value, "id, texts, lang", "columns.text")
    with pytest.raises(UsageError, match=r"columns\.carry"):
        Documents(str(path), ColumnsConfig(text="texts", carry=("language",)))


def test_a_duplicate_column_or_a_file_without_the_column_is_an_error(tmp_path: Path) -> None:
    text = pa.array(["x"])
    pq.write_table(pa.table([text, text, text], ["id", "text", "text"]), tmp_path / "1.parquet")
    with pytest.raises(DocumentsError, match="a file has 2 columns named 'text'") as caught:
        read(tmp_path, carry=("text",))
    one_screen(caught.value, "1.parquet", "rename")
    pq.write_table(pa.table([text, text, text, text], ["id", "text", "other", "other"]), tmp_path / "1.parquet")
    assert read(tmp_path)[0].num_rows == 1
    pq.write_table(pa.table([text, text], ["id", "body"]), tmp_path / "2.parquet")
    with pytest.raises(DocumentsError, match="a file has no column named 'text'") as caught:
        read(tmp_path)
    one_screen(caught.value, "2.parquet", "id, body", "columns.*")
    assert "copy the file again" not in str(caught.value)


def test_files_without_documents_are_an_error(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"id": pa.array([], pa.string()), "text": pa.array([], pa.string())}), tmp_path / "x.parquet"
    )
    (tmp_path / "x.jsonl").write_text("\n")
    (tmp_path / "folder").mkdir()
    for name in ("x.parquet", "x.jsonl", "folder"):
        with pytest.raises(DocumentsError) as caught:
            read(tmp_path / name)
        one_screen(caught.value, str(tmp_path / name))


@pytest.mark.parametrize("name", ["x.parquet", "x.jsonl.gz", "x.arrow", "x.pdf", "mixed"])
def test_files_that_can_not_be_read_are_an_error(name: str, tmp_path: Path) -> None:
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "a.txt").write_text("x")
    lines(tmp_path / "mixed" / "b.jsonl", RECORDS)
    for damaged in ("x.parquet", "x.jsonl.gz", "x.arrow", "x.pdf"):
        (tmp_path / damaged).write_bytes(b"garbage" * 50)
    with pytest.raises(DocumentsError) as caught:
        read(tmp_path / name)
    one_screen(caught.value, str(tmp_path / name))


def test_a_truncated_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.gz"
    whole = gzip.compress("".join(json.dumps({"id": i, "text": str(i) * 50}) + "\n" for i in range(20000)).encode())
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DocumentsError, match="can't be read"):
        read(path)
