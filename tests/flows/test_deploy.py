"""``softlabel deploy``: what it installs on a real server, and what the automations do for runs that are lost."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import yaml
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import DeploymentUpdate
from prefect.client.schemas.objects import FlowRun
from prefect.flows import load_flow_from_entrypoint
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import AwaitingRetry, Completed, Failed, Pending, Running, State

from softlabel.flows import deploy as deploying
from softlabel.flows.cli import run
from softlabel.flows.deploy import deploy
from softlabel.flows.deployments import DeployConfig, DeploymentConfig
from softlabel.storage.errors import SoftlabelError
from tests.flows.commands import softlabel
from tests.flows.servers import answering, closed, of_server, prefect_server, wait_until, worker
from tests.pipeline.captured import make_table
from tests.pipeline.trainings import processes_of, settings

FLOWS = {"capture", "estimate", "train", "evaluate", "compare", "distill", "reprocess", "mix", "verify", "maintain"}
READ_TABLES_ONLY = {"reprocess", "mix", "maintain"}


@pytest.fixture(scope="module")
def server(prefect_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A Prefect server of its own, since a deployment is visible to all."""
    home = tmp_path_factory.mktemp("server")
    shutil.copy(prefect_database, home)
    with prefect_server(home):
        yield


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A team's file: a nightly capture, and a training after each version of its table."""
    table, student = str(tmp_path / "table"), str(tmp_path / "student")
    capture = {"documents": str(tmp_path / "docs"), "table": table, "teacher": {"model": str(tmp_path / "teacher")}}
    deployments: list[dict[str, Any]] = [
        {"flow": "capture", "name": "wiki", "cron": "30 1 * * *", "timezone": "Europe/Berlin", "parameters": capture},
        {
            **{"flow": "train", "name": "wiki", "after_version_of": table, "time_limit_hours": 10},
            "parameters": {"table": table, "output": student},
        },
    ]
    file = tmp_path / "site.yaml"
    file.write_text(yaml.safe_dump({"deployments": deployments}))
    return file


@pytest.mark.usefixtures("server")
def test_deploying_twice_changes_nothing_the_second_time(site: Path, capsys: pytest.CaptureFixture[str]):
    code, first, _ = softlabel(capsys, "deploy", "--config", str(site))
    assert code == 0
    assert first["installed"][0] == {"kind": "work pool", "name": "softlabel", "change": "created", "schedule": None}
    assert {each["kind"] for each in first["installed"]} == {"work pool", "queue", "deployment", "automation"}
    code, second, _ = softlabel(capsys, "deploy", "--config", str(site))
    assert code == 0
    assert [each for each in second["installed"] if each["change"] != "unchanged"] == []
    assert run(["deploy", "--config", str(site)]) == 0
    assert "nothing to change" in capsys.readouterr().out


@pytest.mark.usefixtures("server")
def test_a_dry_run_of_deploy_names_the_changes_and_makes_none(site: Path, capsys: pytest.CaptureFixture[str]):
    assert softlabel(capsys, "deploy", "--config", str(site))[0] == 0
    settings = yaml.safe_load(site.read_text())
    settings["deployments"][0] |= {"cron": "45 1 * * *", "time_limit_hours": 3}
    settings["deployments"].append(settings["deployments"][1] | {"name": "further"})
    site.write_text(yaml.safe_dump(settings | {"work_pool": "dry"}))

    def on_server() -> list[Any]:
        with get_client(sync_client=True) as client:
            pools, deployments = client.read_work_pools(), client.read_deployments()
            return [*pools, *deployments, *client.read_automations()]

    before = on_server()
    code, would, _ = softlabel(capsys, "deploy", "--config", str(site), "--dry-run")
    assert (code, would.pop("dry_run")) == (0, True)
    assert on_server() == before
    assert run(["deploy", "--config", str(site), "--dry-run"]) == 0
    assert "would be made on" in capsys.readouterr().out
    code, did, _ = softlabel(capsys, "deploy", "--config", str(site))
    assert (code, did.pop("dry_run")) == (0, False)
    assert would == did
    changed = {(each["name"], each["change"]) for each in did["installed"] if each["change"] != "unchanged"}
    assert {("dry", "created"), ("train/further", "created"), ("capture/wiki", "updated")} <= changed


