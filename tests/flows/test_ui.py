"""Prefect's UI in a real browser, in both of its versions: the form, progress that moves, and the report."""

import re
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.client.schemas.objects import Artifact

from softlabel.flows.deploy import deploy
from softlabel.flows.deployments import DeployConfig
from softlabel.pipeline.training.train import train
from softlabel.storage.table import Table
from tests.browser import Page, browser
from tests.flows.captures import Capture
from tests.flows.servers import POSTGRES, postgresql, prefect_server, wait_until, worker
from tests.pipeline.captured import make_table
from tests.pipeline.trainings import settings

pytestmark = [pytest.mark.long, pytest.mark.skipif(not POSTGRES, reason="PostgreSQL is not installed")]

WIDTH = 1300
TABLES = """[...document.querySelectorAll("table")].filter(
    each => getComputedStyle(each.parentElement).overflowX == "visible"
)"""
"""Tables that cover what is beside them if they are too wide."""
PASS = 3.0
"""Seconds that the teacher of a paced capture needs for three sequences."""
PROGRESS = re.compile(r"capture: ([\d,]+)/([\d,]+) positions\s+[\d.,]+/s\s+\d:\d\d:\d\d left")


class UI:
    """A browser before one version of the UI of a server with our deployments and a worker.

    While there is a file at ``hold``, the worker's paced teachers wait.
    """

    def __init__(self, page: Page, address: str, hold: Path) -> None:
        self._page, self._address, self.hold = page, address, hold

    def visit(self, place: str) -> Page:
        return self._page.visit(f"{self._address}/{place}", WIDTH)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Page, str, Path]]:
    folder = tmp_path_factory.mktemp("ui")
    places = {"PREFECT_SERVER_UI_ENABLED": "true", "PREFECT_SERVER_UI_STATIC_DIRECTORY": str(folder / "ui")}
    with (
        postgresql() as url,  # it sorts the settings of the form
        prefect_server(folder, PREFECT_SERVER_DATABASE_CONNECTION_URL=url, **places) as server,
        browser(folder / "browser") as page,
    ):
        deploy(DeployConfig())
        with worker(PACED_SECONDS=str(PASS), PACED_HOLD=str(folder / "hold")):
            yield page, server.url.removesuffix("/api"), folder / "hold"


@pytest.fixture(params=["", "/v2"], ids=["v1", "v2"])
def ui(server: tuple[Page, str, Path], request: pytest.FixtureRequest) -> UI:
    page, address, hold = server
    return UI(page, f"{address}{request.param}", hold)


def deployment(flow: str) -> UUID:
    with get_client(sync_client=True) as client:
        return client.read_deployment_by_name(f"{flow}/softlabel").id


def wait_for(run: UUID) -> None:
    with get_client(sync_client=True) as client:
        wait_until(lambda: client.read_flow_run(run).state_name == "Completed", seconds=240)


def test_a_person_starts_a_capture_with_the_form(ui: UI, tiny_teacher: Path, documents: Path, tmp_path: Path):
    table = tmp_path / "table"
    with get_client(sync_client=True) as client:
        before = {run.id for run in client.read_flow_runs()}
        page = ui.visit(f"deployments/deployment/{deployment('capture')}/run")
        wait_until(lambda: "Submit" in page.text and page.value("document.querySelectorAll('textarea').length"), 60)
        for number, value in enumerate((documents, table, tiny_teacher)):
            page.type(str(value), "textarea", number)
        submit = "[...document.querySelectorAll('button')].find(each => each.innerText.trim() == 'Submit')"
        page.value(f"{submit}.click()")
        wait_until(lambda: {run.id for run in client.read_flow_runs()} - before, seconds=60)
        [run] = {run.id for run in client.read_flow_runs()} - before
    wait_for(run)
    assert Table.open(str(table)).version > 0


def test_a_person_watches_the_progress_of_a_capture(ui: UI, tiny_teacher: Path, tmp_path: Path):
    capture = Capture(tmp_path, tiny_teacher)

    def reported() -> int:
        return max((done_in(each.description or "") for each in artifacts(capture.id, "capture-progress")), default=0)

    def shown() -> int:
        [progress] = artifacts(capture.id, "capture-progress")
        page = ui.visit(f"artifacts/artifact/{progress.id}")
        wait_until(lambda: done_in(page.text), seconds=60)
        return done_in(page.text)

    seen = [0]
    for _ in range(2):  # the teacher waits while the person looks
        wait_until(lambda: reported() > seen[-1], seconds=180)
        ui.hold.touch()
        seen.append(shown())
        ui.hold.unlink()
    assert seen[0] < seen[1] < seen[2]
    wait_for(capture.id)


def done_in(text: str) -> int:
    """Positions that progress with a rate and the time left says are done; 0 if there is no such progress."""
    if not (found := PROGRESS.search(text)):
        return 0
    done, total = (int(number.replace(",", "")) for number in found.groups())
    assert done < total
    return done


def test_a_person_reads_the_report_of_an_evaluation(ui: UI, tiny_teacher: Path, tmp_path: Path):
    table = make_table(tmp_path / "table", tiny_teacher)
    names = ("a | **b** &#177; <b>", "other")
    for name in names:
        train(settings(table, tmp_path / name, optimizer={"max_steps": 2}))
    config = {"table": table.location, "students": [str(tmp_path / name) for name in names]}
    with get_client(sync_client=True) as client:
        run = client.create_flow_run_from_deployment(deployment("evaluate"), parameters={"config": config}).id
        wait_for(run)
    [report], [students] = artifacts(run, "report"), artifacts(run, "students")

    page = ui.visit(f"artifacts/artifact/{report.id}")
    wait_until(lambda: "nats of KL" in page.text, seconds=60)  # the verdict
    text = page.text
    for words in ("perplexity", "agreement", "on disk", "KL by the teacher's entropy", "report.html", names[0], "±"):
        assert words in text, words
    assert not re.search(r"&#?\w+;", text.replace("&#177;", ""))
    loaded = "document.images.length > 1 && [...document.images].every(each => each.naturalWidth > 0)"
    wait_until(lambda: page.value(loaded), seconds=60)
    assert page.value(f"Math.max(...{TABLES}.map(each => each.scrollWidth - each.parentElement.clientWidth), 0)") == 0

    page = ui.visit(f"artifacts/artifact/{students.id}")
    wait_until(lambda: "perplexity" in page.text, seconds=60)


def artifacts(run: UUID, key: str) -> list[Artifact]:
    """The artifacts with this key that a run has made."""
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[key])))
    return [each for each in found if each.flow_run_id == run]
