"""The versions of a table or a view: who made them, when, and which are tagged or pinned."""

from dataclasses import dataclass, field

from softlabel.storage.records.takedown import purged_versions
from softlabel.storage.records.versions import Pin, Tag, pins, tags, vacuumed
from softlabel.storage.upkeep import inspection
from softlabel.storage.upkeep.inspection import HistoryEntry
from softlabel.storage.views.view import View, open_table
from softlabel.storage.views.view_inspection import view_history


@dataclass(frozen=True)
class HistoryReport:
    """The versions of a table."""

    versions: list[HistoryEntry]
    tags: list[Tag] = field(default_factory=list)
    pins: list[Pin] = field(default_factory=list)
    """Students, with the version that each was trained on."""
    vacuumed: list[int] = field(default_factory=list)
    """Versions that can no longer be opened because a vacuum deleted their files."""
    purged: list[int] = field(default_factory=list)
    """Versions that can no longer be opened because a purge deleted some of their rows."""


def history(table: str) -> HistoryReport:
    """List the versions of a table or a view.

    Args:
        table: folder or s3://BUCKET/PREFIX.

    Raises:
        TableNotFoundError: if the table does not exist.
        IntegrityError: if its log is damaged.
    """
    opened = open_table(table)
    if isinstance(opened, View):
        return HistoryReport(view_history(opened))
    purged = set(purged_versions(opened.location))
    return HistoryReport(
        versions=inspection.history(opened),
        tags=list(tags(opened.location).values()),
        pins=pins(opened.location),
        vacuumed=sorted(vacuumed(opened.location) - purged),
        purged=sorted(purged),
    )
