"""Carry out a plan on this machine: its shards, by one process or several, and then its copies."""

from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq

from softlabel.pipeline.capturing.copies import copy_rows, late_copies, own_order
from softlabel.pipeline.capturing.job import CaptureJob
from softlabel.pipeline.capturing.plan_files import Pending
from softlabel.pipeline.capturing.shard import capture_shard
from softlabel.pipeline.capturing.steps import StepDecorator
from softlabel.pipeline.capturing.worker_pool import Workers, split_shards
from softlabel.pipeline.cards import holding
from softlabel.pipeline.devices import occupied, worker_devices
from softlabel.pipeline.log_context import about
from softlabel.pipeline.progress import CombinedProgress, Progress, Watch
from softlabel.storage.writer import Commit

ShardStep = Callable[[CaptureJob, Path, Watch], Commit]


def run_plan(
    job: CaptureJob, todo: Pending, watch: Watch, decorate: StepDecorator
) -> tuple[list[Commit], list[Commit]]:
    """Process the pending files of a plan, and return the commits of the shards and of the copies.

    Args:
        job: the capture.
        todo: the files.
        watch: called after each batch.
        decorate: applied to each step.
    """
    devices = worker_devices(job.settings.teacher)

    def run_step(worker: str, step: ShardStep, path: Path, stage: CombinedProgress) -> Commit:
        with about(shard=path.stem), stage.piece(worker) as watch_piece:
            return decorate(step)(job, path, watch_piece)

    capturing = CombinedProgress(Progress("capture", 0, todo.positions, "positions"), watch)
    shards = own_order(split_shards(todo.shards, len(devices)), job.table)
    with holding(occupied(job.settings.teacher, len(shards))):
        if min(len(devices), len(shards)) > 1:
            with Workers(devices[: len(shards)], todo.folder) as workers:
                commits = workers.each(shards, lambda w, path: run_step(w.name, w.capture_shard, path, capturing))
        else:
            commits = [run_step("", capture_shard, path, capturing) for path in shards]
    to_copy = [*todo.copies, *filter(Path.exists, map(late_copies, shards))]
    sequences = sum(pq.read_metadata(path).num_rows for path in to_copy)
    copying = CombinedProgress(Progress("copy", 0, sequences, "sequences"), watch)
    return commits, [run_step("", copy_rows, path, copying) for path in to_copy]
