"""Plans which rows of a table go into which new shard, from a few small columns; reads and writes no soft labels."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from softlabel.storage.identity import Identity
from softlabel.storage.narrowing import Narrowing
from softlabel.storage.reader import outline, with_split
from softlabel.storage.schema import PARTITION, ROW_KEY, row_keys
from softlabel.storage.state import Shard
from softlabel.storage.table import Table
from softlabel.storage.takedown import refusal


@dataclass(frozen=True)
class Rewriting:
    """What to do with the rows of one version."""

    source: Table
    target: Table
    """The version to change: the source itself, or another table, which may have some of the rows already."""
    positions: int
    """Largest number of captured positions in a new shard."""
    row_group: int
    """Sequences in a row group."""
    keep: Callable[[pa.Table], NDArray[np.bool_]] | None = None
    """Which rows to keep, given ``columns`` and the split; all by default. Rows of refused documents always go."""
    columns: tuple[str, ...] = ()
    split: Callable[[str], str] | None = None
    """New split of a document, if splits change."""
    narrowing: Narrowing | None = None
    identity: Identity | None = None
    """New identity of the table, if it changes in place."""
    compact: bool = False
    """Also merge shards that are less than half full."""
    exclusive: bool = False
    """Refuse to commit after any other commit, and not only if a shard that was read is gone."""

    @property
    def in_place(self) -> bool:
        """Whether the rows stay in their table."""
        return self.source.place.address == self.target.place.address


@dataclass
class Rewritten:
    """The result of a rewrite."""

    version: int = 0
    sequences: int = 0
    """Rows that were written to new shards."""
    left: int = 0
    """Rows that stayed in their shards."""
    dropped: int = 0
    dropped_positions: int = 0
    positions: int = 0
    shards: int = 0
    """Number of new shards."""
    replaced: int = 0
    """Number of shards that they replace."""
    bytes: int = 0
    """Size of the new shards, minus that of the shards that they replace in the same table."""


_Piece = tuple[Shard, int, NDArray[np.int64]]
"""Shard, row group, and rows of the row group."""


@dataclass
class Output:
    """A planned shard."""

    split: str
    positions: int = 0
    pieces: list[_Piece] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """Number of rows that it will have."""
        return sum(len(rows) for _, _, rows in self.pieces)

    def is_just(self, shard: Shard) -> bool:
        """Whether this has exactly the rows of an existing shard."""
        return self.split == shard.split and self.rows == shard.rows and {s for s, _, _ in self.pieces} == {shard}


def outputs(job: Rewriting, done: Rewritten, removed: list[Shard], report: Callable[[], None]) -> Iterator[Output]:
    """The planned shards, each as soon as it is full.

    Args:
        job: what to do.
        done: counts of dropped and unchanged rows are added here.
        removed: shards that are replaced are added here.
        report: called after each shard of the source.
    """
    present, refused = _present(job), refusal(job.target.location)
    filling: dict[str, Output] = {}
    for shard in job.source.shards():
        groups = list(_decide(job, shard, present, refused))
        positions = sum(int(group.positions.sum()) for group in groups)
        small = job.compact and positions < job.positions / 2
        if job.in_place and not small and not job.narrowing and not any(group.changes(shard) for group in groups):
            done.left += shard.rows
            report()
            continue
        removed += [shard] if job.in_place else []
        for number, group in enumerate(groups):
            done.left += int(group.present.sum())
            done.dropped += int((~group.kept & ~group.present).sum())
            done.dropped_positions += int(group.positions[~group.kept & ~group.present].sum())
            for split in dict.fromkeys(group.splits[group.kept].tolist()):
                rows = np.flatnonzero(group.kept & (group.splits == split))
                yield from _fill(filling, split, (shard, number, rows), group.positions[rows], job.positions)
        report()
    yield from filling.values()


def _fill(
    filling: dict[str, Output], split: str, piece: _Piece, positions: NDArray[np.int64], limit: int
) -> Iterator[Output]:
    """Add rows to the split's planned shard; yield it when it is full, and begin another."""
    shard, group, rows = piece
    while len(rows):
        output = filling.setdefault(split, Output(split))
        count = int(np.searchsorted(np.cumsum(positions), limit - output.positions, side="right"))
        if not count and output.pieces:
            yield filling.pop(split)
            continue
        count = max(count, 1)  # a single sequence may be longer than a shard
        output.pieces.append((shard, group, rows[:count]))
        output.positions += int(positions[:count].sum())
        rows, positions = rows[count:], positions[count:]


@dataclass(frozen=True)
class _Decision:
    """What to do with R rows of a row group."""

    kept: NDArray[np.bool_]
    """(R,) rows that are written to new shards."""
    present: NDArray[np.bool_]
    """(R,) rows that the target has already."""
    splits: NDArray[np.object_]
    positions: NDArray[np.int64]

    def changes(self, shard: Shard) -> bool:
        """Whether any row is dropped or changes its split."""
        return bool((~self.kept).any() or (self.splits != shard.split).any())


def _decide(
    job: Rewriting, shard: Shard, present: set[tuple[object, ...]], refused: Callable[[str], bool]
) -> Iterator[_Decision]:
    columns = {"positions", "document_id", *job.columns, *(ROW_KEY if present else ())}
    for rows in outline(job.source, shard, sorted(columns - {PARTITION})):
        documents = rows.column("document_id").to_pylist()
        kept = np.array([not refused(name) for name in documents], bool)
        if job.keep:
            kept &= job.keep(with_split(rows, shard))
        there = np.zeros(len(rows), bool)
        if present:
            there[:] = [row in present for row in row_keys(rows)]
        splits = np.full(len(rows), shard.split, object)
        if job.split:
            splits[:] = [job.split(name) for name in documents]
        yield _Decision(kept & ~there, there, splits, rows.column("positions").to_numpy().astype(np.int64))


def _present(job: Rewriting) -> set[tuple[object, ...]]:
    """Rows that the target has already, if it is another table."""
    if job.in_place:
        return set()
    shards = job.target.shards()
    return {row for shard in shards for part in outline(job.target, shard, ROW_KEY) for row in row_keys(part)}
