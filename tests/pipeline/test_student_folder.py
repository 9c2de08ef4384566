"""A student's folder that can't be written is an error of one screen."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.student_folder import StudentFolder
from storage.errors import TrainingError


@pytest.mark.parametrize(
    "write", [lambda full: full.write_text("x"), lambda full: save_file({"a": torch.zeros(1)}, str(full / "weights"))]
)
def test_a_full_disk_and_a_folder_that_is_none(tmp_path: Path, write):
    student = StudentFolder(tmp_path / "student")
    said = rf"can't be written(.|\n)*{re.escape(str(student.path))}"
    with pytest.raises(TrainingError, match=said) as error, student.writing():
        write(Path("/dev/full"))
    assert len(str(error.value).splitlines()) < 7
