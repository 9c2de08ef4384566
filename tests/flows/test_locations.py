"""Locations in settings, on the command line and on Prefect's server: no credentials, and ``~`` is expanded."""

import json
import os
import subprocess
import sys
from importlib import import_module
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from softlabel.flows.arguments import resolve
from softlabel.flows.cli import run
from softlabel.flows.train import train_flow
from softlabel.pipeline.capturing.capture import capture
from softlabel.pipeline.config.base import Settings
from softlabel.pipeline.config.capture import CaptureConfig, TeacherConfig
from softlabel.pipeline.config.distill import DistillConfig
from softlabel.pipeline.config.estimate import EstimateConfig
from softlabel.pipeline.config.evaluate import EvaluateConfig
from softlabel.pipeline.config.tables import MaintainConfig, MixConfig, ReprocessConfig, VerifyConfig
from softlabel.pipeline.config.train import StudentConfig, TrainConfig
from softlabel.pipeline.training.train import train
from softlabel.storage.errors import UsageError
from tests.conftest import ROOT
from tests.flows.commands import softlabel
from tests.pipeline.captured import make_table
from tests.pipeline.capturing.test_capture import settings, texts, write
from tests.storage.test_location import HOLDING, SECRET

TEACHER = {"model": "m"}
CAPTURE = {"documents": "d", "table": "t", "teacher": TEACHER}
LOCATIONS: list[tuple[type[Settings], dict[str, Any], tuple[str, ...]]] = [
    (TeacherConfig, TEACHER, ("model", "adapter")),
    (StudentConfig, {}, ("model", "teacher", "config")),
    (CaptureConfig, CAPTURE, ("documents", "table")),
    (EstimateConfig, CAPTURE, ("documents", "table")),
    (DistillConfig, {**CAPTURE, "output": "o", "student": {"depth": 1}}, ("documents", "table", "output")),
    (TrainConfig, {"table": "t", "output": "o"}, ("table", "output")),
    (EvaluateConfig, {"table": "t", "students": ["s"]}, ("table", "students", "report")),
    (VerifyConfig, {"table": "t"}, ("table",)),
    (MaintainConfig, {"table": "t"}, ("table", "unpin")),
    (MixConfig, {"view": "v", "tables": ["a", "b"]}, ("view", "tables")),
    (ReprocessConfig, {"source": "s", "destination": "d"}, ("source", "destination", "drop", "stale")),
    (ReprocessConfig, {"source": "s"}, ("purge",)),
]
EACH = [(model, given, name) for model, given, names in LOCATIONS for name in names]


def with_location(given: dict[str, Any], name: str, location: str) -> dict[str, Any]:
    return given | {name: ["first", location] if name in ("tables", "students") else location}


@pytest.mark.parametrize(("model", "given", "name"), EACH)
def test_no_setting_accepts_credentials(model: type[Settings], given: dict[str, Any], name: str, tmp_path: Path):
    for location in HOLDING:
        values = with_location(given, name, location)
        with pytest.raises(ValidationError, match="AWS_ACCESS_KEY_ID") as invalid:
            model.model_validate(values)
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(values))
        with pytest.raises(UsageError, match="AWS_ACCESS_KEY_ID") as from_a_file:
            resolve(model, {}, file)
        with pytest.raises(UsageError, match="AWS_ACCESS_KEY_ID") as from_a_flag:
            resolve(model, {(key,): value for key, value in values.items()}, None)
        for error in (invalid, from_a_file, from_a_flag):
            assert SECRET not in str(error.value)


