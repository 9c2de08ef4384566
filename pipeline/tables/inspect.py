"""What a table or a view holds, and what it costs."""

from dataclasses import dataclass

from softlabel.storage.identity import Identity
from softlabel.storage.upkeep import inspection
from softlabel.storage.upkeep.inspection import Inspection, last_capture
from softlabel.storage.versions import Pin, Tag, pins, tags
from softlabel.storage.views.view import View, open_table
from softlabel.storage.views.view_inspection import ViewInspection, inspect_view


@dataclass(frozen=True)
class TableReport:
    """What a version of a table holds."""

    inspection: Inspection
    teacher: str
    """Where the newest capture found the teacher; empty if no capture is in the table's history."""
    identity: Identity
    tags: list[Tag]
    """Names of this version."""
    pins: list[Pin]
    """Students that need this version."""


@dataclass(frozen=True)
class ViewReport:
    """What a view holds."""

    view: ViewInspection


def inspect(table: str) -> TableReport | ViewReport:
    """Say what a table or a view holds: its rows by split, its teacher, its bytes by column.

    Args:
        table: folder or s3://BUCKET/PREFIX; ``TABLE@12`` names a version, ``TABLE@name`` the version with that tag.

    Raises:
        TableNotFoundError: if there is no such table or version.
        IntegrityError: if it is damaged.
    """
    opened = open_table(table)
    if isinstance(opened, View):
        return ViewReport(inspect_view(opened))
    return TableReport(
        inspection=inspection.inspect(opened),
        teacher=last_capture(opened).get("teacher", ""),
        identity=opened.identity,
        tags=[tag for tag in tags(opened.location).values() if tag.version == opened.version],
        pins=[pin for pin in pins(opened.location) if pin.version == opened.version],
    )
