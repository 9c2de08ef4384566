"""A lineage names what a student or a table was made from and what was made from it, and everything that is gone."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic_core import to_json

from softlabel.flows.cli import run
from softlabel.pipeline.capturing.capture import capture
from softlabel.pipeline.config.tables import MixConfig, ReprocessConfig
from softlabel.pipeline.lineage import StudentLineage, TableLineage, ViewLineage, lineage
from softlabel.pipeline.tables.mix import mix
from softlabel.pipeline.tables.reprocess import reprocess
from softlabel.pipeline.training.train import train
from softlabel.storage.errors import TableNotFoundError
from softlabel.storage.identity import working_for
from softlabel.storage.records.derivations import DERIVED, Derived, record_derived
from softlabel.storage.records.store import now
from softlabel.storage.records.versions import pin
from softlabel.storage.table import Table
from softlabel.storage.upkeep.verification import verify
from tests.flows.commands import shown, softlabel
from tests.pipeline.capturing.test_capture import settings, texts, write
from tests.pipeline.trainings import settings as training

HOSTILE = "\x1b[31m[bold]x[/]\n\u202e"


@pytest.fixture(scope="module")
def original(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a table, one reduced from it, a view over both, a student of the table and one of the view."""
    folder = tmp_path_factory.mktemp("lineage")
    with working_for("run-1", "capture"):
        capture(settings(tiny_teacher, write(folder / "d.parquet", texts(30)), folder / "table"))
    reduce = ReprocessConfig(source=str(folder / "table"), destination=str(folder / "small"), selection={"max_k": 4})
    with working_for("run-2", "reprocess"):
        reprocess(reduce)
    mix(MixConfig(view=str(folder / "view"), tables=(str(folder / "table"), str(folder / "small")), weights=(2, 1)))
    short = {"stream": {"max_length": 128}, "optimizer": {"max_steps": 1, "report_to": []}}
    with working_for("run-3", "train"):
        train(training(Table.open(str(folder / "table")), folder / "student", **short))
    view = training(Table.open(str(folder / "table")), folder / "of-view", **short)
    train(view.model_copy(update={"table": str(folder / "view")}))
    return folder


@pytest.fixture
def folder(original: Path) -> Path:
    """The same folder, to which every record points; a test that changes it puts it back."""
    return original


def test_a_student_is_followed_to_its_documents_teacher_selection_commits_and_runs(folder: Path, tiny_teacher: Path):
    found = lineage(str(folder / "student"))
    assert isinstance(found, StudentLineage)
    assert [run.circumstances["run"] for run in found.runs] == ["run-3"]
    assert (found.base.name, found.base.problem) == (str(tiny_teacher), None)
    assert set(found.base.files) == {"config.json", "model.safetensors"}
    table = found.table
    assert isinstance(table, TableLineage)
    assert (table.location, table.version) == (str(folder / "table"), Table.open(str(folder / "table")).version)
    assert table.problem is None
    assert table.documents is not None
    assert (table.documents.number, table.documents.sources) == (30, (str(folder / "d.parquet"),))
    assert table.teacher is not None
    assert (table.teacher.name, set(table.teacher.files)) == (str(tiny_teacher), {"config.json", "model.safetensors"})
    assert table.selection is not None
    assert {commit.run for commit in table.commits} == {"run-1"}


def test_a_table_names_its_students_views_and_the_tables_made_from_it(folder: Path):
    found = lineage(str(folder / "table"))
    assert isinstance(found, TableLineage)
    assert [(use.location, use.run, use.problem) for use in found.students] == [
        (str(folder / "of-view"), None, None),
        (str(folder / "student"), "run-3", None),
    ]
    assert [(use.location, use.problem) for use in found.views] == [(str(folder / "view"), None)]
    assert [(use.location, use.run, use.version) for use in found.derived] == [
        (str(folder / "small"), "run-2", found.version)
    ]
    small = lineage(str(folder / "small"))
    assert isinstance(small, TableLineage)
    assert [(source.location, source.version) for source in small.sources] == [(found.location, found.version)]
    assert {commit.run for commit in small.sources[0].commits} == {"run-1"}
    assert small.reduced_from == found.selection
    assert small.documents == found.documents
    assert verify(Table.open(str(folder / "table"))).orphans == ()


def test_a_view_is_followed_to_its_tables_and_students(folder: Path):
    found = lineage(str(folder / "view"))
    assert isinstance(found, ViewLineage)
    assert [(table.location, table.weight) for table in found.tables] == [
        (str(folder / "table"), 2),
        (str(folder / "small"), 1),
    ]
    assert [use.location for use in found.students] == [str(folder / "of-view")]
    student = lineage(str(folder / "of-view"))
    assert isinstance(student, StudentLineage)
    assert student.table.problem is None
    assert replace(student.table, students=found.students) == found


