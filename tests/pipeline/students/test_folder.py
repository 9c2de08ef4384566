"""A student's folder: clear errors for a folder that can't be written, and for a record that can't be used."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from softlabel.pipeline.config.evaluate import EvaluateConfig
from softlabel.pipeline.config.train import TrainConfig
from softlabel.pipeline.evaluation.evaluate import evaluate
from softlabel.pipeline.students.folder import StudentFolder
from softlabel.pipeline.training.train import train
from softlabel.storage.errors import TrainingError, UsageError
from tests.pipeline.captured import make_table
from tests.storage.test_location import HOLDING, SECRET


@pytest.mark.parametrize(
    "write", [lambda full: full.write_text("x"), lambda full: save_file({"a": torch.zeros(1)}, str(full / "weights"))]
)
def test_a_student_that_can_not_be_written_is_an_error_with_its_folder(tmp_path: Path, write):
    student = StudentFolder(tmp_path / "student")
    message = rf"can't be written(.|\n)*{re.escape(str(student.path))}"
    with pytest.raises(TrainingError, match=message) as error, student.writing():
        write(Path("/dev/full"))
    assert len(str(error.value).splitlines()) < 7


@pytest.mark.parametrize("location", HOLDING)
@pytest.mark.parametrize(
    "at", [("table", "location"), ("config", "table"), ("config", "student", "model"), ("source", "name")]
)
def test_a_record_that_names_credentials_is_refused(tmp_path: Path, location: str, at: tuple[str, ...]):
    record: object = location
    for name in reversed(at):
        record = {name: record}
    (tmp_path / "softlabel.json").write_text(json.dumps(record))
    with pytest.raises(UsageError, match=r"contains credentials(.|\n)*softlabel\.json") as error:
        StudentFolder(tmp_path).finished()
    assert SECRET not in str(error.value)


def test_an_evaluation_refuses_a_record_with_credentials(tmp_path: Path, tiny_teacher: Path):
    table = make_table(tmp_path / "table", tiny_teacher, train=0)
    (tmp_path / "softlabel.json").write_text(json.dumps({"table": {"tables": [{"location": HOLDING[0]}]}}))
    with pytest.raises(UsageError, match="contains credentials") as error:
        evaluate(EvaluateConfig(table=table.location, students=(str(tmp_path),), report=str(tmp_path / "report")))
    assert SECRET not in str(error.value)


@pytest.mark.parametrize("output", ["file", "file/student", "file/new/student"])
def test_an_output_that_is_a_file_or_in_one_is_an_error_with_its_path(tmp_path: Path, output: str):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match=rf"there is a file where(.|\n)*where: +{re.escape(str(tmp_path / output))}"):
        train(TrainConfig(table="nowhere", output=str(tmp_path / output), optimizer={"device": "cpu"}))
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("target", ["others", "missing"])
def test_no_student_is_written_through_a_link(tmp_path: Path, target: str):
    (tmp_path / "others" / "scratch").mkdir(parents=True)
    (tmp_path / "student.training").symlink_to(tmp_path / target)
    with pytest.raises(UsageError, match="checkpoints is a link"):
        train(TrainConfig(table="nowhere", output=str(tmp_path / "student"), optimizer={"device": "cpu"}))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["others", "scratch", "student.training"]
