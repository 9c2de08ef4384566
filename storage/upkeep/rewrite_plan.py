"""Decides which rows of a table go into which new shard, from a few small columns; reads and writes no soft labels."""

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
    """What becomes of the rows of one version."""

    source: Table
    target: Table
    """At the version that is changed: the source itself, or another table, which lacks the rows or has them already."""
    positions: int
    """Captured positions of a new shard."""
    row_group: int
    """Sequences of a row group."""
    keep: Callable[[pa.Table], NDArray[np.bool_]] | None = None
    """Which rows stay, by the columns below and the split; all if left out. Documents that were taken down go."""
    columns: tuple[str, ...] = ()
    split: Callable[[str], str] | None = None
    """Split of a document's rows, if that changes."""
    narrowing: Narrowing | None = None
    identity: Identity | None = None
    """What the table is from now on, if it changes in place."""
    compact: bool = False
    """Also merge shards that are less than half full."""
    exclusive: bool = False
    """Refuse to commit if anything at all was committed meanwhile, and not only if a shard that was read is gone."""

    @property
    def in_place(self) -> bool:
        """Whether the rows stay in their table."""
        return self.source.place.address == self.target.place.address


@dataclass
class Rewritten:
    """What a rewriting came to."""

    version: int = 0
    sequences: int = 0
    """Rows that went into new shards ..."""
    left: int = 0
    """... and that stayed where they are."""
    dropped: int = 0
    dropped_positions: int = 0
    positions: int = 0
    shards: int = 0
    """New shards ..."""
    replaced: int = 0
    """... and those that they stand for."""
    bytes: int = 0
    """Of new shards, less those that they stand for in the same table."""


_Piece = tuple[Shard, int, NDArray[np.int64]]
"""Shard, row group, and rows of it."""


@dataclass
class Output:
    """A shard to come."""

    split: str
    positions: int = 0
    pieces: list[_Piece] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """How many it will have."""
        return sum(len(rows) for _, _, rows in self.pieces)

    def is_just(self, shard: Shard) -> bool:
        """Whether this is a shard that is there already."""
        return self.split == shard.split and self.rows == shard.rows and {s for s, _, _ in self.pieces} == {shard}


def outputs(job: Rewriting, done: Rewritten, removed: list[Shard], tell: Callable[[], None]) -> Iterator[Output]:
    """The shards to come, each as soon as it is full.

    Args:
        job: what to do.
        done: here it is counted what is dropped or left.
        removed: here the shards are noted that are replaced.
        tell: called when a shard of the source has been looked at.
    """
    present, refused = _present(job), refusal(job.target.location)
    filling: dict[str, Output] = {}
    for shard in job.source.shards():
        groups = list(_decide(job, shard, present, refused))
        positions = sum(int(group.positions.sum()) for group in groups)
        small = job.compact and positions < job.positions / 2
        if job.in_place and not small and not job.narrowing and not any(group.changes(shard) for group in groups):
            done.left += shard.rows
            tell()
            continue
        removed += [shard] if job.in_place else []
        for number, group in enumerate(groups):
            done.left += int(group.present.sum())
            done.dropped += int((~group.kept & ~group.present).sum())
            done.dropped_positions += int(group.positions[~group.kept & ~group.present].sum())
            for split in dict.fromkeys(group.splits[group.kept].tolist()):
                rows = np.flatnonzero(group.kept & (group.splits == split))
                yield from _fill(filling, split, (shard, number, rows), group.positions[rows], job.positions)
        tell()
    yield from filling.values()


def _fill(
    filling: dict[str, Output], split: str, piece: _Piece, positions: NDArray[np.int64], limit: int
) -> Iterator[Output]:
    """Put rows into the split's shard to come; whenever it is full, it is done and another begins."""
    shard, group, rows = piece
    while len(rows):
        output = filling.setdefault(split, Output(split))
        count = int(np.searchsorted(np.cumsum(positions), limit - output.positions, side="right"))
        if not count and output.pieces:
            yield filling.pop(split)
            continue
        count = max(count, 1)  # a sequence alone may be longer than a shard
        output.pieces.append((shard, group, rows[:count]))
        output.positions += int(positions[:count].sum())
        rows, positions = rows[count:], positions[count:]


@dataclass(frozen=True)
class _Decision:
    """What becomes of R rows of a row group."""

    kept: NDArray[np.bool_]
    """(R,) which rows go into new shards."""
    present: NDArray[np.bool_]
    """(R,) which rows the target has already."""
    splits: NDArray[np.object_]
    positions: NDArray[np.int64]

    def changes(self, shard: Shard) -> bool:
        """Whether a row goes or moves."""
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
    """Rows that another table has already."""
    if job.in_place:
        return set()
    shards = job.target.shards()
    return {row for shard in shards for part in outline(job.target, shard, ROW_KEY) for row in row_keys(part)}
