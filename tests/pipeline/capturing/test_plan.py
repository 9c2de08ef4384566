"""A nightly run over many documents reads only the new ones, in little memory, and lists those it can't use."""

import json
import os
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import pytest

from softlabel.pipeline.capturing import shard
from softlabel.pipeline.capturing.capture import capture
from softlabel.pipeline.capturing.job import resolve
from softlabel.pipeline.capturing.plan import Known, plan
from softlabel.pipeline.config.capture import CaptureConfig, ColumnsConfig, SelectionConfig, TeacherConfig
from softlabel.pipeline.documents.documents import Documents
from softlabel.pipeline.sequences.tokenizer import DocumentTokenizer
from softlabel.storage.errors import DocumentsError, UsageError
from tests.benchmarks.planning import stub_of, write_documents

MANY = 20_000
BYTES_A_DOCUMENT = 150
"""Memory per document of the table; a Python set takes five times as much."""


def test_only_new_documents_are_tokenized_and_the_plan_stays_small_in_memory(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["some", "of", "the", "words", "that", "there", "are", "in", "these", "short", "documents"]
    write_documents(tmp_path / "d.parquet", words, MANY)
    config = CaptureConfig(
        documents=str(tmp_path / "d.parquet"),
        table=str(tmp_path / "table"),
        teacher=TeacherConfig(model=str(tiny_teacher)),
        selection=SelectionConfig(top_k=1),
    )
    monkeypatch.setattr(shard, "labeller_of", stub_of)
    assert capture(config).sequences == MANY
    write_documents(tmp_path / "d.parquet", words, MANY + 10)

    tokenized: list[str] = []
    encode = DocumentTokenizer.encode

    def counting(self: DocumentTokenizer, contents: Sequence[str]) -> object:
        tokenized.extend(contents)
        return encode(self, contents)

    monkeypatch.setattr(DocumentTokenizer, "encode", counting)
    nightly = plan(resolve(config), tmp_path / "nightly")
    assert (nightly.documents, nightly.unchanged, nightly.sequences) == (MANY + 10, MANY, 10)
    assert len(tokenized) == 10

    job = resolve(config)
    carried = Documents(config.documents, config.columns).carried
    tracemalloc.start()
    known = Known(job, carried)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del known
    assert kept < BYTES_A_DOCUMENT * MANY
    assert peak < 4 * BYTES_A_DOCUMENT * MANY


def test_a_file_whose_name_is_not_utf8_is_rejected(tiny_teacher: Path, tmp_path: Path) -> None:
    folder = tmp_path / "documents"
    folder.mkdir()
    (folder / "good.txt").write_text("some words")
    (folder / os.fsdecode(b"caf\xe9.txt")).write_text("some words")
    teacher = TeacherConfig(model=str(tiny_teacher))
    config = CaptureConfig(documents=str(folder), table=str(tmp_path / "t"), teacher=teacher)
    found = plan(resolve(config), tmp_path / "plan")
    assert (found.documents, found.rejects) == (1, 1)
    assert found.rejects_file
    reject = json.loads(Path(found.rejects_file).read_text())
    assert reject == {"document_id": os.fsdecode(b"caf\xe9.txt"), "reason": "the id is not valid UTF-8"}


def lines(path: Path, records: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + "no json\n")
    return path


def test_unusable_documents_are_counted_and_listed_in_order(tiny_teacher: Path, tmp_path: Path) -> None:
    good = [{"id": f"d{i}", "text": "some words"} for i in range(3)]
    bad = [{"id": "empty", "text": ""}, {"id": "d1", "text": "x"}, {"id": "null"}, {"id": "number", "text": 5}]
    path, teacher = lines(tmp_path / "a.jsonl", good + bad), TeacherConfig(model=str(tiny_teacher))
    config = CaptureConfig(documents=str(path), table=str(tmp_path / "t"), teacher=teacher)
    found = plan(resolve(config), tmp_path / "plan")
    assert (found.documents, found.rejects) == (3, 5)
    rejects = [json.loads(line) for line in Path(str(found.rejects_file)).read_text().splitlines()]
    assert [reject["document_id"] for reject in rejects] == ["empty", "d1", "null", "number", "a.jsonl:8"]

    lines(path, bad[2:])
    with pytest.raises(DocumentsError, match="no document can be used") as caught:
        plan(resolve(config), tmp_path / "again")
    assert Path(str(found.rejects_file)).read_text().count("\n") == 3
    assert str(found.rejects_file) in str(caught.value)


def test_strict_names_the_first_document_that_cannot_be_used(tiny_teacher: Path, tmp_path: Path) -> None:
    question = {"role": "user", "content": "that nobody answers: only the tokenizer sees it"}
    answered = {"id": "good", "m": [question, {"role": "assistant", "content": "So"}]}
    path = lines(tmp_path / "a.jsonl", [answered, {"id": "first", "m": [question]}, {"id": "second", "m": []}])
    config = CaptureConfig(
        documents=str(path),
        table=str(tmp_path / "t"),
        teacher=TeacherConfig(model=str(tiny_teacher)),
        columns=ColumnsConfig(messages="m"),
        strict=True,
    )
    with pytest.raises(DocumentsError, match="strict") as caught:
        plan(resolve(config), tmp_path / "plan")
    assert "found:       first: the chat has no assistant message" in str(caught.value)
    assert "second" not in str(caught.value)
    assert not (tmp_path / "t").exists()


def test_a_device_that_this_machine_lacks_is_refused_before_the_documents_are_read(tiny_teacher: Path, tmp_path: Path):
    teacher = TeacherConfig(model=str(tiny_teacher), device="cuda:99")
    config = CaptureConfig(documents=str(tmp_path / "nowhere"), table=str(tmp_path / "table"), teacher=teacher)
    with pytest.raises(UsageError, match="no device 'cuda:99'"):
        plan(resolve(config), tmp_path / "plan")
