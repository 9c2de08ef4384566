"""Keep a table tidy: name versions, let go of them, and delete the files that nobody needs."""

from dataclasses import dataclass

from softlabel.pipeline.config.tables import MaintainConfig
from softlabel.storage.table import Table
from softlabel.storage.upkeep import maintenance
from softlabel.storage.upkeep.maintenance import Maintenance
from softlabel.storage.versions import Pin, Tag, parse, pins, tag, tags, unpin, untag


@dataclass(frozen=True)
class MaintainReport:
    """What was deleted, and who needs which version now."""

    table: str
    deletion: Maintenance | None
    """None if the settings only name versions, or let go of them."""
    tags: list[Tag]
    pins: list[Pin]


def maintain(config: MaintainConfig) -> MaintainReport:
    """Name versions and let go of them; delete what no version names and nobody is writing.

    If the settings name versions or let go of them, nothing is deleted unless ``vacuum`` asks for it.

    Raises:
        TableNotFoundError: if there is no such table or version.
        TableError: if the table can't be written.
    """
    table = Table.open(config.table).location
    named = _change_names(config)
    deletion = _delete(config) if config.vacuum or not named else None
    return MaintainReport(table, deletion, list(tags(table).values()), pins(table))


def _change_names(config: MaintainConfig) -> bool:
    """Tag, untag and unpin; return whether any of that was asked for."""
    table = parse(config.table)[0]
    if config.untag:
        untag(table, config.untag)
    if config.unpin:
        unpin(table, config.unpin)
    if config.tag:
        name, _, version = config.tag.partition("=")
        tag(table, Table.open(f"{table}@{version}" if version else config.table).version, name)
    return bool(config.untag or config.unpin or config.tag)


def _delete(config: MaintainConfig) -> Maintenance:
    return maintenance.maintain(
        parse(config.table)[0],
        keep_versions=config.keep_versions if config.vacuum else None,
        grace_hours=config.grace_hours,
        dry_run=config.dry_run,
    )
