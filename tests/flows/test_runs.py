"""Whatever a flow writes names the Prefect run that wrote it; what is written without Prefect names none."""

import inspect
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from prefect import Flow
from prefect.context import _deployment_id

from softlabel.flows.capture import capture_flow
from softlabel.flows.evaluate import with_lasting_report
from softlabel.flows.maintain import maintain_flow
from softlabel.flows.mix import mix_flow
from softlabel.flows.reprocess import reprocess_flow
from softlabel.flows.running.runs import recorded
from softlabel.flows.train import train_flow
from softlabel.flows.verify import verify_flow
from softlabel.pipeline.capturing.capture import capture
from softlabel.pipeline.config.capture import CaptureConfig
from softlabel.pipeline.config.evaluate import CompareConfig, EvaluateConfig
from softlabel.pipeline.config.tables import MaintainConfig, MixConfig, ReprocessConfig, VerifyConfig
from softlabel.pipeline.students.record import RECORD, StudentRecord, read_record
from softlabel.storage.errors import UsageError
from softlabel.storage.places.open import place_of
from softlabel.storage.records.versions import pins, tags
from softlabel.storage.table import Table
from softlabel.storage.upkeep.inspection import history
from softlabel.storage.views.view import read_definition
from tests.pipeline.capturing.test_capture import settings, texts, write
from tests.pipeline.trainings import settings as training


@pytest.fixture
def config(tiny_teacher: Path, tmp_path: Path) -> CaptureConfig:
    """A capture by two worker processes, of which one document is a copy of another."""
    documents = texts(24)
    documents["a copy"] = next(iter(documents.values()))
    shards = {"positions": 300, "eval_fraction": 0.2, "row_group_sequences": 8}
    config = settings(tiny_teacher, write(tmp_path / "d.parquet", documents), tmp_path / "table", shards=shards)
    teacher = config.teacher.model_copy(update={"device": "cpu", "workers": 2})
    return config.model_copy(update={"teacher": teacher})


def alone(config: CaptureConfig) -> CaptureConfig:
    """The same capture by this process."""
    return config.model_copy(update={"teacher": config.teacher.model_copy(update={"workers": 1})})


def run_of(flow: Flow[..., Any], config: object) -> str:
    """Run a flow; returns the server's id of the run."""
    state = flow(config, return_state=True)
    state.result()
    return str(state.state_details.flow_run_id)


def writers(location: str) -> list[tuple[str | None, str | None]]:
    """Run and flow of each commit, oldest first."""
    return [(entry.run, entry.flow) for entry in reversed(history(Table.open(location)))]


@pytest.mark.usefixtures("prefect")
def test_commits_and_tags_name_the_run_that_wrote_them(config: CaptureConfig):
    captured = run_of(capture_flow, alone(config))
    tagged = run_of(maintain_flow, MaintainConfig(table=config.table, tag="gold"))
    assert {*writers(config.table)} == {(captured, "capture")}
    assert tags(config.table)["gold"].run == tagged != captured


@pytest.mark.long
@pytest.mark.usefixtures("prefect")
def test_every_commit_record_and_student_names_the_run_that_wrote_it(config: CaptureConfig, tmp_path: Path):
    """Workers of a capture and ranks of a training are processes of their own."""
    table = config.table
    captured = run_of(capture_flow, config)
    assert len(writers(table)) > 3
    assert {*writers(table)} == {(captured, "capture")}

    def adds(flow: Flow[..., Any], config: object) -> bool:
        known = len(writers(table))
        run = run_of(flow, config)
        return {found for found, _ in writers(table)[known:]} == {run}

    (tmp_path / "ids").write_text("a copy\n")
    assert adds(reprocess_flow, ReprocessConfig(source=table, where="document_id <> 'x' AND tokens > 30"))
    assert adds(reprocess_flow, ReprocessConfig(source=table, purge=str(tmp_path / "ids")))
    shard = Path(table, Table.open(table).shards()[0].path)
    shard.write_bytes(b"damaged" + shard.read_bytes()[7:])
    assert adds(verify_flow, VerifyConfig(table=table, remove_damaged=True))
    made = run_of(reprocess_flow, ReprocessConfig(source=table, destination=str(tmp_path / "other")))
    assert {*writers(str(tmp_path / "other"))} == {(made, "reprocess")}

    tagged = run_of(maintain_flow, MaintainConfig(table=table, tag="gold"))
    assert tags(table)["gold"].run == tagged
    mixed = run_of(mix_flow, MixConfig(view=str(tmp_path / "view"), tables=(table, str(tmp_path / "other"))))
    assert read_definition(place_of(str(tmp_path / "view"))).run == mixed
    assert [pin.run for pin in pins(table)] == [mixed]

    optimizer = {"max_steps": 1, "processes": 2, "report_to": []}
    student = training(Table.open(table), tmp_path / "student", stream={"max_length": 128}, optimizer=optimizer)
    trained = run_of(train_flow, student)
    record = read_record(tmp_path / "student" / RECORD, StudentRecord)
    assert [run.circumstances["run"] for run in record.runs] == [trained]
    assert record.circumstances["flow"] == "train"
    assert {pin.run for pin in pins(table)} == {mixed, trained}


@pytest.fixture
def deployed() -> Iterator[None]:
    """As in a run of a deployment."""
    token = _deployment_id.set(uuid4())
    yield
    _deployment_id.reset(token)


@pytest.mark.usefixtures("deployed")
@pytest.mark.parametrize("location", ["table", "./students/{version}", "wiki@3", "data/s3:"])
def test_a_run_of_a_deployment_writes_nothing_to_its_working_folder_which_is_deleted(location: str):
    with pytest.raises(UsageError, match="working folder is deleted") as error, recorded(output=location):
        pass
    assert f"output: {location}" in str(error.value)


@pytest.mark.usefixtures("deployed")
@pytest.mark.parametrize("location", ["/data/table", "s3://bucket/table", "/students/{version}", None])
def test_a_run_of_a_deployment_writes_to_full_locations(location: str | None):
    with recorded(output=location):
        pass


WRITTEN = {"capture": "table", "train": "output", "mix": "view", "reprocess": "destination", "evaluate": "report"}


@pytest.mark.parametrize(("flow", "name"), [*WRITTEN.items(), ("compare", "report"), ("distill", "table")])
def test_every_flow_that_makes_something_checks_where(flow: str, name: str):
    assert f"recorded({name}=config.{name}" in inspect.getsource(import_module(f"softlabel.flows.{flow}"))


@pytest.mark.parametrize("kind", [EvaluateConfig, CompareConfig])
def test_the_report_of_a_deployed_run_lasts(kind: type[EvaluateConfig], deployed: None):
    config = kind(table="/data/table", students=("/data/students/a", "hub/name"))
    assert with_lasting_report(config).report == f"/data/students/{config.report}"
    given = config.model_validate(config.model_dump(exclude_unset=True) | {"report": "/reports/a"})
    assert with_lasting_report(given).report == "/reports/a"


def test_without_prefect_no_run_is_recorded(config: CaptureConfig):
    capture(alone(config))
    assert {*writers(config.table)} == {(None, None)}
    commits = Path(config.table, "_delta_log").glob("*.json")
    assert all('"run"' not in commit.read_text() for commit in commits)
