"""Plans which rows of a table go into which new shard, from a few small columns; reads and writes no soft labels."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from softlabel.storage.errors import UsageError
from softlabel.storage.identity import Identity
from softlabel.storage.log.state import Shard
from softlabel.storage.narrowing import Narrowing
from softlabel.storage.numbering import Numbering
from softlabel.storage.reader import outline, with_split
from softlabel.storage.records.takedown import refusal
from softlabel.storage.schema import PARTITION, ROW_KEY, RowKey, row_keys
from softlabel.storage.sidecars import read_vocabulary
from softlabel.storage.table import Change, Table
from softlabel.storage.writer import present_rows


@dataclass(frozen=True)
class Rewriting:
    """What to do with the rows of one version."""

    source: Table
    target: Table | None
    """The version to change: the source itself, or another table, which may have some of the rows already. None in a
    dry run for a table that does not exist."""
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
    change: Change | None = None
    """New properties of the table, if they change in place."""
    compact: bool = False
    """Also merge shards that are less than half full."""
    staged: tuple[Shard, ...] = ()
    """Staged shards of the target ..."""
    add: Callable[[pa.Table], NDArray[np.bool_]] | None = None
    """... and which of their rows to add in the same commit, given the columns of ``ROW_KEY``."""
    exclusive: bool = False
    """Refuse to commit after any other commit, and not only if a shard that was read is gone."""

    @property
    def in_place(self) -> bool:
        """Whether the rows stay in their table."""
        return self.target is not None and self.source.place.address == self.target.place.address

    @property
    def identity(self) -> Identity:
        """Identity of the new rows."""
        return (self.target or self.source).identity if self.change is None else self.change.identity

    @property
    def vocabulary(self) -> str:
        """Name of the vocabulary file of the new rows."""
        if self.change is not None and self.change.vocabulary is not None:
            return self.change.vocabulary
        return (self.target or self.source).vocabulary_name

    @cached_property
    def numbering(self) -> Numbering:
        """How the new rows write token ids."""
        return read_vocabulary((self.target or self.source).place, self.vocabulary)

    @property
    def recodes(self) -> bool:
        """Whether every row is encoded anew, because its ids are numbered otherwise or it is narrowed."""
        return self.narrowing is not None or self.vocabulary != self.source.vocabulary_name


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
    added: int = 0
    """Rows of staged shards that were added."""
    added_positions: int = 0
    positions: int = 0
    shards: int = 0
    """Number of new shards."""
    replaced: int = 0
    """Number of shards that they replace."""
    bytes: int = 0
    """Size of the new shards, minus that of the shards that they replace in the same table."""

    @property
    def seen(self) -> int:
        """Number of rows of the source that are done."""
        return self.sequences + self.left + self.dropped

    @property
    def is_empty(self) -> bool:
        """Whether rows were dropped and none is left."""
        return bool(self.dropped and not self.sequences and not self.left)


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
    """The shards to write, each as soon as it is full; the caller writes it before it asks for the next.

    Args:
        job: what to do.
        done: all counts of rows and of new shards are added here.
        removed: shards that are replaced are added here.
        report: called after each shard of the source, and after each new shard.
    """
    for output in _filled(job, done, removed, report):
        whole = output.pieces[0][0]
        if whole in removed and not job.recodes and output.is_just(whole):
            removed.remove(whole)
            done.left += whole.rows
        else:
            yield output
            done.shards += 1
            done.sequences += output.rows
            done.positions += output.positions
        report()


def plan(job: Rewriting, watch: Callable[[int], None], *, always: bool = False) -> tuple[Rewritten, list[Shard]]:
    """What ``rewrite`` would do, and the shards that it would replace. Writes nothing, and reads no soft labels.

    The numbers of rows and shards are those of the rewrite, unless a narrowing leaves a whole shard as it is. The bytes
    are estimated from those of the source, as if a narrowing took nothing away.
    """
    done, removed, size = Rewritten(), list[Shard](), 0.0
    bytes_a_row = {shard: shard.bytes / max(1, shard.rows) for shard in job.source.shards()}
    for output in outputs(job, done, removed, lambda: watch(done.seen)):
        size += sum(bytes_a_row[shard] * len(rows) for shard, _, rows in output.pieces)
    done.replaced = len(removed)
    done.bytes = round(size) - sum(shard.bytes for shard in removed)
    if done.is_empty and not always:
        raise nothing_left(job.source, done.dropped)
    changes = bool(done.shards or removed or job.change) or always
    done.version = (0 if job.target is None else job.target.version) + changes
    return done, removed


def nothing_left(source: Table, dropped: int) -> UsageError:
    """The error for a rewrite that would leave no row."""
    return UsageError(
        "no row would be left; nothing was changed",
        expected="at least one row to keep",
        found=f"{dropped:,} rows, all of which would be dropped",
        where=f"{source.location}@{source.version}",
        do="check the filter and the list of documents",
    )


def _filled(job: Rewriting, done: Rewritten, removed: list[Shard], report: Callable[[], None]) -> Iterator[Output]:
    """The planned shards, each as soon as it is full, among them those that are there already."""
    present, refused = _present(job), _refused(job)
    filling: dict[str, Output] = {}
    for shard in job.source.shards():
        groups = list(_decide(job, shard, present, refused))
        positions = sum(int(group.positions.sum()) for group in groups)
        small = job.compact and positions < job.positions / 2
        if job.in_place and not small and not job.recodes and not any(group.changes(shard) for group in groups):
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
    seen: set[RowKey] = set()
    for shard in job.staged:
        for number, group in enumerate(_decide_staged(job, shard, refused, seen)):
            rows = np.flatnonzero(group.kept)
            done.added += len(rows)
            done.added_positions += int(group.positions[rows].sum())
            yield from _fill(filling, shard.split, (shard, number, rows), group.positions[rows], job.positions)
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


def _decide(job: Rewriting, shard: Shard, present: set[RowKey], refused: Callable[[str], bool]) -> Iterator[_Decision]:
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


def _refused(job: Rewriting) -> Callable[[str], bool]:
    """Whether a document was taken down, from either table: a target gets the source's refuse list."""
    lists = [refusal(table.location) for table in (job.source, job.target) if table is not None]
    return lambda document: any(is_refused(document) for is_refused in lists)


def _decide_staged(
    job: Rewriting, shard: Shard, refused: Callable[[str], bool], seen: set[RowKey]
) -> Iterator[_Decision]:
    """What to do with the rows of a staged shard, which the table or another staged shard may have, too."""
    for rows in outline(job.source, shard, ["positions", *ROW_KEY]):
        keys = row_keys(rows)
        there, _ = present_rows(job.source, rows)
        kept = np.array([key not in seen and not refused(str(key[0])) for key in keys], bool) & ~there
        if job.add:
            kept &= job.add(rows)
        seen.update(keys)
        splits = np.full(len(rows), shard.split, object)
        yield _Decision(kept, there, splits, rows.column("positions").to_numpy().astype(np.int64))


def _present(job: Rewriting) -> set[RowKey]:
    """Rows that the target has already, if it is another table."""
    if job.in_place or job.target is None:
        return set()
    shards = job.target.shards()
    return {row for shard in shards for part in outline(job.target, shard, ROW_KEY) for row in row_keys(part)}
