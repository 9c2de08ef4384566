"""Describes a table for users: its size by split and by column, what its columns hold, and its history."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from softlabel.storage.credentials import masked
from softlabel.storage.log.commit_message import CommitMessage
from softlabel.storage.reader import Outline
from softlabel.storage.schema import SOFT_LABELS
from softlabel.storage.table import Table
from softlabel.storage.upkeep.contents import Contents, SplitSize, contents
from softlabel.storage.upkeep.label_sample import LabelSample, label_sample


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
    contents: Contents
    """What the columns of the documents hold."""
    labels: LabelSample
    """What the soft labels of some positions hold."""
    oldest: "HistoryEntry | None"
    """The first commit that added rows; None if there is none."""
    newest: "HistoryEntry"
    """The last commit."""


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


def inspect(table: Table, watch: Callable[[int, int], None] = lambda done, total: None) -> Inspection:
    """Measure a table; reads the footers, small columns and a sample of the soft labels. ``verify`` checks every byte.

    Args:
        table: version to measure.
        watch: called after each shard, with the number of shards that are measured, and of all.

    Raises:
        IntegrityError: if a shard is missing, or damaged in what is read.
    """
    found, labels, commits = contents(table, watch), label_sample(table), history(table)
    positions = sum(split.positions for split in found.splits.values())
    columns = {
        name: ColumnSize(size, size / positions if positions else 0.0, labels.entropies.get(name))
        for name, size in found.column_bytes.items()
    }
    return Inspection(
        location=table.location,
        version=table.version,
        splits=found.splits,
        columns=columns,
        soft_label_bytes_per_position=sum(
            columns[name].bytes_per_position for name in SOFT_LABELS.names if name in columns
        ),
        soft_label_entropy_per_position=sum(labels.entropies.values()),
        contents=found,
        labels=labels,
        oldest=next((commit for commit in reversed(commits) if commit.sequences), None),
        newest=commits[0],
    )


def column_bytes(table: Table) -> dict[str, int]:
    """Compressed bytes of each column over all shards, from their footers.

    Raises:
        IntegrityError: if a shard is missing, or its footer is damaged.
    """
    sizes = Counter[str]()
    for shard in table.shards():
        with Outline(table, shard) as opened:
            sizes.update(opened.column_bytes())
    return dict(sizes)


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
