"""Describes a table for users: its size by split and by column, and its history."""

from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from softlabel.storage.commit_message import CommitMessage
from softlabel.storage.credentials import masked
from softlabel.storage.reader import open_shard, outline, read
from softlabel.storage.schema import SOFT_LABELS
from softlabel.storage.state import Shard
from softlabel.storage.table import Table

_SAMPLED_SHARDS = 4
"""Number of shards from which the entropies are estimated, with one row group of each."""


@dataclass(frozen=True)
class SplitSize:
    """Size of one split."""

    shards: int
    documents: int
    sequences: int
    tokens: int
    positions: int
    bytes: int


@dataclass(frozen=True)
class ColumnSize:
    """Size of one column over all shards."""

    bytes: int
    bytes_per_position: float
    entropy_per_position: float | None
    """Bytes with a perfect code for single values, estimated from a sample; None for columns other than soft
    labels."""


@dataclass(frozen=True)
class Inspection:
    """One version of a table."""

    location: str
    version: int
    splits: dict[str, SplitSize]
    columns: dict[str, ColumnSize]
    soft_label_bytes_per_position: float
    """Bytes of all soft-label columns together."""
    soft_label_entropy_per_position: float
    """Entropies of all soft-label columns together, in bytes."""


@dataclass(frozen=True)
class HistoryEntry:
    """Summary of one commit."""

    version: int
    time: str
    """UTC, ISO 8601."""
    operation: str
    user: str
    sequences: int
    positions: int
    bytes: int
    run: str | None = None
    """The scheduler's id of the run that made it; None if no scheduler started it."""
    flow: str | None = None
    """Name of the scheduler's flow."""


def inspect(table: Table) -> Inspection:
    """Measure a table; checks the content of its shards first.

    Raises:
        IntegrityError: if a shard is damaged or missing.
    """
    # First, because it checks the hash: a damaged footer, which has no checksum, could stop a reader of pages.
    sizes = column_bytes(table)
    splits, entropies = _splits(table), _entropies(table)
    positions = sum(split.positions for split in splits.values())
    columns = {
        name: ColumnSize(size, size / positions if positions else 0.0, entropies.get(name))
        for name, size in sizes.items()
    }
    soft_labels = sum(columns[name].bytes_per_position for name in SOFT_LABELS.names if name in columns)
    return Inspection(table.location, table.version, splits, columns, soft_labels, sum(entropies.values()))


def column_bytes(table: Table) -> dict[str, int]:
    """Compressed bytes of each column over all shards, from their footers.

    Raises:
        IntegrityError: if a shard is damaged.
    """
    sizes: dict[str, int] = {}
    for shard in table.shards():
        with open_shard(table, shard) as file:
            metadata = file.metadata
        for group in range(metadata.num_row_groups):
            for index in range(metadata.num_columns):
                column = metadata.row_group(group).column(index)
                name = column.path_in_schema.split(".")[0]
                sizes[name] = sizes.get(name, 0) + column.total_compressed_size
    return sizes


def history(table: Table) -> list[HistoryEntry]:
    """Summaries of a table's commits, newest first."""
    entries = []
    for commit in table.history():
        about = CommitMessage.of(commit, table.location)
        entries.append(
            HistoryEntry(
                version=commit["version"],
                time=datetime.fromtimestamp(commit["timestamp"] / 1000, UTC).isoformat(timespec="seconds"),
                operation=about.operation or commit["operation"].lower(),
                user=about.circumstances.get("user", ""),
                sequences=about.sequences,
                positions=about.positions,
                bytes=about.bytes,
                run=about.circumstances.get("run"),
                flow=about.circumstances.get("flow"),
            )
        )
    return entries


def last_capture(table: Table) -> CommitMessage:
    """What the newest capture wrote about its commit; without a capture, a message that names no teacher."""
    for commit in table.commits():
        message = CommitMessage.of(commit, table.location)
        if message.teacher is not None:
            return message.model_copy(update={"teacher": masked(message.teacher)})
    return CommitMessage()


def _splits(table: Table) -> dict[str, SplitSize]:
    splits = {}
    for split in sorted({shard.split for shard in table.shards()}, reverse=True):
        shards = table.shards(split)
        columns = ["document_id", "tokens", "positions"]
        rows = pa.concat_tables(part for shard in shards for part in outline(table, shard, columns))
        splits[split] = SplitSize(
            shards=len(shards),
            documents=pc.count_distinct(rows.column("document_id")).as_py(),
            sequences=len(rows),
            tokens=pc.sum(rows.column("tokens")).as_py(),
            positions=pc.sum(rows.column("positions")).as_py(),
            bytes=sum(shard.bytes for shard in shards),
        )
    return splits


def _entropies(table: Table) -> dict[str, float]:
    """Bytes per position with a perfect code for single values, for each soft-label column."""
    sample = sorted(table.shards(), key=lambda shard: -shard.rows)[:_SAMPLED_SHARDS]
    if not sample:
        return {}
    groups = [read(table, shard, SOFT_LABELS.names, [_middle(table, shard)]) for shard in sample]
    positions = sum(len(column.flatten()) for group in groups for column in group.column("entropies").chunks)
    values = {
        name: np.concatenate([chunk.flatten().to_numpy() for group in groups for chunk in group.column(name).chunks])
        for name in SOFT_LABELS.names
    }
    return {name: _entropy(column) * len(column) / 8 / max(positions, 1) for name, column in values.items()}


def _middle(table: Table, shard: Shard) -> int:
    with open_shard(table, shard) as file:
        return int(file.num_row_groups // 2)


def _entropy(values: NDArray[np.generic]) -> float:
    """Entropy of the values' frequencies, in bits per value."""
    if not len(values):
        return 0.0
    shares = np.unique(values, return_counts=True)[1] / len(values)
    return float(abs((shares * np.log2(shares)).sum()))  # not -0
