"""Runs one verb for the command line, in this process, and records it in Prefect.

With a Prefect server configured, each verb is a run of its flow there. Otherwise, what is refused because an input is
missing, and what is already done, ends here, before Prefect is loaded, and is recorded nowhere. All other runs are
flows on a server of this process, which starts while the rest of the work is loaded.
"""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, chdir, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from softlabel.flows.running import logs, server
from softlabel.flows.running.progress import watching
from softlabel.pipeline.config.base import Settings
from softlabel.pipeline.config.capture import CaptureConfig
from softlabel.pipeline.config.distill import DistillConfig
from softlabel.pipeline.config.estimate import EstimateConfig
from softlabel.pipeline.config.evaluate import CompareConfig, EvaluateConfig
from softlabel.pipeline.config.tables import MaintainConfig, MixConfig, ReprocessConfig, VerifyConfig
from softlabel.pipeline.config.train import TrainConfig
from softlabel.pipeline.exclusive import scratch
from softlabel.pipeline.log_context import about
from softlabel.pipeline.processes import NEUTRAL, Child
from softlabel.pipeline.students.record import RECORD


def run(name: str, config: Settings) -> Any:
    """Run the flow of that name and return its result.

    Raises:
        SoftlabelError: if the flow fails with one.
    """
    os.environ["PREFECT_HOME"] = str(server.home())  # absolute, as the working folder changes while Prefect is loaded

    with _lines(), about(**logs.subject(config)):
        if server.is_configured():
            return _run_flow(name, config)
        match name:
            case "capture":
                return _capture(cast("CaptureConfig", config))
            case "train":
                return _train(cast("TrainConfig", config))
            case _:
                return _run_here(name, config)


def dry_run(config: Settings) -> Any:
    """What the verb of these settings would do; without Prefect, and recorded nowhere.

    Raises:
        SoftlabelError: as the verb does before it changes anything.
    """
    with _lines(), without_traces(), watching() as watch:
        from softlabel.pipeline import dry_run

        return dry_run(config, watch)


@contextmanager
def without_traces() -> Iterator[None]:
    """Give libraries a temporary folder for what they write into the home folder when they are first imported."""
    with scratch() as folder:
        before = {name: os.environ.get(name) for name in ("MPLCONFIGDIR", "PREFECT_HOME")}
        os.environ.setdefault("MPLCONFIGDIR", str(folder))
        if not server.home().exists():  # Prefect would make it
            os.environ["PREFECT_HOME"] = str(folder)
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


def _capture(config: CaptureConfig) -> Any:
    """Plan a capture, and run the flow for the rest only if there is something to do."""
    from softlabel.pipeline.capturing.capture import carry_out
    from softlabel.pipeline.capturing.job import resolve
    from softlabel.pipeline.capturing.plan import plan

    job = resolve(config)
    with scratch() as folder:
        with watching() as watch:
            todo = plan(job, folder, watch)
            if todo.is_empty:
                return carry_out(job, todo, watch)
        return _run_flow("capture", config, server.start(), lambda _, *rest: carry_out(job, todo, *rest))


def _train(config: TrainConfig) -> Any:
    """Run the flow, unless there is a finished student and nothing to train: it is reported, or refused."""
    if Path(config.output, RECORD).exists():
        # Imported here, as they take seconds: the flow imports them beside the start of the server.
        from softlabel.pipeline.students.folder import StudentFolder
        from softlabel.pipeline.training.train import train

        if not StudentFolder(Path(config.output).absolute()).has_work(config):
            return train(config)
    return _run_here("train", config)


def _run_here(name: str, config: Settings) -> Any:
    """Run a flow on a server of this process, if its inputs exist."""
    _require_inputs(config)
    return _run_flow(name, config, server.start())


def _require_inputs(config: Settings) -> None:
    """Refuse tables and documents that do not exist, as the flow would.

    Raises:
        SoftlabelError: if there is no such table, or there are no such documents.
    """
    from softlabel.pipeline.documents.readers import find
    from softlabel.storage.opening import exists
    from softlabel.storage.views.view import open_table

    tables: tuple[str, ...] = ()
    match config:
        case EstimateConfig() | DistillConfig():
            find(config.documents)
        case MixConfig():
            tables = config.tables
        case ReprocessConfig():
            tables = (config.source,)
        case CompareConfig():
            tables = (config.table,) if config.table else ()
        case TrainConfig() | EvaluateConfig() | VerifyConfig() | MaintainConfig():
            tables = (config.table,)
    for table in tables:
        if not exists(table):
            open_table(table)


def _run_flow(name: str, config: Settings, embedded: Child | None = None, work: Any = None) -> Any:
    """Run the flow of that name, or one that does this part of its work, on the configured or the embedded server."""
    with ExitStack() as stack:
        with chdir(NEUTRAL):
            # Importing the flow takes seconds, and so does starting the server: both go on at the same time.
            engine, module = import_module("softlabel.flows.running.engine"), import_module(f"softlabel.flows.{name}")
            flow = getattr(module, f"{name}_flow") if work is None else module.flow_of(work)
            if embedded:
                stack.enter_context(engine.connected(server.address()))
        return engine.run(flow, config)


@contextmanager
def _lines() -> Iterator[None]:
    """Print our log records on stderr, as plain lines or as JSON."""
    if logs.format_of_lines() == "json":
        logs.print_json_lines()
    ours, lines = logging.getLogger("softlabel"), logging.StreamHandler(sys.stderr)
    ours.addHandler(lines)
    ours.propagate = False
    try:
        yield
    finally:
        ours.propagate = True
        ours.removeHandler(lines)