@pytest.mark.usefixtures("server")
def test_each_flow_has_a_deployment_that_works_without_a_clone(site: Path, capsys: pytest.CaptureFixture[str]):
    assert softlabel(capsys, "deploy", "--config", str(site))[0] == 0
    with get_client(sync_client=True) as client:
        shipped = [each for each in client.read_deployments() if each.name == "softlabel"]
        flows = {each.id: load_flow_from_entrypoint(str(each.entrypoint)) for each in shipped}
        assert {flow.name for flow in flows.values()} == FLOWS
        for each in shipped:
            assert each.path is None
            assert not each.pull_steps
            assert each.work_queue_name == ("cpu" if flows[each.id].name in READ_TABLES_ONLY else "gpu")
            assert "softlabel" in each.tags
            assert not any(schedule.active for schedule in each.schedules)


@pytest.mark.usefixtures("server")
def test_schedules_are_off_until_they_are_turned_on_and_then_stay_on(site: Path, capsys: pytest.CaptureFixture[str]):
    def schedules(*flags: str) -> dict[str, str]:
        code, report, _ = softlabel(capsys, "deploy", "--config", str(site), *flags)
        assert code == 0
        return {each["name"]: each["schedule"] for each in report["installed"] if each["schedule"]}

    assert schedules()["capture/wiki"] == "30 1 * * * Europe/Berlin, off"
    on = schedules("--schedules")
    assert on["capture/wiki"] == "30 1 * * * Europe/Berlin, on"
    assert on["capture/softlabel"].endswith("off")  # nobody said what it is to capture
    assert schedules() == on


@pytest.mark.usefixtures("server")
def test_what_people_changed_in_the_deployment_is_set_right_and_what_they_paused_stays_paused(
    site: Path, capsys: pytest.CaptureFixture[str]
):
    assert softlabel(capsys, "deploy", "--config", str(site))[0] == 0
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name("train/wiki")
        client.update_deployment(deployment.id, DeploymentUpdate(parameters={}))
        (lost,) = client.read_automations_by_name("softlabel: lost runs")
        client.pause_automation(lost.id)
        code, report, _ = softlabel(capsys, "deploy", "--config", str(site))
        assert code == 0
        assert {e["name"]: e["change"] for e in report["installed"] if e["change"] != "unchanged"} == {
            "train/wiki": "updated"
        }
        assert client.read_deployment(deployment.id).parameters == deployment.parameters
        assert not client.read_automations_by_name("softlabel: lost runs")[0].enabled


@pytest.mark.usefixtures("server")
def test_what_a_deployment_no_longer_has_is_deleted(site: Path, capsys: pytest.CaptureFixture[str]):
    assert softlabel(capsys, "deploy", "--config", str(site))[0] == 0
    deployments = yaml.safe_load(site.read_text())["deployments"]
    for setting in ("after_version_of", "time_limit_hours"):
        del deployments[1][setting]
    site.write_text(yaml.safe_dump({"deployments": deployments}))
    gone = {"softlabel: time limit of train/wiki", "softlabel: train/wiki after each version"}
    for dry in (["--dry-run"], [], []):
        with get_client(sync_client=True) as client:
            before = {each.name for each in client.read_automations()}
        code, report, _ = softlabel(capsys, "deploy", "--config", str(site), *dry)
        changed = {each["name"]: each["change"] for each in report["installed"] if each["change"] != "unchanged"}
        assert (code, changed) == (0, dict.fromkeys(gone & before, "deleted"))
    assert not gone & before


