"""A deployed run is tried again for an error that may pass, and only then."""

from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.flow_engine import run_flow
from prefect.states import Pending

from softlabel.flows import maintain
from softlabel.flows.maintain import maintain_flow
from softlabel.flows.running import retries
from softlabel.pipeline.config.tables import MaintainConfig
from softlabel.pipeline.tables.maintain import MaintainReport
from softlabel.storage.errors import AccessError, IntegrityError, SoftlabelError, UsageError, WorkerError

REPORT = MaintainReport("table", None, [], [])

pytestmark = pytest.mark.usefixtures("prefect")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "SECONDS_BEFORE_RETRY", (1, 1))


def deployed_run(tmp_path: Path, **settings: Any) -> FlowRun:
    """Execute one run of a deployment with these settings, as a worker does, and return how it ended."""
    config = MaintainConfig(table=str(tmp_path / "table"))
    parameters = {"config": config.model_dump(mode="json")}
    with get_client(sync_client=True) as client:
        deployment = client.create_deployment(client.create_flow(maintain_flow), "retried", **settings)
        run = client.create_flow_run_from_deployment(deployment, parameters=parameters)
        client.set_flow_run_state(run.id, Pending())
        run = client.read_flow_run(run.id)
        run_flow(maintain_flow, flow_run=run, parameters={"config": config}, return_type="state")
        return client.read_flow_run(run.id)


@pytest.mark.parametrize("error", [AccessError, pytest.param(WorkerError, marks=pytest.mark.long)])
def test_an_error_that_passes_is_survived(error: type[SoftlabelError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    left = [error("the store did not answer"), error("the store did not answer")]

    def flaky(_: MaintainConfig) -> MaintainReport:
        if left:
            raise left.pop()
        return REPORT

    monkeypatch.setattr(maintain, "maintain", flaky)
    run = deployed_run(tmp_path)
    assert (run.state_name, run.run_count) == ("Completed", 3)


def failing(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: MaintainConfig) -> MaintainReport:
        raise error

    monkeypatch.setattr(maintain, "maintain", fail)


def test_an_error_that_stays_ends_the_run_after_two_retries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    failing(AccessError("the store did not answer"), monkeypatch)
    run = deployed_run(tmp_path)
    assert (run.state_name, run.run_count) == ("Failed", 3)


@pytest.mark.parametrize("error", [UsageError("no"), IntegrityError("damaged"), RuntimeError("a bug")])
def test_an_error_that_would_come_back_ends_the_run_at_once(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    failing(error, monkeypatch)
    run = deployed_run(tmp_path)
    assert (run.state_name, run.run_count) == ("Failed", 1)


def test_a_run_of_the_command_line_is_never_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[MaintainConfig] = []

    def fail(config: MaintainConfig) -> MaintainReport:
        calls.append(config)
        raise AccessError("the store did not answer")

    monkeypatch.setattr(maintain, "maintain", fail)
    with pytest.raises(AccessError):
        maintain_flow(MaintainConfig(table=str(tmp_path / "table")))
    assert len(calls) == 1
