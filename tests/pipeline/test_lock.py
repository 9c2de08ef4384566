"""One process at a time: a real second one is refused, and a killed one stands in nobody's way."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config import TrainConfig
from pipeline.lock import alone
from pipeline.training import train
from storage.errors import TrainingError
from tests.conftest import ROOT

HOLD = """
import sys
from pathlib import Path
from pipeline.lock import alone
with alone(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_process_trains_a_student(tmp_path: Path):
    config = TrainConfig(table="nowhere", output=str(tmp_path / "student"), optimiser={"device": "cpu"})
    held = [sys.executable, "-c", HOLD, config.output]
    with subprocess.Popen(held, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "held\n"
            with pytest.raises(TrainingError, match=rf"another process trains(.|\n)*process {other.pid} of "):
                train(config)
        finally:
            other.kill()
    assert (tmp_path / "student.lock").exists()
    with alone(tmp_path / "student"), pytest.raises(TrainingError), alone(tmp_path / "student"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_place_that_can_not_be_locked_is_nobodys_error(tmp_path: Path):
    (tmp_path / "file").touch()
    with alone(tmp_path / "file" / "student"):
        pass