@pytest.mark.parametrize(("model", "given", "name"), EACH)
def test_every_location_expands_home(model: type[Settings], given: dict[str, Any], name: str, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    for written, meant in {"~/x/*.txt": "/home/somebody/x/*.txt", "~/t@3": "/home/somebody/t@3"}.items():
        found = getattr(model.model_validate(with_location(given, name, written)), name)
        assert (found[-1] if isinstance(found, tuple) else found) == meant
    with pytest.raises(ValidationError, match="does not know"):
        model.model_validate(with_location(given, name, "~nobody-of-this-name/x"))


@pytest.mark.parametrize(
    "text",
    [
        "table: [LOCATION]",
        "table: {where: LOCATION}",
        "table: {LOCATION: 1}",
        "LOCATION: 1",
        "teacher: LOCATION",
        "teacher: {dtype: LOCATION}",
        "teacher: {workers: LOCATION}",
        "columns: {carry: LOCATION}",
        "table: LOCATION: x",
        "table: 'LOCATION",
        "LOCATION: 1\nLOCATION: 2",
    ],
)
@pytest.mark.parametrize("location", [HOLDING[0], HOLDING[7], HOLDING[19]])
def test_an_error_in_a_file_does_not_show_credentials(text: str, location: str, tmp_path: Path):
    (tmp_path / "run.yaml").write_text(text.replace("LOCATION", location))
    with pytest.raises(UsageError) as error:
        resolve(CaptureConfig, {}, tmp_path / "run.yaml")
    assert SECRET not in str(error.value)


@pytest.mark.parametrize("location", HOLDING)
@pytest.mark.parametrize(
    "arguments",
    [
        *(["inspect", "LOCATION"], ["history", "LOCATION"], ["inspect", "--config", "LOCATION"]),
        ["capture", "LOCATION", "t", "--teacher.model", "m"],
        ["capture", "d", "LOCATION", "--teacher.model", "m"],
        ["capture", "d", "t", "--teacher.model", "LOCATION"],
        ["capture", "d", "t", "x", "LOCATION", "--teacher.model", "m"],
        ["capture", "d", "t", "--tabel", "LOCATION"],
        ["train", "t", "o", "--optimizer.num_train_epochs", "LOCATION"],
        ["mix", "v", "a", "LOCATION"],
        ["LOCATION"],
    ],
)
def test_the_command_line_never_shows_credentials(
    arguments: list[str], location: str, capsys: pytest.CaptureFixture[str], monkeypatch, tmp_path: Path
):
    monkeypatch.chdir(tmp_path)
    for more in ([], ["--json"]):
        assert run([*(argument.replace("LOCATION", location) for argument in arguments), *more]) == 2
        assert SECRET not in "".join(capsys.readouterr())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", ["capture", "train", "evaluate", "distill", "estimate", "verify", "maintain", "mix"])
def test_every_flows_schema_excludes_credentials_in_locations(verb: str):
    from prefect.utilities.callables import parameter_schema

    schema = parameter_schema(getattr(import_module(f"softlabel.flows.{verb}"), f"{verb}_flow")).model_dump_json()
    assert json.loads(schema)["definitions"]
    assert schema.count('"pattern":"^(?!') > 0


@pytest.mark.usefixtures("prefect")
def test_prefects_server_stores_no_run_with_credentials():
    from prefect.client.orchestration import get_client
    from prefect.exceptions import PrefectHTTPStatusError
    from prefect.utilities.callables import parameter_schema

    config = {"table": "t", "output": "o", "student": {"model": "m"}}
    with get_client(sync_client=True) as client:
        schema = parameter_schema(train_flow).model_dump_for_openapi()
        flow = client.create_flow(train_flow)
        deployment = client.create_deployment(
            flow, "locations", parameter_openapi_schema=schema, enforce_parameter_schema=True
        )
        client.create_flow_run_from_deployment(deployment, parameters={"config": config})
        wrong = cycle([lambda at: {"table": at}, lambda at: {"output": at}, lambda at: {"student": {"model": at}}])
        for location in HOLDING:
            with pytest.raises(PrefectHTTPStatusError):
                client.create_flow_run_from_deployment(
                    deployment, parameters={"config": config | next(wrong)(location)}
                )
        assert not any(SECRET in run.model_dump_json() for run in client.read_flow_runs(limit=200))


def test_a_capture_with_home_paths_writes_only_into_home(home: Path, tiny_teacher: Path):
    (home / "docs").mkdir()
    (home / "teacher").symlink_to(tiny_teacher)
    write(home / "docs" / "a.parquet", texts(8))
    report = capture(settings(Path("~/teacher"), Path("~/docs/*.parquet"), Path("~/t")))
    assert (report.table, report.documents, report.rejects) == (str(home / "t"), 8, 0)
    assert (home / "t" / "_softlabel").is_dir()
    assert (home / "t" / "_delta_log").is_dir()
    assert capture(settings(Path("~/teacher"), home / "docs", home / "t")).unchanged == 8
    assert not list(Path().iterdir())


def test_a_table_in_home_is_found_by_argument_version_and_file(home: Path, tiny_teacher: Path, capsys):
    make_table(home / "t", tiny_teacher, train=8, held_out=0)
    (home / "run.yaml").write_text("table: ~/t@0")
    for arguments, version in {("~/t",): 1, ("~/t@0",): 0, ("--config", "~/run.yaml"): 0}.items():
        code, shown, _ = softlabel(capsys, "inspect", *arguments)
        assert (code, shown["inspection"]["version"], shown["inspection"]["location"]) == (0, version, str(home / "t"))
    assert [entry["version"] for entry in softlabel(capsys, "history", "~/t")[1]["versions"]] == [1, 0]
    assert not list(Path().iterdir())


def test_a_student_in_home_is_trained_and_found_again(home: Path, tiny_teacher: Path):
    make_table(home / "t", tiny_teacher, train=8, held_out=0)
    (home / "teacher").symlink_to(tiny_teacher)
    optimizer = {"device": "cpu", "max_steps": 1}
    config = {"table": "~/t@1", "output": "~/student", "student": {"model": "~/teacher"}, "optimizer": optimizer}
    assert train(TrainConfig.model_validate(config)).steps_trained == 1
    assert (home / "student" / "softlabel.json").is_file()
    assert train(TrainConfig.model_validate(config)).steps_trained == 0
    assert not list(Path().iterdir())


def test_credentials_are_refused_before_anything_starts(tmp_path: Path):
    command = [sys.executable, "-m", "softlabel.flows.cli", "maintain", HOLDING[0], "--json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PREFECT_HOME": str(tmp_path / "prefect")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert SECRET not in done.stdout + done.stderr
    assert "AWS_SECRET_ACCESS_KEY" in done.stderr
    assert not list(tmp_path.iterdir())
