"""Schedules fire by themselves, on a server as README starts one, with either database."""

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


def test_every_kind_of_schedule_makes_runs(tmp_path: Path):
    with prefect_server(tmp_path) as log:
        assert_schedules_make_runs(log)


@pytest.mark.long
@pytest.mark.skipif(not POSTGRES, reason="PostgreSQL's programs are not here")
def test_every_kind_of_schedule_makes_runs_on_postgresql(tmp_path: Path):
    with postgresql() as url, prefect_server(tmp_path, PREFECT_SERVER_DATABASE_CONNECTION_URL=url) as log:
        assert_schedules_make_runs(log)


def assert_schedules_make_runs(log: Path) -> None:
    """Deploy a flow with each kind of schedule: the server makes runs of all of them, and none of its services dies."""
    with get_client(sync_client=True) as client:
        flow = client.create_flow(maintain_flow)
        deployed = {
            client.create_deployment(flow, kind, schedules=[DeploymentScheduleCreate(schedule=schedule)])
            for kind, schedule in SCHEDULES.items()
        }

        def scheduled() -> bool:
            return deployed == {run.deployment_id for run in client.read_flow_runs() if run.auto_scheduled}

        wait_until(lambda: scheduled() or complaints(log), seconds=15)
        assert complaints(log) == []
        assert scheduled()


def complaints(log: Path) -> list[str]:
    """What a server's log says of a service that failed: the server goes on answering without it."""
    return [line for line in log.read_text().splitlines() if "Traceback" in line or "Error" in line or "ERROR" in line]
