"""Prefect's UI in a real browser."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client

from softlabel.flows.deploy import deploy
from softlabel.flows.deployments import DeployConfig
from softlabel.storage.table import Table
from tests.browser import Page, browser
from tests.flows.servers import prefect_server, wait_until, worker

pytestmark = pytest.mark.long

WIDTH = 1300


@contextmanager
def ui(folder: Path) -> Iterator[tuple[Page, str]]:
    """A browser, and the address of the UI of a server with our deployments and a worker."""
    places = {"PREFECT_SERVER_UI_ENABLED": "true", "PREFECT_SERVER_UI_STATIC_DIRECTORY": str(folder / "ui")}
    with prefect_server(folder, **places) as server, browser(folder / "browser") as page:
        deploy(DeployConfig())
        with worker():
            yield page, server.url.removesuffix("/api")


def run_from_form(page: Page, address: str, flow: str, *values: str) -> None:
    """Fill in the first fields of a deployment's form, submit it, and wait until the run is completed."""
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name(f"{flow}/softlabel").id
        before = {run.id for run in client.read_flow_runs()}
        page.visit(f"{address}/deployments/deployment/{deployment}/run", WIDTH)
        wait_until(
            lambda: "Submit" in page.text and page.value("document.querySelectorAll('textarea').length"), seconds=60
        )
        for number, value in enumerate(values):
            page.type(value, "textarea", number)
        press(page, "Submit")
        wait_until(lambda: {run.id for run in client.read_flow_runs()} - before, seconds=60)
        [run] = {run.id for run in client.read_flow_runs()} - before
        wait_until(lambda: client.read_flow_run(run).state_name == "Completed", seconds=240)


def press(page: Page, label: str) -> None:
    page.value(f"[...document.querySelectorAll('button')].find(each => each.innerText.trim() == '{label}').click()")


def test_a_person_starts_a_capture_with_the_form(tiny_teacher: Path, documents: Path, tmp_path: Path):
    table = tmp_path / "table"
    with ui(tmp_path) as (page, address):
        run_from_form(page, address, "capture", str(documents), str(table), str(tiny_teacher))
    assert Table.open(str(table)).version > 0
