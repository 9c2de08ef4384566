"""What a table or a view holds, and its size."""

from dataclasses import dataclass
from typing import Any

from softlabel.pipeline.config.table_settings import table_settings
from softlabel.pipeline.progress import Progress, Watch, unwatched
from softlabel.storage.identity import Identity
from softlabel.storage.records.versions import Pin, Tag, pins, tags
from softlabel.storage.upkeep import inspection
from softlabel.storage.upkeep.inspection import Inspection, last_capture
from softlabel.storage.views.view import View, open_table
from softlabel.storage.views.view_inspection import ViewInspection, inspect_view


@dataclass(frozen=True)
class TableReport:
    """What a version of a table holds."""

    inspection: Inspection
    teacher: str
    """Location of the teacher in the newest capture; empty if the table's history has no capture."""
    identity: Identity
    settings: dict[str, Any]
    """Settings of a capture that the table determines, by name, such as selection.top_p: a capture takes them for those
    that are left out."""
    tags: list[Tag]
    """Tags of this version."""
    pins: list[Pin]
    """Students that were trained on this version."""


@dataclass(frozen=True)
class ViewReport:
    """What a view holds."""

    view: ViewInspection


def inspect(table: str, watch: Watch = unwatched) -> TableReport | ViewReport:
    """Measure what a table or a view holds: its rows by split, its teacher, its bytes by column.

    Args:
        table: folder or s3://BUCKET/PREFIX; ``TABLE@12`` opens version 12, ``TABLE@name`` the version with that tag.
        watch: called after each shard.

    Raises:
        TableNotFoundError: if the table or version does not exist.
        IntegrityError: if the table is damaged in what is read; ``verify`` checks every byte.
    """
    opened = open_table(table)
    if isinstance(opened, View):
        return ViewReport(inspect_view(opened))
    return TableReport(
        inspection=inspection.inspect(opened, lambda done, total: watch(Progress("inspect", done, total, "shards"))),
        teacher=last_capture(opened).teacher or "",
        identity=opened.identity,
        settings=table_settings(opened),
        tags=[tag for tag in tags(opened.location).values() if tag.version == opened.version],
        pins=[pin for pin in pins(opened.location) if pin.version == opened.version],
    )
