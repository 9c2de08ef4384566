"""Describes a view for users: its tables, their weights and the sequences that they have in common."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.compute as pc

from softlabel.storage.identity import SelectionIdentity
from softlabel.storage.upkeep.inspection import HistoryEntry, last_capture
from softlabel.storage.upkeep.verification import Verification
from softlabel.storage.views.row_groups import outlines
from softlabel.storage.views.view import View


@dataclass(frozen=True)
class ViewPart:
    """One table of a view."""

    table: str
    """TABLE@version."""
    weight: float
    """How often its sequences occur in an epoch, or its share of the average."""
    teacher: str
    selection: SelectionIdentity
    bytes: int


@dataclass(frozen=True)
class ViewSplit:
    """Size of one split of a view; sequences that occur several times in an epoch are counted once."""

    sequences: int
    tokens: int
    positions: int


@dataclass(frozen=True)
class ViewInspection:
    """A view and its tables."""

    location: str
    how: str
    time: str
    user: str
    temperatures: tuple[float, ...]
    parts: tuple[ViewPart, ...]
    splits: dict[str, ViewSplit]
    left_out: int
    """Sequences of an average that are in some of its tables but not in all."""


def inspect_view(view: View) -> ViewInspection:
    """Measure a view; reads only small columns of its tables.

    Raises:
        IntegrityError: if a shard is missing, or damaged in these columns.
    """
    sizes: dict[str, Counter[str]] = {}
    for group, rows in outlines(view, ["tokens", "positions"]):
        size = sizes.setdefault(group.shard.split, Counter())
        size["sequences"] += len(rows)
        size.update({name: pc.sum(rows.column(name)).as_py() or 0 for name in rows.column_names})
    parts = [
        ViewPart(
            table=name,
            weight=weight,
            teacher=Path(last_capture(table).teacher or "").name,
            selection=table.identity.selection,
            bytes=sum(shard.bytes for shard in table.shards()),
        )
        for name, table, weight in zip(view.names, view.tables, view.weights, strict=True)
    ]
    return ViewInspection(
        location=view.location,
        how=view.definition.how,
        time=view.definition.time,
        user=view.definition.user,
        temperatures=view.temperatures,
        parts=tuple(parts),
        splits={name: ViewSplit(**sizes[name]) for name in sorted(sizes, reverse=True)},
        left_out=view.alignment.left_out if view.average else 0,
    )


def whole(view: View, found: Sequence[Verification]) -> Verification:
    """The verifications of a view's tables as one, if nothing is wrong in any of them."""
    return Verification(
        location=view.location,
        version=View.version,
        shards=sum(table.shards for table in found),
        rows=sum(table.rows for table in found),
        bytes=sum(table.bytes for table in found),
        findings=(),
        orphans=tuple(f"{table.location}/{path}" for table in found for path in table.orphans),
    )


def view_history(view: View) -> list[HistoryEntry]:
    """The history of a view: a single entry, because a view never changes."""
    found = inspect_view(view)
    made = f"{found.how} {', '.join(view.names)}"
    sequences, positions = (sum(getattr(s, n) for s in found.splits.values()) for n in ("sequences", "positions"))
    return [HistoryEntry(View.version, found.time, made, found.user, sequences, positions, 0)]