@pytest.mark.parametrize("gone", ["student", "view", "small"])
def test_what_was_made_from_a_table_and_is_gone_is_named(folder: Path, gone: str):
    shutil.move(folder / gone, folder / "moved")
    try:
        found = lineage(str(folder / "table"))
        assert isinstance(found, TableLineage)
        uses = {Path(use.location).name: use.problem for use in (*found.students, *found.views, *found.derived)}
        assert uses.pop(gone) == "no longer there"
        # A view without one of its tables can't be opened, and says so.
        assert {name for name, problem in uses.items() if problem} == ({"view"} if gone == "small" else set())
    finally:
        shutil.move(folder / "moved", folder / gone)


@pytest.mark.parametrize("change", ["gone", "other", "view gone"])
def test_a_student_whose_table_is_gone_or_another_still_shows_what_it_recorded(folder: Path, change: str):
    name = "view" if change == "view gone" else "table"
    shutil.move(folder / name, folder / "moved")
    if change == "other":
        shutil.copytree(folder / "small", folder / "table")
    try:
        found = lineage(str(folder / ("of-view" if change == "view gone" else "student")))
        assert isinstance(found, StudentLineage)
        assert found.table.problem
        tables = found.table.tables if isinstance(found.table, ViewLineage) else (found.table,)
        assert all(table.teacher and table.teacher.files and table.selection for table in tables)
        assert run(["lineage", found.location]) == 0
    finally:
        shutil.rmtree(folder / name, ignore_errors=True)
        shutil.move(folder / "moved", folder / name)


def test_the_hash_of_the_documents_changes_with_any_content_and_no_order(tiny_teacher: Path, tmp_path: Path):
    documents = texts(6)
    changed = documents | {next(iter(documents)): "another text"}
    hashes = []
    for name, each in {"a": documents, "b": dict(reversed(documents.items())), "c": changed}.items():
        capture(settings(tiny_teacher, write(tmp_path / f"{name}.parquet", each), tmp_path / name))
        found = lineage(str(tmp_path / name))
        assert isinstance(found, TableLineage)
        assert found.documents is not None
        hashes.append(found.documents.hash)
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_circle_of_sources_ends(folder: Path, tmp_path: Path):
    for name, source in (("a", folder / "table"), ("b", tmp_path / "a")):
        reprocess(ReprocessConfig(source=str(source), destination=str(tmp_path / name)))
    shutil.rmtree(tmp_path / "a")
    reprocess(ReprocessConfig(source=str(tmp_path / "b"), destination=str(tmp_path / "a")))
    found = lineage(str(tmp_path / "a"))
    assert isinstance(found, TableLineage)
    (b,) = found.sources
    assert b.sources[0].problem


def test_the_command_shows_a_tree_and_the_same_as_json(folder: Path, capsys: pytest.CaptureFixture[str]):
    text = shown(capsys, "lineage", folder / "student").replace("│ ", "")  # a long line goes on below the tree
    for part in ("student ", "made from ", "teacher ", "selection ", "documents 30", "run run-3", "capture run run-1"):
        assert part in text
    assert f"used by student {folder / 'student'}" in shown(capsys, "lineage", folder / "table")
    for name in ("student", "table", "view"):
        code, found, _ = softlabel(capsys, "lineage", folder / name)
        assert (code, found["kind"]) == (0, name)
        assert found == json.loads(to_json(lineage(str(folder / name))))


def test_a_place_with_neither_is_refused(tmp_path: Path):
    with pytest.raises(TableNotFoundError, match="neither a student nor a soft-label table"):
        lineage(str(tmp_path))


def test_hostile_names_reach_the_terminal_as_escapes(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    shutil.copytree(folder / "table", tmp_path / "table")
    table = Table.open(str(tmp_path / "table"))
    pin(table.location, table.version, Path(f"/students/{HOSTILE}"))
    DERIVED.write(table.location, "x", Derived(now(), HOSTILE, f"/tables/{HOSTILE}", 1, HOSTILE), replace=True)
    assert run(["lineage", table.location]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\u202e" not in out
    assert out.count("[bold]x[/]") >= 2


def test_a_source_that_can_not_be_written_only_warns(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr("softlabel.storage.places.folder.Folder.write", refuse)
    with pytest.warns(UserWarning, match="will not show"):
        record_derived(str(folder / "table"), 1, str(tmp_path / "new"), "copy")
