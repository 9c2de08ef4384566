"""A table of chats whose masks an older version had found is read again once, and only what was wrong is replaced."""

import json
from pathlib import Path

import pytest

from softlabel.pipeline.capturing import labelling, masks
from softlabel.pipeline.capturing.capture import CaptureReport, capture
from softlabel.pipeline.config.capture import CaptureConfig
from softlabel.pipeline.sequences.chat import ChatTemplate, RenderedChat
from softlabel.storage.reader import read
from softlabel.storage.table import Table


def chats(path: Path, *names: str) -> Path:
    lines = [
        {
            "id": n,
            "messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"It is {n}."}],
        }
        for n in names
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(teacher: Path, documents: Path, table: Path) -> CaptureReport:
    config = {
        "documents": str(documents),
        "table": str(table),
        "teacher": {"model": str(teacher), "dtype": "float32"},
        "columns": {"messages": "messages"},
    }
    return capture(CaptureConfig.model_validate(config))


def rows(table: Path) -> dict[str, list[dict[str, object]]]:
    opened, found = Table.open(str(table)), dict[str, list[dict[str, object]]]()
    for each in opened.shards():
        for row in read(opened, each).to_pylist():
            found.setdefault(row["document_id"], []).append(row)
    return found


@pytest.fixture
def older(tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A table of an older version, which had captured too much of two of six chats."""
    right = ChatTemplate.write

    def wrong(self: ChatTemplate, chat: str, *more: object) -> RenderedChat:
        written = right(self, chat, *more)  # type: ignore[arg-type]
        spoiled = "wrong" in chat
        return written._replace(turns=[(0, written.turns[0][1])], others=[]) if spoiled else written

    with monkeypatch.context() as patch:
        patch.setattr(masks, "MASKS", 1)
        patch.setattr(ChatTemplate, "write", wrong)
        run(
            tiny_teacher,
            chats(tmp_path / "c.jsonl", "one", "wrong", "two", "wrong again", "three", "four"),
            tmp_path / "t",
        )
    return tmp_path / "t"


def test_only_rows_with_a_wrong_mask_are_replaced_and_only_once(
    older: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    before, documents = rows(older), tmp_path / "c.jsonl"
    report = run(tiny_teacher, documents, older)
    after = rows(older)
    assert (report.replaced, report.sequences) == (2, 2)
    assert {name for name in before if before[name] != after[name]} == {"wrong", "wrong again"}
    assert all(len(each) == 1 for each in after.values())
    run(tiny_teacher, documents, tmp_path / "new")
    keys = [
        {name: [row["key"] for row in each] for name, each in found.items()}
        for found in (after, rows(tmp_path / "new"))
    ]
    assert keys[0] == keys[1], "as a new table has them"
    again = run(tiny_teacher, documents, older)
    assert (again.replaced, again.sequences, again.version) == (0, 0, report.version)
    assert again.unchanged == len(before)


def test_the_teacher_is_not_loaded_if_nothing_was_wrong(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents, table = chats(tmp_path / "c.jsonl", "one", "two"), tmp_path / "t"
    with monkeypatch.context() as patch:
        patch.setattr(masks, "MASKS", 1)
        run(tiny_teacher, documents, table)
    before = rows(table)
    monkeypatch.setattr(labelling, "load_teacher", None)
    assert run(tiny_teacher, documents, table).replaced == 0
    assert rows(table) == before


def test_documents_that_were_not_read_again_are_corrected_by_the_capture_that_reads_them(
    older: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    first = run(tiny_teacher, chats(tmp_path / "part.jsonl", "one", "wrong"), older)
    assert first.replaced == 1
    assert run(tiny_teacher, tmp_path / "c.jsonl", older).replaced == 1


def test_a_table_of_this_version_is_not_read_again(tiny_teacher: Path, tmp_path: Path) -> None:
    documents = chats(tmp_path / "c.jsonl", "one", "two")
    first = run(tiny_teacher, documents, tmp_path / "t")
    again = run(tiny_teacher, documents, tmp_path / "t")
    assert (again.version, again.unchanged, again.answers) == (first.version, 2, 0)
