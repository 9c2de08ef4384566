"""Runs of the deployed capture, with a teacher that takes its time (``paced``)."""

from collections import Counter
from pathlib import Path

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun

from softlabel.storage.table import Table
from tests.pipeline.capturing.test_capture import rows_of, settings, texts, write

DOCUMENTS = 60
IMPATIENT = {"PREFECT_CLIENT_MAX_RETRIES": "1", "PREFECT_API_REQUEST_TIMEOUT": "5"}
"""Environment of a worker whose client gives up soon."""


class Capture:
    """One run of a deployed capture. While there is a file at ``hold``, its teacher waits.

    Args:
        folder: for the documents, the table, and what the teacher reads.
        teacher: the teacher's folder.
        workers: number of processes.
        first: number of the first document.
        table: name of the table in the folder.
        deployment: name of the deployment.
    """

    def __init__(
        self,
        folder: Path,
        teacher: Path,
        workers: int = 1,
        first: int = 0,
        table: str = "table",
        deployment: str = "softlabel",
    ) -> None:
        self.table, self.passes, self.hold = folder / table, folder / "passes", folder / "hold"
        documents = write(folder / f"{table}-{first}.parquet", texts(DOCUMENTS, first))
        paced = {"model": str(teacher), "dtype": "float32", "batch_tokens": 128, "device": "cpu", "workers": workers}
        paced |= {"engine": "tests.flows.paced:Paced"}
        config = settings(teacher, documents, self.table, teacher=paced, shards={"positions": 300})
        capture = config.model_dump(mode="json", exclude_unset=True)
        with get_client(sync_client=True) as client:
            found = client.read_deployment_by_name(f"capture/{deployment}")
            self.id = client.create_flow_run_from_deployment(found.id, parameters={"config": capture}).id

    def pace(self, seconds: float) -> dict[str, str]:
        """Environment of a worker: seconds for each pass of the teacher, three sequences each."""
        return {"PACED_SECONDS": str(seconds), "PACED_PASSES": str(self.passes), "PACED_HOLD": str(self.hold)}

    @property
    def run(self) -> FlowRun:
        with get_client(sync_client=True) as client:
            return client.read_flow_run(self.id)

    @property
    def states(self) -> list[str | None]:
        with get_client(sync_client=True) as client:
            return [state.name for state in client.read_flow_run_states(self.id)]

    @property
    def rows(self) -> "Counter[object]":
        return Counter(rows_of(self.table)) if Table.exists(str(self.table)) else Counter()

    def has(self, rows: int) -> bool:
        return len(self.rows) >= rows

    def is_exact(self, documents: int = DOCUMENTS) -> bool:
        """Whether there is one row for each of so many documents."""
        return len(self.rows) == documents and set(self.rows.values()) == {1}

    @property
    def read_once(self) -> bool:
        """Whether the teacher has read every sequence once."""
        return max(Counter(self.passes.read_text().split()).values()) == 1
