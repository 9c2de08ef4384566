"""Sequences that need no teacher: the table has them by now, or has their key under another document.

A plan is as old as its run. Whatever another run has committed since then is found here, shard by shard, before the
teacher is asked; and runs that overlap go through their shards in different orders.
"""

import random
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from softlabel.pipeline.capturing.plan_files import planned_identity
from softlabel.pipeline.config.capture import CaptureConfig
from softlabel.pipeline.progress import Progress, Watch, unwatched
from softlabel.storage.identity import circumstances
from softlabel.storage.table import Table
from softlabel.storage.writer import Commit, ShardWriter, present_rows


def own_order(shards: Sequence[Path], table: str) -> Sequence[Path]:
    """The shards in an order that no other run has, so that two over the same documents seldom meet at one.

    The first of a new table stays the first: its ids decide how the table numbers them.
    """
    first = 0 if Table.exists(table) else 1
    return [*shards[:first], *random.SystemRandom().sample(shards[first:], len(shards[first:]))]


def still_pending(config: CaptureConfig, path: Path) -> pa.Table:
    """The sequences of one file of a plan that the teacher has to be asked about, now.

    Those that the table has are left out. Those whose key it has under another document are left in a file of their
    own, ``late_copies(path)``, for ``copy_rows``.

    Args:
        config: of the capture.
        path: Parquet file of sequences, from ``Plan.shards``.

    Raises:
        ProvenanceError: if another run has made another table there.
    """
    sequences = pq.read_table(path)
    if not Table.exists(config.table):
        return sequences
    table, identity = Table.open(config.table), planned_identity(sequences)
    table.identity.require(identity, config.table)
    rows, keys = present_rows(table, sequences)
    if identity.classes is not None:  # a document's label is part of what a classifier's row says
        keys = rows
    if (keys & ~rows).any():
        pq.write_table(sequences.filter(pa.array(keys & ~rows)), late_copies(path))
    return sequences.filter(pa.array(~keys)) if keys.any() else sequences


def late_copies(path: Path) -> Path:
    """Where the sequences of a plan's file are whose keys the table has got since the plan; it may not be there."""
    return path.with_name(f"{path.stem}-copies.parquet")


def copy_rows(config: CaptureConfig, path: Path, watch: Watch = unwatched) -> Commit:
    """Give the sequences of one file of a plan the soft labels that the table has for the same key; no teacher needed.

    Args:
        config: of the capture.
        path: Parquet file of sequences, from ``Plan.copies``; the plan's shards are committed.
        watch: told before and after, in sequences of this file.

    Raises:
        ProvenanceError: if the table is another by now than the one that was planned for.
    """
    sequences, table = pq.read_table(path), Table.open(config.table)
    table.identity.require(planned_identity(sequences), config.table)
    watch(Progress("copy", 0, len(sequences), "sequences"))
    with ShardWriter(table, config.shards.row_group_sequences) as writer:
        writer.append_copies(sequences)
        commit = writer.commit({"operation": "copy", "circumstances": circumstances()})
    watch(Progress("copy", len(sequences), len(sequences), "sequences"))
    return commit
