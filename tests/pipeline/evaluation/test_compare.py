"""Ranking students: on which table, how much of a gap each closes, and how sure that is."""

import json
from pathlib import Path

import pytest

from softlabel.pipeline.config.evaluate import CompareConfig, EvaluateConfig
from softlabel.pipeline.evaluation.compare import compare, trained_on
from softlabel.pipeline.evaluation.evaluate import evaluate
from softlabel.storage.errors import UsageError
from tests.pipeline.captured import make_table
from tests.pipeline.evaluation.test_evaluate import make_student, recorded, without_drawings  # noqa: F401  fixture


@pytest.fixture(scope="module")
def table(tiny_teacher, tmp_path_factory):
    return make_table(tmp_path_factory.mktemp("compared") / "table", tiny_teacher, train=10, held_out=12)


@pytest.fixture(scope="module")
def students(table, tiny_teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("students")
    noise = {"good": 0.01, "middling": 0.03, "control": 0.06}
    return {
        name: str(make_student(folder / name, tiny_teacher, recorded(table), noise=level))
        for name, level in noise.items()
    }


def test_students_are_ranked_on_the_table_that_they_were_trained_on(table, students, tmp_path):
    good, middling, control = students.values()
    config = CompareConfig(students=(middling, good), control=control, report=str(tmp_path / "report"), device="cpu")
    found = compare(config)
    assert (found.table, found.version) == (table.location, table.version)
    assert [each.student for each in found.standings] == ["good", "middling", "control"]
    kl = {score.name: score.kl for score in found.students}
    shares = {each.student: each.gap_closed.mean for each in found.standings}
    assert shares == pytest.approx({name: 1 - kl[name] / kl["control"] for name in kl})
    for each in found.standings[:2]:
        assert each.gap_closed.interval[0] < each.gap_closed.mean < each.gap_closed.interval[1]
    assert json.loads(Path(found.json).read_text())["gap"] == {"control": "control", "reference": None}
    assert "share of the gap closed" in Path(found.html).read_text()


def test_a_gap_can_end_at_another_model(table, students, tmp_path):
    good, middling, control = students.values()
    given = {"table": table.location, "students": (middling,), "control": control, "reference": good}
    found = evaluate(EvaluateConfig(**given, report=str(tmp_path / "report"), device="cpu"))
    shares = {each.student: each.gap_closed.mean for each in found.standings}
    assert (shares["good"], shares["control"]) == (1, 0)
    assert 0 < shares["middling"] < 1
    with pytest.raises(ValueError, match="give control too"):
        EvaluateConfig(table=table.location, students=(middling,), reference=good)


def test_the_newest_version_that_a_student_was_trained_on_is_used(table, students, tiny_teacher, tmp_path):
    newer = make_student(tmp_path / "newer", tiny_teacher, recorded(table) | {"version": table.version + 3})
    chosen = trained_on(CompareConfig(students=(students["good"], str(newer), students["control"])))
    assert chosen == f"{table.location}@{table.version + 3}"


def test_students_of_different_tables_need_a_table(table, students, tiny_teacher, tmp_path):
    other = make_student(tmp_path / "other", tiny_teacher, recorded(table) | {"location": "/elsewhere"})
    for models in ((students["good"], str(other)), (str(tiny_teacher),)):
        with pytest.raises(UsageError, match=r"on which table(.|\n)*--table"):
            compare(CompareConfig(students=models, report=str(tmp_path / "report")))