@pytest.mark.long
@pytest.mark.usefixtures("server")
def test_people_who_deploy_at_the_same_time_install_everything_once(site: Path, capsys: pytest.CaptureFixture[str]):
    site.write_text(yaml.safe_dump(yaml.safe_load(site.read_text()) | {"work_pool": "shared"}))
    with get_client(sync_client=True) as client:
        for each in client.read_automations():
            client.delete_automation(each.id)
    command = [sys.executable, "-m", "softlabel.flows.cli", "deploy", "--config", str(site)]
    people = [subprocess.Popen(command, env=of_server(), stdout=subprocess.DEVNULL) for _ in range(3)]
    assert [person.wait() for person in people] == [0, 0, 0]
    with get_client(sync_client=True) as client:
        names = [each.name for each in client.read_automations()]
    assert len(names) == len(set(names)) > 0
    code, report, _ = softlabel(capsys, "deploy", "--config", str(site))
    assert (code, {each["change"] for each in report["installed"]}) == (0, {"unchanged"})


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"parameters": {"tabel": "x"}}, "tabel"),
        ({"parameters": {"output": 7}}, "output"),
        ({"parameters": {"output": "/students/{versoin}"}}, "{versoin} stands for nothing"),
        ({"parameters": {"output": "/students/{version}-{table.version!r}"}}, "{table.version!r} stands for nothing"),
        ({"after_version_of": "table"}, "output"),
        ({"cron": "every night"}, "cron"),
        ({"timezone": "Mars/Olympus", "cron": "0 1 * * *"}, "timezone"),
        ({"flow": "purge"}, "flow"),
        ({"name": "a/b"}, "name"),
    ],
)
@pytest.mark.usefixtures("server")
def test_a_deployment_that_could_not_run_is_refused_before_anything_is_installed(
    change: dict[str, Any], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "site.yaml"
    file.write_text(yaml.safe_dump({"deployments": [{"flow": "train", "name": "refused", **change}]}))
    assert run(["deploy", "--config", str(file)]) == 2
    assert problem in capsys.readouterr().err
    with get_client(sync_client=True) as client:
        assert not [each for each in client.read_deployments() if each.name == "refused"]


@pytest.mark.usefixtures("server")
def test_a_new_version_of_a_table_starts_the_training_that_waits_for_it(site: Path):
    deploy(DeployConfig.model_validate(yaml.safe_load(site.read_text())))
    with get_client(sync_client=True) as client:
        training = client.read_deployment_by_name("train/wiki")

        def runs() -> list[FlowRun]:
            return [run for run in client.read_flow_runs() if run.deployment_id == training.id]

        # In a process of its own: Prefect sends all events of a process to the first server that it used.
        subprocess.run([sys.executable, "-c", ANNOUNCING, site.parent], env=of_server(), check=True)
        wait_until(runs, seconds=60)
        assert len(runs()) == 1


ANNOUNCING = """
import sys
from pathlib import Path

from softlabel.flows.running.events import announcing
from tests.storage.tables import add, identity, make_table

folder = Path(sys.argv[1])
for name in ("other", "table"):
    with announcing(str(folder / name), "capture"):
        add(make_table(folder / name, identity()), ["a row"])
with announcing(str(folder / "table"), "capture"):
    pass  # nothing new
"""
"""Makes two tables, and announces their versions."""


def test_without_a_server_to_deploy_to_the_error_says_how_to_name_one(capsys: pytest.CaptureFixture[str]):
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        assert run(["deploy"]) == 2
    assert "PREFECT_API_URL" in capsys.readouterr().err


@pytest.mark.parametrize("listens", [True, False])
def test_a_server_that_does_not_listen_yet_is_waited_for_a_while(listens: bool, monkeypatch, capsys):
    if not listens:
        monkeypatch.setattr(deploying, "_SECONDS_TO_START", 0.2)
    with closed() as port, temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{port}/api"}), ExitStack() as stack:

        def listen() -> None:
            wait_until(lambda: "waiting for" in capsys.readouterr().err, seconds=60)
            stack.enter_context(answering(418, port))

        thread = threading.Thread(target=listen)
        if listens:
            thread.start()
            stack.callback(thread.join)
        with pytest.raises(SoftlabelError) as error:
            deploy(DeployConfig())
        said = str(error.value)
        assert ("error '418 " in said, "ConnectError" in said) == (listens, not listens)


@pytest.mark.long
def test_a_run_whose_worker_and_process_were_killed_starts_again_and_finishes(tiny_teacher: Path, tmp_path: Path):
    """Worker and run are killed; after the missing heartbeats, another worker gets the run, which ends as it would."""
    table = make_table(tmp_path / "table", tiny_teacher, held_out=0)
    config = settings(table, tmp_path / "student", optimizer={"max_steps": 400, "save_steps": 10})
    with prefect_server(tmp_path):
        deploy(DeployConfig(heartbeat_seconds=30))
        with get_client(sync_client=True) as client:
            train = client.read_deployment_by_name("train/softlabel")
            run = client.create_flow_run_from_deployment(
                train.id, parameters={"config": config.model_dump(mode="json")}
            )
            with worker("--run-once") as killed:
                wait_until(lambda: any((tmp_path / "student.training").glob("checkpoint-*")), seconds=120)
                killed.kill()
                for process in processes_of(tmp_path):
                    os.kill(process, signal.SIGKILL)
            with worker():

                def now() -> FlowRun:
                    return client.read_flow_run(run.id)

                wait_until(lambda: now().state_name == "Completed", seconds=300)
            assert now().run_count >= 2
    record = json.loads((tmp_path / "student" / "softlabel.json").read_text())
    assert record["step"] == 400


@pytest.mark.long
def test_every_start_of_a_run_is_watched_and_has_its_time_limit(tmp_path: Path):
    limited = DeploymentConfig(flow="mix", name="limited", time_limit_hours=1 / 60)
    taken, started, again = Pending(name="Submitting"), Running(), AwaitingRetry()
    with prefect_server(tmp_path), get_client(sync_client=True) as client:
        deploy(DeployConfig(pending_minutes=1, deployments=(limited,)))

        def run(deployment: str, *states: "State[Any]") -> UUID:
            """A run without a process, in the last of these states."""
            mix = client.read_deployment_by_name(f"mix/{deployment}")
            parameters = {"config": {"view": "v", "tables": ["a", "b"]}}
            created = client.create_flow_run_from_deployment(mix.id, parameters=parameters)
            for state in states:
                client.set_flow_run_state(created.id, state, force=True)
            return created.id

        ends = {
            run("softlabel", taken): "AwaitingRetry",
            run("softlabel", taken, started, again, taken): "AwaitingRetry",
            run("limited", started): "Cancelling",
            run("limited", started, again, started): "Cancelling",
        }
        wait_until(lambda: ends == {each: client.read_flow_run(each).state_name for each in ends}, seconds=400)


@contextmanager
def receiving() -> Iterator[tuple[str, list[str]]]:
    """A web hook: its URL, and what it is sent."""
    received: list[str] = []

    class Receive(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"])
            self.send_response(200)
            self.end_headers()

    with HTTPServer(("127.0.0.1", 0), Receive) as hook:
        threading.Thread(target=hook.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{hook.server_port}/", received
        hook.shutdown()


@pytest.mark.long
def test_a_team_is_told_of_runs_that_fail_or_exceed_their_time_limit_and_of_no_others(tmp_path: Path):
    limited = DeploymentConfig(flow="mix", name="limited", time_limit_hours=1 / 60)
    with prefect_server(tmp_path), receiving() as (url, received), get_client(sync_client=True) as client:
        hook = CustomWebhookNotificationBlock(name="team", url=url, json_data={"text": "{{subject}}\n{{body}}"})
        hook.save("team")
        deploy(DeployConfig(notify="custom-webhook/team", deployments=(limited,)))
        parameters = {"config": {"view": "/v", "tables": ["/a", "/b"]}}

        def run(deployment: str, *states: "State[Any]") -> str:
            mix = client.read_deployment_by_name(f"mix/{deployment}")
            created = client.create_flow_run_from_deployment(mix.id, parameters=parameters, state=Running())
            for state in states:
                client.set_flow_run_state(created.id, state, force=True)
            return created.name

        run("softlabel", Completed())
        run("limited", Completed())
        failed, late = run("softlabel", Failed(message="there is no table /a")), run("limited")
        messages = (
            f"softlabel: {failed} Failed\nthere is no table /a\n",
            f"softlabel: {late} is cancelled\nIt has run for 0.0166667 hours, its time limit.\n",
        )
        wait_until(lambda: all(any(each.startswith(start) for each in received) for start in messages), seconds=400)
    assert all(each.startswith(messages) for each in received)  # a busy server may send one twice


@pytest.mark.long
def test_a_run_that_can_not_be_loaded_ends_instead_of_crashing_for_ever(tmp_path: Path):
    with prefect_server(tmp_path):
        deploy(DeployConfig())
        with get_client(sync_client=True) as client:
            mix = client.read_deployment_by_name("mix/softlabel")
            client.update_deployment(mix.id, DeploymentUpdate(entrypoint="softlabel.flows.mix.gone"))
            parameters = {"config": {"view": "v", "tables": ["a", "b"]}}
            run = client.create_flow_run_from_deployment(mix.id, parameters=parameters)
            with worker():
                wait_until(lambda: client.read_flow_run(run.id).state_name == "Crashed", seconds=120)
                time.sleep(5)
                assert client.read_flow_run(run.id).state_name == "Crashed"
