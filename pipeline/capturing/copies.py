"""Sequences that need no teacher: the table already has them, or has their key under another document.

A plan is made once, at the start of a run. What other runs have committed since then is found here, shard by shard,
before the teacher runs. Runs that overlap go through their shards in different orders.
"""

import random
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from softlabel.pipeline.capturing.corrections import staged_rows
from softlabel.pipeline.capturing.job import CaptureJob
from softlabel.pipeline.digests import row_digests
from softlabel.pipeline.progress import Progress, Watch, unwatched
from softlabel.storage.staging import staged_shards
from softlabel.storage.table import Table
from softlabel.storage.writer import Commit, ShardWriter, present_rows


def own_order(shards: Sequence[Path], table: str) -> Sequence[Path]:
    """The shards in random order, so that two runs over the same documents seldom work on the same one.

    The first shard of a new table stays first, because its ids decide how the table numbers them.
    """
    first = 0 if Table.exists(table) else 1
    return [*shards[:first], *random.SystemRandom().sample(shards[first:], len(shards[first:]))]


def still_pending(job: CaptureJob, path: Path) -> pa.Table:
    """The sequences of one file of a plan that the teacher still has to run over.

    Sequences that the table has are left out. Those whose key it has under another document are written to a file of
    their own, ``late_copies(path)``, for ``copy_rows``.

    Args:
        job: the capture.
        path: Parquet file of sequences, from ``CapturePlan.shards``.

    Raises:
        ProvenanceError: if another run has meanwhile created a different table.
    """
    sequences = pq.read_table(path)
    if not Table.exists(job.table):
        return sequences
    table = Table.open(job.table)
    table.identity.require(job.identity, job.table)
    if job.is_correction:
        staged, _ = staged_rows(table)  # by a worker that died after it had staged them
        return sequences.filter(pa.array(~staged.has(row_digests(sequences))))
    rows, keys = present_rows(table, sequences)
    if not job.kind.copies:
        keys = rows
    if (keys & ~rows).any():
        pq.write_table(sequences.filter(pa.array(keys & ~rows)), late_copies(path))
    return sequences.filter(pa.array(~keys)) if keys.any() else sequences


def late_copies(path: Path) -> Path:
    """File for the sequences of a plan's file whose keys were added to the table since the plan; it may not exist."""
    return path.with_name(f"{path.stem}-copies.parquet")


def copy_rows(job: CaptureJob, path: Path, watch: Watch = unwatched) -> Commit:
    """Copy to the sequences of one file of a plan the soft labels that the table has for the same keys.

    Args:
        job: the capture.
        path: Parquet file of sequences, from ``CapturePlan.copies``; the plan's shards must be committed.
        watch: called before and after, in sequences of this file.

    Raises:
        ProvenanceError: if the table is no longer the one that was planned for.
    """
    sequences, table = pq.read_table(path), Table.open(job.table)
    table.identity.require(job.identity, job.table)
    watch(Progress("copy", 0, len(sequences), "sequences"))
    with ShardWriter(table, job.settings.shards.row_group_sequences) as writer:
        writer.append_copies(sequences, list(staged_shards(table)) if job.is_correction else [])
        commit = writer.stage() if job.is_correction else writer.commit({"operation": "copy"})
    watch(Progress("copy", len(sequences), len(sequences), "sequences"))
    return commit
