"""The flow that brings a table up to date with its documents: one task plans, then one task captures each shard."""

from collections.abc import Callable
from datetime import timedelta
from typing import Protocol

from prefect import Flow, flow, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE

from softlabel.flows.running.artifacts import publishing_progress
from softlabel.flows.running.events import announcing
from softlabel.flows.running.outages import publish, reported
from softlabel.flows.running.retries import retrying
from softlabel.flows.running.runs import recorded
from softlabel.pipeline.capturing.capture import CaptureReport, capture
from softlabel.pipeline.capturing.steps import P, R, StepDecorator
from softlabel.pipeline.config.capture import CaptureConfig
from softlabel.pipeline.progress import Watch

RUN_NAMES = {
    "plan": "plan {job.table}",
    "capture_shard": "capture {path.stem} {job.table}",
    "copy_rows": "copy {path.stem} {job.table}",
}
"""Name of the task run of each step; ``path.stem`` is the number of a shard in the plan."""


_ALWAYS_SHOWN = {
    "documents": "documents",
    "unchanged": "already in the table",
    "sequences": "sequences that the teacher read",
    "positions": "captured positions",
    "bytes": "bytes",
    "seconds": "time",
}
_SHOWN = {
    "rejects": "documents that can't be used",
    "rejects_file": "the reasons",
    "truncated": "documents cut short to the classifier's longest input",
    "repeated": "documents left out: another one has the same content",
    "taken_down": "documents left out: taken down earlier",
    "copied": "sequences copied from other documents",
    "partial_answers": "answers of which the chat template leaves out a part",
    "reread": "documents read again: an earlier version of softlabel captured them",
    "replaced": "wrong sequences replaced",
    "withdrawn": "documents removed: they can't be used now",
}
"""Rows of the artifact, in its order, that are shown if they say something."""


def as_task(step: Callable[P, R], /) -> Callable[P, R]:
    """Make a step of a capture a Prefect task. Only the table records what is done, never a cache."""
    name = getattr(step, "__name__", "")  # type checkers do not know that a Callable has a name
    return task(name=name, task_run_name=RUN_NAMES[name], persist_result=False, cache_policy=NO_CACHE)(step)


class CaptureFunction(Protocol):
    """``capture``, or what is left to do of it."""

    def __call__(self, config: CaptureConfig, watch: Watch, decorate: StepDecorator) -> CaptureReport:
        """Capture, and report."""
        ...


def flow_of(work: CaptureFunction) -> Flow[[CaptureConfig], CaptureReport]:
    """The flow that does this work."""

    @flow(name="capture", flow_run_name="capture {config.table}", persist_result=False)
    def capture_flow(config: CaptureConfig) -> CaptureReport:
        """Run a teacher once over documents and store its soft labels in a table; skip what the table already holds."""
        with (
            recorded(table=config.table),
            retrying(),
            announcing(config.table, "capture"),
            reported(),
            publishing_progress("capture-progress") as watch,
        ):
            report = work(config, watch, as_task)
        description = f"Captured into {report.table} (version {report.version})"
        publish(create_table_artifact, _rows(report), key="capture", description=description)
        return report

    return capture_flow


def _rows(report: CaptureReport) -> list[dict[str, str]]:
    """What was captured, in words, one number to a row: the UI cuts wide tables off."""
    rows = {words: getattr(report, name) for name, words in _ALWAYS_SHOWN.items()}
    rows |= {words: getattr(report, name) for name, words in _SHOWN.items() if getattr(report, name)}
    rows["time"] = timedelta(seconds=round(report.seconds))
    if not report.held_out:
        rows["held out, to evaluate students on"] = "nothing"
    shown = {name: f"{value:,}" if isinstance(value, int) else f"{value}" for name, value in rows.items()}
    return [{"name": name, "value": value} for name, value in shown.items()]


capture_flow = flow_of(capture)
