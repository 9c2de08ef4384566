"""Schedules fire on a Prefect server, with either database."""

import shutil
from datetime import timedelta
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule, RRuleSchedule

from softlabel.flows.maintain import maintain_flow
from tests.flows.servers import POSTGRES, postgresql, prefect_server, wait_until

SCHEDULES = {
    "interval": IntervalSchedule(interval=timedelta(hours=1)),
    "cron": CronSchedule(cron="0 3 * * *", timezone="Europe/Berlin"),
    "rrule": RRuleSchedule(rrule="FREQ=WEEKLY;BYDAY=MO,WE,FR;BYHOUR=3;BYMINUTE=0"),
}


def test_every_kind_of_schedule_creates_runs(prefect_database: Path, tmp_path: Path):
    shutil.copy(prefect_database, tmp_path)
    with prefect_server(tmp_path) as server:
        assert_schedules_create_runs(server.log)


@pytest.mark.long
@pytest.mark.skipif(not POSTGRES, reason="PostgreSQL is not installed")
def test_every_kind_of_schedule_creates_runs_on_postgresql(tmp_path: Path):
    with postgresql() as url, prefect_server(tmp_path, PREFECT_SERVER_DATABASE_CONNECTION_URL=url) as server:
        assert_schedules_create_runs(server.log)


def assert_schedules_create_runs(log: Path) -> None:
    """Deploy a flow with each kind of schedule; the server creates runs for all of them, and no service fails."""
    with get_client(sync_client=True) as client:
        flow = client.create_flow(maintain_flow)
        deployed = {
            client.create_deployment(flow, kind, schedules=[DeploymentScheduleCreate(schedule=schedule)])
            for kind, schedule in SCHEDULES.items()
        }

        def scheduled() -> bool:
            return deployed == {run.deployment_id for run in client.read_flow_runs() if run.auto_scheduled}

        wait_until(lambda: scheduled() or failures(log), seconds=60)
        assert failures(log) == []
        assert scheduled()


def failures(log: Path) -> list[str]:
    """Lines about failed services in a server's log; the server itself continues to answer without them."""
    return [line for line in log.read_text().splitlines() if "Traceback" in line or "Error" in line or "ERROR" in line]
