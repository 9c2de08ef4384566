"""A table that an older version has captured is read again once, and only what was wrong is replaced, in one commit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from softlabel.pipeline.capturing import capture as capturing
from softlabel.pipeline.capturing import corrections, labelling, run_plan
from softlabel.pipeline.capturing.capture import CaptureReport, capture, preview_capture
from softlabel.pipeline.capturing.job import resolve
from softlabel.pipeline.config.capture import CaptureConfig
from softlabel.pipeline.config.estimate import EstimateConfig
from softlabel.pipeline.config.tables import MaintainConfig, VerifyConfig
from softlabel.pipeline.estimation.estimate import estimate
from softlabel.pipeline.sequences.chat import ChatRefusedError, ChatTemplate, RenderedChat
from softlabel.pipeline.sequences.tokenizer import DocumentTokenizer
from softlabel.pipeline.tables.maintain import maintain
from softlabel.pipeline.tables.verify import verify
from softlabel.storage.reader import read
from softlabel.storage.staging import staged_shards
from softlabel.storage.table import Table

SIX = ("one", "wrong", "two", "wrong again", "three", "four")
Row = dict[str, Any]


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


def settings(teacher: Path, documents: Path, table: Path, **more: Any) -> dict[str, Any]:
    first = json.loads(documents.read_text().splitlines()[0])
    return {
        "documents": str(documents),
        "table": str(table),
        "teacher": {"model": str(teacher), "dtype": "float32"},
        "columns": {"messages": "messages"} if "messages" in first else {},
        **more,
    }


def run(teacher: Path, documents: Path, table: Path, **more: Any) -> CaptureReport:
    return capture(CaptureConfig.model_validate(settings(teacher, documents, table, **more)))


def rows(table: Path, version: int | None = None) -> dict[str, list[Row]]:
    opened, found = Table.open(f"{table}@{version}" if version is not None else str(table)), dict[str, list[Row]]()
    for each in opened.shards():
        for row in read(opened, each).to_pylist():
            found.setdefault(row["document_id"], []).append(row)
    return found


def spoil_masks(patch: pytest.MonkeyPatch) -> None:
    """Make templates as an older version did, which captured the question, too, if it has the word wrong."""
    right = ChatTemplate.write

    def wrong(self: ChatTemplate, chat: str, *more: object) -> RenderedChat:
        written = right(self, chat, *more)  # type: ignore[arg-type]
        spoiled = "wrong" in chat
        return written._replace(turns=[(0, written.turns[0][1])], others=[]) if spoiled else written

    patch.setattr(ChatTemplate, "write", wrong)


def spoil_texts(patch: pytest.MonkeyPatch) -> None:
    """Tokenize as an older version did, which put a space before some texts."""
    right = DocumentTokenizer.encode

    def wrong(self: DocumentTokenizer, contents: list[str]) -> object:
        return right(self, [f" {content}" if "wrong" in content else content for content in contents])

    patch.setattr(DocumentTokenizer, "encode", wrong)


def make_older(
    teacher: Path, documents: Path, table: Path, spoil: Callable[[pytest.MonkeyPatch], None] = spoil_masks
) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corrections, "READING", 1)
        spoil(patch)
        run(teacher, documents, table)
    return table


@pytest.fixture
def older(tiny_teacher: Path, tmp_path: Path) -> Path:
    """A table of an older version, which had captured too much of two of six chats."""
    return make_older(tiny_teacher, chats(tmp_path / "c.jsonl", *SIX), tmp_path / "t")


def require_as_new(table: Path, teacher: Path, documents: Path, folder: Path) -> None:
    run(teacher, documents, folder)
    found = [{n: [row["key"] for row in each] for n, each in rows(path).items()} for path in (table, folder)]
    assert found[0] == found[1], "as a new table has them"


def test_wrong_rows_are_replaced_by_right_ones_in_one_commit_and_only_once(
    older: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    before, first, documents = rows(older), Table.open(str(older)).version, tmp_path / "c.jsonl"
    more = chats(tmp_path / "more.jsonl", *SIX, "new")
    report = run(tiny_teacher, more, older)
    after = rows(older)
    assert (report.reread, report.replaced, report.withdrawn, report.sequences, report.unchanged) == (6, 2, 0, 3, 4)
    assert {name for name in after if before.get(name) != after[name]} == {"wrong", "wrong again", "new"}
    for version in range(first, report.version + 1):
        now = rows(older, version)
        changed = {name for name in before if now[name] != before[name]}
        assert all(len(each) == 1 for each in now.values())
        assert changed in (set(), {"wrong", "wrong again"}), "both at once"
    history = [
        (commit["softlabel"]["operation"], commit["softlabel"]["sequences"])
        for commit in Table.open(str(older)).history()
        if commit["version"] > first
    ]
    assert history == [("capture", 1), ("replace", 0)]
    require_as_new(older, tiny_teacher, more, tmp_path / "new")
    again = run(tiny_teacher, documents, older)
    assert (again.reread, again.replaced, again.sequences, again.version) == (0, 0, 0, report.version)
    verify(VerifyConfig(table=str(older)))
    assert not list(staged_shards(Table.open(str(older)))), "nothing is left behind"


def test_texts_with_other_tokens_are_replaced_too(tiny_teacher: Path, tmp_path: Path) -> None:
    documents = tmp_path / "d.jsonl"
    documents.write_text("".join(json.dumps({"id": name, "text": f"It is {name}."}) + "\n" for name in SIX))
    table = make_older(tiny_teacher, documents, tmp_path / "t", spoil_texts)
    before = rows(table)
    report = run(tiny_teacher, documents, table)
    assert (report.reread, report.replaced, report.sequences) == (6, 2, 2)
    after = rows(table)
    assert {name for name in before if before[name] != after[name]} == {"wrong", "wrong again"}
    require_as_new(table, tiny_teacher, documents, tmp_path / "new")


def test_the_teacher_is_not_loaded_if_nothing_was_wrong(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = chats(tmp_path / "c.jsonl", "one", "two")
    table = make_older(tiny_teacher, documents, tmp_path / "t")
    before = rows(table)
    monkeypatch.setattr(labelling, "load_teacher", None)
    assert run(tiny_teacher, documents, table).replaced == 0
    assert rows(table) == before
    assert run(tiny_teacher, documents, table).reread == 0


def test_a_document_that_cannot_be_used_any_more_loses_its_rows_and_is_named(
    older: Path, tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = ChatTemplate.write

    def stricter(self: ChatTemplate, chat: str, *more: object) -> RenderedChat:
        if "again" in chat:
            raise ChatRefusedError("can't tell where the assistant's turn ends")
        return right(self, chat, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(ChatTemplate, "write", stricter)
    report = run(tiny_teacher, tmp_path / "c.jsonl", older)
    assert (report.replaced, report.withdrawn, report.sequences, report.rejects) == (2, 1, 1, 1)
    assert set(rows(older)) == set(SIX) - {"wrong again"}
    [reject] = [json.loads(line) for line in Path(str(report.rejects_file)).read_text().splitlines()]
    assert reject["document_id"] == "wrong again"
    assert "can't tell where" in reject["reason"]
    assert "its rows, which an older version of softlabel captured, are removed" in reject["reason"]


def test_documents_that_are_not_read_are_corrected_by_the_capture_that_reads_them_and_others_not_read_again(
    older: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    part = chats(tmp_path / "part.jsonl", "one", "wrong")
    assert run(tiny_teacher, part, older).replaced == 1
    again = run(tiny_teacher, part, older)
    assert (again.reread, again.answers) == (0, 0)
    whole = run(tiny_teacher, tmp_path / "c.jsonl", older)
    assert (whole.reread, whole.replaced) == (4, 1)
    assert run(tiny_teacher, tmp_path / "c.jsonl", older).reread == 0
    assert not list((older / "_softlabel" / "unread").iterdir())


def test_all_documents_are_read_again_if_the_list_of_those_left_is_lost(
    older: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    run(tiny_teacher, chats(tmp_path / "part.jsonl", "one", "wrong"), older)
    [listed] = (older / "_softlabel" / "unread").iterdir()
    listed.write_bytes(listed.read_bytes()[:-1] + b"x")
    report = run(tiny_teacher, tmp_path / "c.jsonl", older)
    assert (report.reread, report.replaced) == (6, 1)


@pytest.mark.parametrize("where", ["between shards", "before the commit"])
def test_a_correction_that_was_killed_continues_and_no_version_lacks_a_row(
    where: str, tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"wrong {i}" for i in range(6)]
    documents = chats(tmp_path / "c.jsonl", *names, "right")
    table, small = make_older(tiny_teacher, documents, tmp_path / "t"), {"shards": {"positions": 15}}
    before, step, done = rows(table), run_plan.capture_shard, list[int]()

    def dies(*args: Any) -> Any:
        if len(done) == 2 and where == "between shards":
            raise KeyboardInterrupt
        done.append(step(*args).sequences)

    with monkeypatch.context() as patch:
        patch.setattr(run_plan, "capture_shard", dies)
        if where == "before the commit":
            patch.setattr(run_plan, "capture_shard", step)
            patch.setattr(capturing, "replace_rows", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(tiny_teacher, documents, table, **small)
    assert rows(table) == before
    maintain(MaintainConfig(table=str(table)))  # spares what is young
    report = run(tiny_teacher, documents, table, **small)
    assert report.replaced == len(names)
    assert report.sequences == (len(names) - sum(done) if where == "between shards" else 0)
    require_as_new(table, tiny_teacher, documents, tmp_path / "new")


def test_documents_that_were_edited_or_lost_after_the_kill_are_not_mixed_up(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = chats(tmp_path / "c.jsonl", "wrong a", "wrong b", "wrong c")
    table = make_older(tiny_teacher, documents, tmp_path / "t")
    before = rows(table)
    with monkeypatch.context() as patch:
        patch.setattr(capturing, "replace_rows", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(tiny_teacher, documents, table)
    report = run(tiny_teacher, chats(tmp_path / "part.jsonl", "wrong a"), table)
    after = rows(table)
    assert (report.replaced, report.sequences) == (1, 0)
    assert {name for name in before if before[name] != after[name]} == {"wrong a"}
    report = run(tiny_teacher, documents, table)
    assert (report.replaced, report.sequences) == (2, 0)
    require_as_new(table, tiny_teacher, documents, tmp_path / "new")


def test_another_run_that_corrects_the_same_documents_meanwhile_adds_no_row_twice(
    older: Path, tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents, replace_rows = tmp_path / "c.jsonl", capturing.replace_rows
    reports: list[CaptureReport] = []

    def late(*args: Any) -> int:
        monkeypatch.setattr(capturing, "replace_rows", replace_rows)
        reports.append(run(tiny_teacher, documents, older))
        return replace_rows(*args)

    monkeypatch.setattr(capturing, "replace_rows", late)
    reports.append(run(tiny_teacher, documents, older))
    assert [report.replaced for report in reports] == [2, 0]
    assert all(len(each) == 1 for each in rows(older).values())
    require_as_new(older, tiny_teacher, documents, tmp_path / "new")


def test_equal_texts_are_corrected_with_one_run_of_the_teacher(tiny_teacher: Path, tmp_path: Path) -> None:
    documents = chats(tmp_path / "c.jsonl", "wrong")
    twin = json.loads(documents.read_text()) | {"id": "twin"}
    documents.write_text(documents.read_text() + json.dumps(twin) + "\n")
    table = make_older(tiny_teacher, documents, tmp_path / "t")
    report = run(tiny_teacher, documents, table)
    assert (report.replaced, report.sequences, report.copied) == (2, 1, 1)
    require_as_new(table, tiny_teacher, documents, tmp_path / "new")


def test_estimate_and_a_dry_run_count_what_is_read_again_and_replaced(
    older: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    shown = settings(tiny_teacher, tmp_path / "c.jsonl", older)
    found = estimate(EstimateConfig.model_validate(shown))
    assert (found.pending, found.reread, found.replacing, found.sequences) == (0, 6, 2, 2)
    preview = preview_capture(resolve(CaptureConfig.model_validate(shown)))
    assert (preview.reread, preview.replaced, preview.withdrawn, preview.sequences) == (6, 2, 0, 2)
    run(tiny_teacher, tmp_path / "c.jsonl", older)
    found = estimate(EstimateConfig.model_validate(shown))
    assert (found.pending, found.reread, found.replacing, found.sequences) == (0, 0, 0, 0)


def test_a_table_of_this_version_is_not_read_again(tiny_teacher: Path, tmp_path: Path) -> None:
    documents = chats(tmp_path / "c.jsonl", "one", "two")
    first = run(tiny_teacher, documents, tmp_path / "t")
    again = run(tiny_teacher, documents, tmp_path / "t")
    assert (again.version, again.unchanged, again.answers, again.reread) == (first.version, 2, 0, 0)


@pytest.mark.long
def test_several_workers_correct_a_table_together(tiny_teacher: Path, tmp_path: Path) -> None:
    documents = chats(tmp_path / "c.jsonl", *(f"wrong {i}" for i in range(40)), "right")
    table = make_older(tiny_teacher, documents, tmp_path / "t")
    config = settings(tiny_teacher, documents, table, shards={"positions": 60})
    config["teacher"]["workers"] = 2
    report = capture(CaptureConfig.model_validate(config))
    assert (report.replaced, report.sequences) == (40, 40)
    require_as_new(table, tiny_teacher, documents, tmp_path / "new")
