"""Deployed flows for real: several at once, with workers and servers that die, and the limits of a deployment."""

import json
import os
import signal
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client

from softlabel.flows.deploy import deploy
from softlabel.flows.deployments import DeployConfig, DeploymentConfig
from tests.flows.captures import DOCUMENTS, Capture
from tests.flows.servers import POSTGRES, postgresql, prefect_server, wait_until, worker
from tests.listening import family
from tests.pipeline.captured import make_table
from tests.pipeline.capturing.test_worker_pool import gone
from tests.pipeline.trainings import settings

pytestmark = pytest.mark.long

LEASES = "prefect.server.concurrency.lease_storage.filesystem"
"""As in docker/compose.yaml: with Prefect's default, a restart of the server leaves slots occupied."""


@pytest.mark.skipif(not POSTGRES, reason="PostgreSQL is not installed")
def test_four_flows_at_once_survive_a_killed_worker_and_a_restarted_server(tiny_teacher: Path, tmp_path: Path):
    """Two captures of overlapping documents into one table, one into another, and a training; each on a worker."""
    half = DOCUMENTS // 2
    trained = make_table(tmp_path / "trained", tiny_teacher, held_out=0)
    config = settings(trained, tmp_path / "student", optimizer={"max_steps": 300, "save_steps": 10})
    with (
        postgresql() as url,
        prefect_server(tmp_path, PREFECT_SERVER_DATABASE_CONNECTION_URL=url) as server,
        ExitStack() as stack,
        get_client(sync_client=True) as client,
    ):
        # After a restart, Prefect's server holds events back for a quarter of an hour that follow others, of before the
        # restart, within five minutes; so a run is lost only after more than that.
        deploy(DeployConfig(heartbeat_seconds=105))
        captures = [
            Capture(tmp_path, tiny_teacher),
            Capture(tmp_path, tiny_teacher, first=half),
            Capture(tmp_path, tiny_teacher, table="other", workers=2),
        ]
        train = client.read_deployment_by_name("train/softlabel")
        parameters = {"config": config.model_dump(mode="json")}
        training = client.create_flow_run_from_deployment(train.id, parameters=parameters)
        runs = [*(capture.id for capture in captures), training.id]

        def states() -> list[str | None]:
            return [client.read_flow_run(run).state_name for run in runs]

        pace = captures[0].pace(1.5)
        workers = [stack.enter_context(worker("--limit", "1", **pace)) for _ in range(4)]
        wait_until(lambda: states() == ["Running"] * 4, seconds=240)
        wait_until(lambda: captures[0].has(1) and captures[2].has(1), seconds=120)
        for process in family(workers[0].pid):
            os.kill(process, signal.SIGKILL)
        stack.enter_context(worker("--limit", "1", **pace))
        time.sleep(5)
        server.kill()
        time.sleep(15)
        server.start()
        wait_until(lambda: states() == ["Completed"] * 4, seconds=900)
    assert captures[0].is_exact(DOCUMENTS + half)
    assert captures[2].is_exact()
    assert json.loads((tmp_path / "student" / "softlabel.json").read_text())["step"] == 300


def test_a_run_that_exceeds_its_time_limit_is_cancelled_and_keeps_what_it_has_done(tiny_teacher: Path, tmp_path: Path):
    limited = DeploymentConfig(flow="capture", name="limited", time_limit_hours=90 / 3600, concurrency_limit=1)
    with prefect_server(tmp_path):
        deploy(DeployConfig(deployments=(limited,)))
        capture = Capture(tmp_path, tiny_teacher, workers=2, deployment="limited")
        with worker(**capture.pace(2)) as process:
            wait_until(lambda: capture.has(1), seconds=180)
            capture.hold.touch()
            children = [each for each in family(process.pid) if each != process.pid]
            assert len(children) > 2
            after = Capture(tmp_path, tiny_teacher, table="after", deployment="limited")
            wait_until(lambda: capture.run.state_name == "Cancelled", seconds=180)
            wait_until(lambda: all(map(gone, children)), seconds=30)
            capture.hold.unlink()
            wait_until(lambda: after.run.state_name == "Completed", seconds=180)  # in the slot of the first
    assert 0 < len(capture.rows) < DOCUMENTS
    assert set(capture.rows.values()) == {1}
    assert after.is_exact()


def test_runs_beyond_the_concurrency_limit_wait_for_their_turn_also_after_the_server_was_killed(
    tiny_teacher: Path, tmp_path: Path
):
    limited = DeploymentConfig(flow="capture", name="limited", concurrency_limit=1)
    with prefect_server(tmp_path, PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE=LEASES) as server:
        deploy(DeployConfig(deployments=(limited,)))
        captures = [
            Capture(tmp_path, tiny_teacher, table=name, deployment="limited") for name in ("one", "two", "three")
        ]
        with worker(**captures[0].pace(0.5)):
            together: list[int] = []

            def over() -> bool:
                names = [capture.run.state_name for capture in captures]
                together.append(names.count("Running"))
                return names == ["Completed"] * 3

            wait_until(lambda: over() or any(capture.has(1) for capture in captures), seconds=180)
            assert together[-1] == 1  # it holds the slot
            server.kill()
            server.start()
            wait_until(over, seconds=600)
    assert max(together) == 1
    assert all(capture.is_exact() for capture in captures)
