"""Events that say what a run has left behind: a newer version of a table, or a student.

A run emits each of them once, at its end. Prefect's automations can start runs from them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from prefect.events import emit_event

from softlabel.storage.identity import run_id
from softlabel.storage.places.open import place_of
from softlabel.storage.reader import captured_positions
from softlabel.storage.records.versions import parse
from softlabel.storage.table import Table

if TYPE_CHECKING:
    from softlabel.pipeline.training.train import TrainReport

NEW_VERSION = "softlabel.table.version"
"""A table has a newer version. The payload has table, version, operation, positions (of the table) and run."""
NEW_STUDENT = "softlabel.student.trained"
"""A student is finished. The payload has student, table (TABLE@VERSION), step and run."""


def table_resource(location: str) -> str:
    """The resource id of a table's events: its absolute path or s3:// location after ``softlabel.table.``."""
    return f"softlabel.table.{place_of(location).address}"


@contextmanager
def announcing(location: str, operation: str) -> Iterator[None]:
    """Emit an event at the end if the table has a newer version then, also if the block fails after some commits."""
    location = parse(location)[0]
    before = _newest(location)
    try:
        yield
    finally:
        after = _newest(location)
        if after is not None and (before is None or after.version > before.version):
            emit_event(
                NEW_VERSION,
                resource={"prefect.resource.id": table_resource(location), "prefect.resource.name": location},
                payload={
                    "table": after.location,
                    "version": after.version,
                    "operation": operation,
                    "positions": captured_positions(after),
                    "run": run_id(),
                },
            )


def announce_student(report: "TrainReport") -> None:
    """Emit an event if this run has trained the student."""
    if report.steps_trained:
        emit_event(
            NEW_STUDENT,
            resource={
                "prefect.resource.id": f"softlabel.student.{place_of(report.output).address}",
                "prefect.resource.name": report.output,
            },
            payload={"student": report.output, "table": report.table, "step": report.steps, "run": run_id()},
        )


def _newest(location: str) -> Table | None:
    return Table.open(location) if Table.exists(location) else None
