"""``softlabel verify TABLE --teacher.model ...`` on the command line."""

import json
from pathlib import Path

import pytest

from softlabel.flows.cli import run
from softlabel.pipeline.capturing.capture import capture
from tests.pipeline.capturing.test_capture import settings, texts, write

pytestmark = pytest.mark.usefixtures("prefect")


def test_the_teacher_is_compared_with_a_sample(tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    table = tmp_path / "t"
    capture(settings(tiny_teacher, write(tmp_path / "d.parquet", texts(40)), table))
    command = ["verify", str(table), "--teacher.model", str(tiny_teacher), "--sequences", "5"]
    assert run([*command, "--teacher.dtype", "float32", "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert (found["rows"], found["recheck"]["sequences"], found["recheck"]["disagreements"]) == (40, 5, [])
    assert "recheck" in err
    assert run([*command, "--teacher.dtype", "float32"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "is intact: " in shown
    assert "the teacher agrees with the table on 5 sequences" in shown
    assert run(command) == 1
    assert "teacher.dtype: the table has float32, this teacher bfloat16" in capsys.readouterr().err


def test_teacher_settings_without_a_model_are_refused(capsys: pytest.CaptureFixture[str]):
    assert run(["verify", "t", "--teacher.dtype", "float32"]) == 2
    assert "--teacher.model" in capsys.readouterr().err
