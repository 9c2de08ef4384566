"""The flow that brings a table up to date with documents: a task plans, then a task a shard captures."""

import tempfile
import time
from pathlib import Path

from prefect import flow, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE

from flows.progress import watching
from pipeline.capturing import CaptureReport, capture_shard, copy_rows, summarise, within
from pipeline.config import CaptureConfig
from pipeline.planning import Plan, plan
from pipeline.progress import Watch
from storage.writer import Commit


@task(name="plan", persist_result=False, cache_policy=NO_CACHE)
def plan_capture(config: CaptureConfig, folder: Path, watch: Watch) -> Plan:
    """Find out which sequences the table lacks."""
    return plan(config, folder, watch)


@task(name="shard", task_run_name="shard {path.stem}", persist_result=False, cache_policy=NO_CACHE)
def capture_one_shard(config: CaptureConfig, path: Path, watch: Watch) -> Commit:
    """Run the teacher over one shard's sequences and commit what it says."""
    return capture_shard(config, path, watch)


@task(name="copy", task_run_name="copy {path.stem}", persist_result=False, cache_policy=NO_CACHE)
def copy_known(config: CaptureConfig, path: Path) -> Commit:
    """Copy what the teacher said of the same sequences under other documents."""
    return copy_rows(config, path)


@flow(name="capture", persist_result=False)
def capture_flow(config: CaptureConfig) -> CaptureReport:
    """Run a teacher once over documents and keep what it knows in a table; what the table has already is left alone."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="softlabel-") as folder, watching("capture-progress") as watch:
        todo = plan_capture(config, Path(folder), watch)
        commits: list[Commit] = []
        for path in todo.shards:
            done = sum(commit.positions for commit in commits)
            commits.append(capture_one_shard(config, path, within(watch, done, todo.positions)))
        copies = [copy_known(config, path) for path in todo.copies]
        report = summarise(config, todo, commits, copies, time.monotonic() - started)
    create_table_artifact([vars(report)], key="capture", description=f"Captured into {report.table}")
    return report
