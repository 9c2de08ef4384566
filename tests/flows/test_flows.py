"""The flows on a real Prefect server with a tiny teacher, as the command line runs them."""

import os
import re
import subprocess
import sys
from base64 import b64decode
from dataclasses import replace
from pathlib import Path
from xml.etree.ElementTree import fromstring

import pytest
import yaml
from prefect.settings import get_current_settings

from softlabel.flows.cli import run
from softlabel.flows.evaluate import evaluate_flow, show_report
from softlabel.pipeline.config.evaluate import EvaluateConfig
from softlabel.pipeline.evaluation.tasks import TaskScore
from softlabel.pipeline.training.train import train
from tests.flows.commands import softlabel
from tests.pipeline.captured import make_table
from tests.pipeline.hostile import hostile
from tests.pipeline.trainings import settings

FLOWS = ("capture", "estimate", "train", "evaluate", "compare", "distill", "verify", "maintain", "reprocess", "mix")


@pytest.fixture
def small(tmp_path: Path, tiny_teacher: Path, documents: Path) -> Path:
    """A YAML file that distils the tiny teacher in seconds."""
    values = {
        "documents": str(documents),
        "table": str(tmp_path / "table"),
        "output": str(tmp_path / "runs"),
        "teacher": {"model": str(tiny_teacher), "dtype": "float32"},
        "sequences": {"max_tokens": 128},
        "shards": {"positions": 8000, "eval_fraction": 0.2},
        "student": {"layers": [0]},
        "stream": {"max_length": 128, "batch_size": 4, "micro_batch_size": 4},
        "optimizer": {"max_steps": 2, "device": "cpu"},
        "cost": {"measure": False},
    }
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


@pytest.mark.parametrize("name", FLOWS)
def test_every_parameter_in_prefects_forms_has_a_description(name: str):
    from importlib import import_module

    from prefect.utilities.callables import parameter_schema

    schema = parameter_schema(getattr(import_module(f"softlabel.flows.{name}"), f"{name}_flow")).model_dump()
    assert list(schema["properties"]) == ["config"]
    fields = [field for part in schema["definitions"].values() for field in part["properties"].items()]
    assert not [name for name, field in fields if not field.get("description") and "$ref" not in field]
    assert not [name for name, field in fields if field.get("additionalProperties")]
    # In the settings' order, also after PostgreSQL has sorted them; with nothing filled in, as left out is left out.
    assert all("default" not in field for _, field in fields)
    for part in schema["definitions"].values():
        assert [field["position"] for field in part["properties"].values()] == list(range(len(part["properties"])))


@pytest.mark.usefixtures("prefect")
def test_distilling_again_from_the_same_file_does_nothing(small: Path, capsys: pytest.CaptureFixture[str]):
    code, result, err = softlabel(capsys, "distill", "--config", str(small))
    assert code == 0
    assert result["capture"]["positions"] > 10_000
    assert {name: report["steps_trained"] for name, report in result["train"].items()} == {"student": 2, "control": 2}
    assert [score["name"] for score in result["evaluate"]["students"]] == ["student", "control"]
    assert Path(result["evaluate"]["html"]).is_file()
    assert "Traceback" not in err
    assert "positions" in err

    assert {"capture-progress": "progress", "students": "table", "report": "markdown"}.items() <= artifacts().items()
    assert report_shows_pictures_and_scores()
    table, student = small.parent / "table", small.parent / "runs" / "student"
    runs = {f"distill {table}", f"capture {table}", f"plan {table}", f"capture 000000 {table}", f"train {student}"}
    assert runs <= names_of_runs()

    assert run(["distill", "--config", str(small)]) == 0
    assert share_done("capture-progress") == 100.0
    shown = capsys.readouterr().out
    assert "nothing was captured" in shown
    assert shown.count("was trained already") == 2
    assert "top-1 agreement" in shown
    assert shown.count("  softlabel ") == 3

    for verb in ("inspect", "history"):
        code, report, _ = softlabel(capsys, verb, "--config", str(small))
        assert code == 0
        assert isinstance(report, dict)
        assert run([verb, "--config", str(small)]) == 0
        assert "positions" in capsys.readouterr().out


def report_shows_pictures_and_scores() -> bool:
    """Whether the newest report artifact holds the report itself: the UI drops links to files."""
    text = newest_report()
    for image in re.findall(r"!\[.*?\]\(data:image/svg\+xml;base64,(.*?)\)", text):
        drawing = b64decode(image).decode()
        assert "var(" not in drawing
        assert fromstring(drawing).tag == "{http://www.w3.org/2000/svg}svg"
    return "![KL to the teacher" in text and "| student |" in text and "| control |" in text


