"""Without a configured server, what is refused and what is already done ends before Prefect and torch are loaded."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from softlabel.flows.cli import run
from softlabel.flows.running import runner, server
from softlabel.pipeline.capturing.capture import capture
from softlabel.pipeline.config.capture import CaptureConfig
from softlabel.pipeline.training.train import train
from tests.conftest import ROOT
from tests.pipeline.captured import make_table
from tests.pipeline.capturing.test_capture import settings, texts, write
from tests.pipeline.trainings import settings as training

HEAVY = ("torch", "transformers", "prefect", "accelerate", "fastapi", "matplotlib", "scipy", "sympy")
SCRIPT = f"""
import sys
from softlabel.flows.cli import run

code = run(sys.argv[1:])
print("loaded:", *[name for name in {HEAVY} if name in sys.modules])
sys.exit(code)
"""


@pytest.fixture(scope="module")
def captured(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> CaptureConfig:
    folder = tmp_path_factory.mktemp("captured")
    config = settings(tiny_teacher, write(folder / "documents.parquet", texts(10)), folder / "table")
    capture(config)
    return config


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> float:
    """CPU seconds of a command that does nothing, as busy as this machine is."""
    code, _, seconds = in_fresh_process(tmp_path_factory.mktemp("start"), "--help")
    assert code == 0
    return seconds


def again(config: CaptureConfig, **changed: object) -> list[str]:
    """The command line of the same capture, but for the flags that are changed."""
    flags = {
        "documents": config.documents,
        "table": config.table,
        "teacher.model": config.teacher.model,
        "teacher.dtype": config.teacher.dtype,
        "sequences.max-tokens": config.sequences.max_tokens,
        "shards.eval-fraction": config.shards.eval_fraction,
    }
    return ["capture", *(f"--{name}={value}" for name, value in (flags | changed).items())]


def in_fresh_process(home: Path, *arguments: str) -> tuple[int, str, float]:
    """Exit code, all output, and CPU seconds of one command, without a configured server."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        env=os.environ | {"PREFECT_HOME": str(home)},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done.returncode, done.stdout, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_a_capture_with_nothing_to_do_needs_neither_torch_nor_a_server(
    captured: CaptureConfig, start: float, tmp_path: Path
):
    code, shown, seconds = in_fresh_process(tmp_path / "home", *again(captured))
    assert code == 0, shown
    assert "nothing was captured" in shown
    assert shown.endswith("loaded:\n")
    assert seconds < 6 * start
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"selection.top-k": 3}, "selection.max_k: the table has 16, this run 3"),
        pytest.param({"teacher.dtype": "float16"}, "teacher.dtype: the table has", marks=pytest.mark.long),
        pytest.param({"sequences.max-tokens": 64}, "sequences.max_tokens: the table has", marks=pytest.mark.long),
        pytest.param({"columns.text": "nothing"}, "nothing", marks=pytest.mark.long),
        pytest.param({"documents": "nowhere.parquet"}, "there are no documents", marks=pytest.mark.long),
        pytest.param({"teacher.model": "./nowhere"}, "can't find the teacher", marks=pytest.mark.long),
    ],
)
def test_a_refused_capture_needs_neither_torch_nor_a_server(changed, problem, captured, start, tmp_path):
    code, shown, seconds = in_fresh_process(tmp_path / "home", *again(captured, **changed))
    assert code in (1, 2)
    assert problem in shown
    assert shown.endswith("loaded:\n")
    assert seconds < 5 * start
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("verb", ["train", "evaluate", "verify", "maintain", "reprocess", "mix", "estimate", "distill"])
def test_an_input_that_does_not_exist_is_refused_before_a_server_starts(verb, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner, "_run_flow", None)
    monkeypatch.setattr(server, "is_configured", lambda: False)
    monkeypatch.setattr(server, "start", None)
    nowhere = str(tmp_path / "nowhere")
    teacher = ["--teacher.model", nowhere]
    arguments = {
        "train": [nowhere, str(tmp_path / "student"), "--student.depth", "1"],
        "evaluate": [nowhere, str(tmp_path / "student")],
        "mix": [str(tmp_path / "view"), nowhere, nowhere],
        "estimate": [nowhere, *teacher],
        "reprocess": [nowhere, "--selection.max-k", "4"],
        "distill": ["--documents", nowhere, "--table", nowhere, "--output", nowhere, *teacher, "--student.depth", "1"],
    }
    assert run([verb, *arguments.get(verb, [nowhere])]) in (1, 2)
    assert "nowhere" in capsys.readouterr().err


def test_a_finished_student_is_reported_before_a_server_starts(tiny_teacher, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(server, "is_configured", lambda: False)
    monkeypatch.setattr(server, "start", None)
    table = make_table(tmp_path / "table", tiny_teacher, 4, 0)
    config = training(table, tmp_path / "student", optimizer={"max_steps": 1})
    train(config)
    file = tmp_path / "train.yaml"
    file.write_text(config.model_dump_json())  # JSON is YAML
    assert run(["train", "--config", str(file)]) == 0
    assert "was trained already" in capsys.readouterr().out
    assert run(["train", "--config", str(file), "--loss.soft-weight", "0.5"]) == 2
    assert "soft_weight" in capsys.readouterr().err
