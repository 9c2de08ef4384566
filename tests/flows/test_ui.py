"""Prefect's UI in a real browser: a person starts a capture with the form, and sees its progress and the report."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client

from softlabel.flows.deploy import deploy
from softlabel.flows.deployments import DeployConfig
from softlabel.pipeline.training.train import train
from softlabel.storage.table import Table
from tests.browser import Page, browser
from tests.flows.servers import prefect_server, wait_until, worker
from tests.pipeline.trainings import settings

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


def run_from_form(page: Page, address: str, flow: str, *values: str, items: int = 0) -> None:
    """Fill in the first fields of a deployment's form, after adding items to its first list, and submit it."""
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name(f"{flow}/softlabel").id
        before = {run.id for run in client.read_flow_runs()}
        page.visit(f"{address}/deployments/deployment/{deployment}/run", WIDTH)
        wait_until(
            lambda: "Submit" in page.text and page.value("document.querySelectorAll('textarea').length"), seconds=60
        )
        for _ in range(items):
            press(page, "Add item")
        for number, value in enumerate(values):
            page.type(value, "textarea", number)
        press(page, "Submit")
        wait_until(lambda: {run.id for run in client.read_flow_runs()} - before, seconds=60)
        [run] = {run.id for run in client.read_flow_runs()} - before
        wait_until(lambda: client.read_flow_run(run).state_name == "Completed", seconds=240)


def press(page: Page, label: str) -> None:
    page.value(f"[...document.querySelectorAll('button')].find(each => each.innerText.trim() == '{label}').click()")


def shown(page: Page, address: str, key: str, version: str, *expected: str) -> str:
    """The text of an artifact's page once it shows what is expected."""
    with get_client(sync_client=True) as client:
        [artifact] = [each for each in client.read_artifacts() if each.key == key]
    page.visit(f"{address}{version}/artifacts/artifact/{artifact.id}", WIDTH)
    wait_until(lambda: all(text in page.text for text in expected), seconds=120)
    return page.text


def test_a_person_captures_and_evaluates_with_the_forms_and_sees_progress_and_report(
    tiny_teacher: Path, documents: Path, tmp_path: Path
):
    table, runs = tmp_path / "table", tmp_path / "runs"
    with ui(tmp_path) as (page, address):
        run_from_form(page, address, "capture", str(documents), str(table), str(tiny_teacher))
        for version in ("", "/v2"):
            shown(page, address, "capture-progress", version, "Progress:", "positions")
            assert "sequences that the teacher read" in shown(page, address, "capture", version, "60")

        for name in ("a_student", "control"):
            train(settings(Table.open(str(table)), runs / name, optimizer={"max_steps": 2}))
        run_from_form(page, address, "evaluate", str(table), str(runs / "a_student"), str(runs / "control"), items=2)
        for version in ("", "/v2"):
            text = shown(page, address, "report", version, "a_student", "control", "Training loss")
            assert "±" in text
            assert not [
                sign for sign in ("&#", "\\", "**", "![") if sign in text
            ]  # Markdown that is not shown as it is meant
            images = "[...document.querySelectorAll('img')].filter(each => each.src.startsWith('data:image/svg'))"
            wait_until(lambda: page.value(f"{images}.every(each => each.naturalWidth > 0)"), seconds=30)  # noqa: B023
            assert page.value(f"{images}.length") > 3
            shown(page, address, "students", version, "a_student", "perplexity")
    assert (runs / "report" / "report.html").is_file()