@pytest.mark.usefixtures("prefect")
def test_names_of_students_and_tasks_can_not_write_markdown_into_the_report(tiny_teacher: Path, tmp_path: Path):
    table = make_table(tmp_path / "table", tiny_teacher, train=4, held_out=4)
    name = "<img src=x>|`*[a](http:b)\n# ±"
    train(settings(table, tmp_path / name.replace("/", ""), optimizer={"max_steps": 1}))
    student = str(tmp_path / name.replace("/", ""))
    report = evaluate_flow(EvaluateConfig(table=table.location, students=(student,), report=str(tmp_path / "report")))
    task = TaskScore(name, name, 0.5, None, 3, 0, True)
    show_report(replace(report, students=tuple(replace(each, tasks=(task,)) for each in report.students)))
    shown, *_ = newest_report().partition("On ")
    assert "&" not in shown  # the UI shows an entity as it is written
    scores = re.sub(r"\\.", "", shown)  # a sign after a backslash stands for itself
    assert not set("<>`*[]") & set(scores.replace("**", ""))
    verdict, *tables = scores.strip().split("\n\n")
    assert verdict.count("\n") == 0
    assert len(tables) == 2
    for table_of_scores in tables:
        assert len({line.count("|") for line in table_of_scores.splitlines()}) == 1


def newest_report() -> str:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        reports = [each for each in client.read_artifacts() if each.key == "report"]
        return str(max(reports, key=lambda each: each.created).data)


def names_of_runs() -> set[str]:
    """Names of all flow runs and task runs."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        return {each.name for each in (*client.read_flow_runs(), *client.read_task_runs())}


def share_done(key: str) -> float:
    """Percentage in the newest progress artifact with that key."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        newest = max((each for each in client.read_artifacts() if each.key == key), key=lambda each: each.created)
        return float(newest.data)


def artifacts() -> dict[str, str]:
    """Type of each artifact by its key."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        return {artifact.key: artifact.type for artifact in client.read_artifacts()}


@pytest.mark.usefixtures("prefect")
@pytest.mark.parametrize(
    ("arguments", "code", "kind"),
    [
        (["--teacher.model", "nowhere/at-all"], 1, "TeacherError"),
        (["--documents", "nowhere.parquet"], 2, "UsageError"),
        (["--documents", "broken.parquet"], 1, "DocumentsError"),
        (["--columns.text", "txet"], 2, "UsageError"),
        (["--student.model", "one-too-many"], 2, "UsageError"),
        (["--student.teacher", "nowhere/either"], 1, "StudentError"),
        (["--student.layers", "2"], 2, "UsageError"),
        (["--loss.temperature", "7"], 2, "UsageError"),
    ],
)
def test_an_error_of_the_input_fits_on_one_screen(
    small: Path,
    arguments: list[str],
    code: int,
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    Path("broken.parquet").write_bytes(b"PAR1 and nothing else")
    failed, error, err = softlabel(capsys, "distill", "--config", str(small), *arguments)
    assert (failed, error["error"]) == (code, kind)
    assert arguments[0].strip("-") in error["message"] or arguments[1] in error["message"]
    assert not (tmp_path / "table").exists()
    assert err.count(error["message"]) == 1
    assert "Traceback" not in err
    assert len(error["message"].splitlines()) < 24


@pytest.mark.usefixtures("prefect")
def test_empty_documents_are_an_error_and_leave_no_table(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    code, error, _ = softlabel(capsys, "distill", "--config", str(small), "--documents", str(empty))
    assert (code, error["error"]) == (1, "DocumentsError")
    assert not (tmp_path / "table").exists()


@pytest.mark.long
@pytest.mark.usefixtures("prefect")
def test_a_yes_on_standard_input_runs_no_code(tiny_teacher: Path, tmp_path: Path):
    """Scripts may answer yes to any question."""
    table = make_table(tmp_path / "table", tiny_teacher, 4, 0)
    student = hostile(tmp_path / "from", tiny_teacher, "tokenizer", tmp_path / "ran")
    command = [Path(sys.executable).with_name("softlabel"), "train", table.location, tmp_path / "student"]
    done = subprocess.run(
        [*command, "--student.model", student],
        env=os.environ | {"PREFECT_API_URL": str(get_current_settings().api.url)},
        input="y\n" * 9,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert not (tmp_path / "ran").exists()
    assert "[y/N]" not in done.stdout + done.stderr
    assert "the student's tokenizer can't be loaded" in done.stderr
    assert "trust_remote_code" not in done.stderr
