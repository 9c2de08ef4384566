"""An evaluation of several students that was killed: run again, it makes the same report."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from softlabel.pipeline.config.evaluate import EvaluateConfig
from softlabel.pipeline.evaluation.evaluate import evaluate
from softlabel.pipeline.stream import holdout
from tests.pipeline.captured import make_table
from tests.pipeline.evaluation.test_evaluate import make_student, recorded

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("one_thread")]

_CHILD = """
import json, os, signal, sys
import torch
torch.set_num_threads(1)
from softlabel.pipeline.config.evaluate import EvaluateConfig
from softlabel.pipeline.evaluation.evaluate import evaluate
from softlabel.pipeline.stream import holdout
holdout.PART_TOKENS = 1
settings, stage, done = json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3])
def watch(progress):
    if progress.stage.endswith(stage) and progress.done > done:
        os.kill(os.getpid(), signal.SIGKILL)
evaluate(EvaluateConfig.model_validate(settings), watch)
"""


def without_times(path: Path) -> dict:
    report = json.loads(path.read_text())
    return {name: value for name, value in report.items() if name not in ("created", "config")}


def test_an_evaluation_that_was_killed_several_times_makes_the_same_report(tiny_teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(holdout, "PART_TOKENS", 1)
    table = make_table(tmp_path / "table", tiny_teacher, train=10, held_out=40)
    students = [
        str(make_student(tmp_path / name, tiny_teacher, recorded(table), noise=noise))
        for name, noise in (("one", 0.01), ("two", 0.03), ("three", 0.05))
    ]
    given = {"table": table.location, "students": students, "by": ["document_id"], "device": "cpu", "batch_tokens": 64}
    settings = EvaluateConfig(**given, report=str(tmp_path / "killed"), cost={"measure": False})
    for stage, done in (("one", 100), ("two", 0), ("two", 500), ("three", 500)):
        command = [sys.executable, "-c", _CHILD, settings.completed().model_dump_json(), stage, str(done)]
        assert subprocess.run(command, check=False, timeout=300).returncode == -signal.SIGKILL
        assert not list((tmp_path / "killed").glob("report.*"))
    seen = []
    evaluate(settings, seen.append)
    assert max(each.done for each in seen if each.stage.endswith("one")) == seen[0].done > 0
    assert min(each.done for each in seen if each.stage.endswith("three")) > 0
    evaluate(settings.model_copy(update={"report": str(tmp_path / "whole")}))
    assert without_times(tmp_path / "killed" / "report.json") == without_times(tmp_path / "whole" / "report.json")
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == ["report.html", "report.json"]
