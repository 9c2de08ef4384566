"""A real Prefect process worker on the shipped deployments: how a training ends that is killed or cancelled."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from softlabel.flows.deploy import deploy
from softlabel.flows.deployments import DeployConfig
from softlabel.pipeline.students.folder import newest_checkpoint
from tests.flows.captures import DOCUMENTS, Capture
from tests.flows.servers import prefect_server, wait_until, worker
from tests.pipeline.captured import make_table
from tests.pipeline.trainings import processes_of, settings

CONFIGURED_BEFORE = """
import prefect.main  # as in the process in which a worker runs a flow
import logging, softlabel.flows.capture

print(*(type(handler).__name__ for handler in logging.getLogger("softlabel").handlers))
"""


def test_a_workers_log_lines_reach_the_server():
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_LOGGING_EXTRA_LOGGERS"}
    command = [sys.executable, "-c", CONFIGURED_BEFORE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["APILogHandler"]


@pytest.mark.long
@pytest.mark.usefixtures("prefect")
def test_no_rank_outlives_a_killed_worker_and_its_flow(tiny_teacher: Path, tmp_path: Path):
    table = make_table(tmp_path / "table", tiny_teacher, held_out=0)
    config = settings(table, tmp_path / "student", optimizer={"processes": 2, "max_steps": 100_000, "save_steps": 1})
    process = start_worker({"config": config.model_dump(mode="json")})
    try:
        wait_until(lambda: any((tmp_path / "student.training").glob("checkpoint-*")), seconds=120)
        ranks = processes_of(tmp_path)
        assert len(ranks) == 2
        (flow,) = {parent(process) for process in ranks}
    finally:
        process.kill()
    os.kill(flow, signal.SIGKILL)
    wait_until(lambda: not processes_of(tmp_path), seconds=60)
    process.wait()


@pytest.mark.long
@pytest.mark.usefixtures("prefect")
def test_a_cancelled_training_saves_its_last_step_and_ends_as_cancelled(tiny_teacher: Path, tmp_path: Path):
    from prefect.client.orchestration import get_client
    from prefect.states import Cancelling, State

    table = make_table(tmp_path / "table", tiny_teacher, held_out=0)
    endless = {"processes": 2, "max_steps": 100_000, "save_steps": 100_000}
    config = settings(table, tmp_path / "student", optimizer=endless)
    process = start_worker({"config": config.model_dump(mode="json")})
    run_folder = tmp_path / "student.training"
    try:
        with get_client(sync_client=True) as client:
            wait_until(lambda: any(run_folder.glob("scratch/tensorboard/*")), seconds=120)
            time.sleep(3)  # a few steps
            (run,) = [run for run in client.read_flow_runs() if run.name == f"train {config.output}"]
            client.set_flow_run_state(run.id, Cancelling(), force=True)

            def state() -> State:
                return client.read_flow_run(run.id).state or Cancelling()

            wait_until(lambda: state().is_final(), seconds=100)
            assert state().is_cancelled(), state()
    finally:
        process.kill()
        process.wait()
    assert not processes_of(tmp_path)
    assert newest_checkpoint(run_folder)


@pytest.mark.long
def test_a_cancelled_capture_says_of_no_worker_that_it_died(tiny_teacher: Path, tmp_path: Path):
    from prefect.client.orchestration import get_client
    from prefect.states import Cancelling

    log = tmp_path / "worker.log"
    with prefect_server(tmp_path):
        deploy(DeployConfig())
        capture = Capture(tmp_path, tiny_teacher, workers=2)
        with worker(log=log, **capture.pace(3)):
            wait_until(lambda: capture.has(1), seconds=180)
            with get_client(sync_client=True) as client:
                client.set_flow_run_state(capture.id, Cancelling(), force=True)
            wait_until(lambda: capture.run.state_name == "Cancelled", seconds=120)
            wait_until(lambda: not processes_of("softlabel.pipeline.capturing.worker"), seconds=60)
    assert not capture.has(DOCUMENTS)
    assert set(capture.rows.values()) == {1}
    assert "died" not in log.read_text(), log.read_text()


def start_worker(parameters: dict[str, object]) -> "subprocess.Popen[bytes]":
    """Start a worker that executes one run of the train deployment."""
    from prefect.client.orchestration import get_client
    from prefect.settings import get_current_settings

    deploy(DeployConfig())
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name("train/softlabel")
        client.create_flow_run_from_deployment(deployment.id, parameters=parameters)
    return subprocess.Popen(
        [sys.executable, "-m", "prefect", "worker", "start", "--pool", "softlabel", "--run-once"],
        env=os.environ | {"PREFECT_API_URL": str(get_current_settings().api.url), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def parent(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
