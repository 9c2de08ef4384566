"""A Prefect server that is gone, or does not answer, costs a deployed run neither work nor the report of its end."""

import inspect
import logging
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from uuid import uuid4

import httpx
import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.concurrency import _leases
from prefect.settings import PREFECT_API_URL, temporary_settings

from softlabel.flows import maintain
from softlabel.flows.deploy import deploy
from softlabel.flows.deployments import SHIPPED, DeployConfig, DeploymentConfig, flow_of
from softlabel.flows.maintain import maintain_flow
from softlabel.flows.running import outages
from softlabel.pipeline.config.tables import MaintainConfig
from softlabel.pipeline.tables.maintain import MaintainReport
from softlabel.storage.errors import AccessError
from tests.flows.captures import DOCUMENTS, IMPATIENT, Capture
from tests.flows.servers import Link, answering, closed, prefect_server, wait_until, worker
from tests.flows.test_retries import REPORT, deployed_run, quick

_ = quick


@contextmanager
def hanging() -> Iterator[int]:
    """A port whose connections are accepted, and never answered."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


HANGING = hanging()


@pytest.mark.parametrize(
    ("place", "is_out"),
    [(closed(), True), (HANGING, True), (answering(503), True), (answering(500), True), (answering(401), False)],
    ids=["nothing there", "hangs", "proxy without a server", "no database", "other password"],
)
def test_only_a_server_that_may_answer_later_is_waited_for(place, is_out, monkeypatch: pytest.MonkeyPatch):
    if place is HANGING:  # the others answer, however long that takes on a busy machine
        monkeypatch.setattr(outages, "_SECONDS_FOR_AN_ANSWER", 0.3)
    with place as port, temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{port}/api"}):
        assert bool(outages._outage(uuid4())) is is_out


@pytest.fixture
def outage(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """What the server is found to be, from the end of the work on."""
    found: list[str | None] = ["gone", "gone", None]
    monkeypatch.setattr(outages, "SECONDS_BETWEEN_TRIES", 0.01)
    monkeypatch.setattr(outages, "_outage", lambda _: found.pop(0) if found else None)
    return found


@pytest.mark.usefixtures("prefect")
@pytest.mark.parametrize("fails", [False, True])
def test_the_end_of_a_deployed_run_waits_for_the_server(
    fails: bool, outage: list[str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
):
    left = [AccessError("the store did not answer")] if fails else []

    def work(_: MaintainConfig) -> MaintainReport:
        if left:
            raise left.pop()
        return REPORT

    monkeypatch.setattr(maintain, "maintain", work)
    caplog.set_level(logging.INFO, "softlabel")
    run = deployed_run(tmp_path)
    assert (run.state_name, run.run_count) == ("Completed", 1 + fails)
    assert not outage
    lines = [record.message for record in caplog.records if "Prefect server" in record.message]
    assert [line.partition(" (")[0] for line in lines] == [
        "the work of this run has ended and is kept, but the Prefect server does not answer",
        "the Prefect server answers again, after 0:00:00",
    ]


@pytest.mark.parametrize("deployment", SHIPPED, ids=lambda deployment: deployment.flow)
def test_every_deployed_flow_waits_for_the_server_at_its_end(deployment: DeploymentConfig):
    code = inspect.getsource(inspect.getmodule(flow_of(deployment).fn))
    # A distillation's parts are flows of their own, the last of which waits.
    assert "reported()" in code or deployment.flow == "distill"


@pytest.mark.usefixtures("prefect")
def test_a_server_that_stays_away_is_not_waited_for_for_ever(
    outage: list[str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
):
    monkeypatch.setattr(outages, "HOURS", 0.0)
    monkeypatch.setattr(maintain, "maintain", lambda _: REPORT)
    assert deployed_run(tmp_path).state_name == "Completed"  # since the server of this test is there all the time
    assert "this run ends unreported" in caplog.text


@pytest.mark.usefixtures("prefect")
def test_a_command_waits_for_no_server(outage: list[str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(maintain, "maintain", lambda _: REPORT)
    maintain_flow(MaintainConfig(table=str(tmp_path / "table")))
    assert len(outage) == 3


@pytest.mark.usefixtures("prefect")
def test_a_run_whose_slot_can_not_be_kept_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog):
    refused = Event()

    def refuse(*_: object, **__: object) -> None:
        refused.set()
        raise httpx.ConnectError("the server is gone")

    def work(_: MaintainConfig) -> MaintainReport:
        assert refused.wait(10)
        time.sleep(0.5)  # so long, an end from outside could take
        return REPORT

    monkeypatch.setattr(SyncPrefectClient, "renew_concurrency_lease", refuse)
    monkeypatch.setattr(_leases, "_RENEWAL_MAX_ATTEMPTS", 1)
    monkeypatch.setattr(maintain, "maintain", work)
    assert deployed_run(tmp_path, concurrency_limit=1).state_name == "Completed"
    assert "limits may be exceeded" in caplog.text


@pytest.mark.long
@pytest.mark.parametrize("how", ["killed", "hanging"])
def test_a_capture_goes_on_and_completes_after_an_outage_at_its_end(how: str, tiny_teacher: Path, tmp_path: Path):
    log = tmp_path / "worker.log"
    with prefect_server(tmp_path) as server:
        deploy(DeployConfig())
        capture = Capture(tmp_path, tiny_teacher)
        with worker(log=log, **capture.pace(1.5), **IMPATIENT):
            wait_until(lambda: capture.has(1), seconds=180)
            assert not capture.has(DOCUMENTS)
            server.kill() if how == "killed" else server.process.send_signal(signal.SIGSTOP)
            before = len(capture.rows)
            wait_until(lambda: capture.has(DOCUMENTS), seconds=180)
            assert len(capture.rows) > before
            wait_until(lambda: "waiting for it for up to" in log.read_text(), seconds=60)
            time.sleep(20)  # longer than the client tries
            server.start() if how == "killed" else server.process.send_signal(signal.SIGCONT)
            wait_until(lambda: capture.run.state_name == "Completed", seconds=120)
    assert "the Prefect server answers again" in log.read_text()
    assert capture.is_exact()
    assert capture.read_once


@pytest.mark.long
def test_a_run_that_fails_during_an_outage_is_tried_again_after_it(tiny_teacher: Path, tmp_path: Path):
    log, failure = tmp_path / "worker.log", tmp_path / "fail"
    with prefect_server(tmp_path) as server:
        deploy(DeployConfig())
        capture = Capture(tmp_path, tiny_teacher)
        with worker(log=log, PACED_FAILURE=str(failure), **capture.pace(1.5), **IMPATIENT):
            wait_until(lambda: capture.has(1), seconds=180)
            server.kill()
            failure.touch()
            wait_until(lambda: "waiting for it for up to" in log.read_text(), seconds=60)
            time.sleep(20)
            server.start()
            wait_until(lambda: capture.run.state_name == "Completed", seconds=240)
            assert capture.run.run_count == 2
    assert capture.is_exact()


@pytest.mark.long
def test_a_worker_that_is_stopped_during_an_outage_ends_and_another_one_finishes_its_run(
    tiny_teacher: Path, tmp_path: Path
):
    with prefect_server(tmp_path) as server:
        link = Link(server.url)
        deploy(DeployConfig(heartbeat_seconds=30))
        capture = Capture(tmp_path, tiny_teacher)
        with worker(PREFECT_API_URL=link.url, **capture.pace(2), **IMPATIENT) as stopped:
            wait_until(lambda: capture.has(1), seconds=180)
            capture.hold.touch()
            link.cut()
            stopped.send_signal(signal.SIGTERM)  # what Docker and Kubernetes do, two minutes before they kill
            stopped.wait(120)
        assert not capture.has(DOCUMENTS)
        capture.hold.unlink()
        with worker(**capture.pace(0)):
            wait_until(lambda: capture.run.state_name == "Completed", seconds=400)
    assert capture.is_exact()


@pytest.mark.long
@pytest.mark.parametrize("restarted", [False, True], ids=["network", "server"])
def test_a_run_that_is_taken_for_lost_during_an_outage_is_not_started_twice(
    restarted: bool, tiny_teacher: Path, tmp_path: Path
):
    with prefect_server(tmp_path) as server:
        link = Link(server.url)
        deploy(DeployConfig(heartbeat_seconds=30))
        capture = Capture(tmp_path, tiny_teacher)
        # The worker itself gives up after twelve of its intervals, which get longer.
        environment = {"PREFECT_API_URL": link.url, "PREFECT_WORKER_QUERY_SECONDS": "10"}
        with worker(**environment, **capture.pace(2), **IMPATIENT):
            wait_until(lambda: capture.has(1), seconds=180)
            capture.hold.touch()
            link.cut()
            if restarted:
                server.kill()
                server.start()
            wait_until(lambda: capture.run.state_name == "Lost", seconds=180)
            link.mend()
            if not restarted:  # a restarted server holds back what follows events of five minutes before
                wait_until(lambda: capture.run.state_name == "Running", seconds=60)
            capture.hold.unlink()
            wait_until(lambda: capture.run.state_name == "Completed", seconds=300)
    assert capture.is_exact()
    assert capture.read_once
