"""Maintain a table: tag, untag and unpin versions, and delete files that no version uses."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from softlabel.pipeline.config.tables import MaintainConfig
from softlabel.storage.table import Table
from softlabel.storage.upkeep import maintenance
from softlabel.storage.upkeep.card import update_card
from softlabel.storage.upkeep.maintenance import Maintenance
from softlabel.storage.versions import Pin, Tag, parse, pins, tag, tags, unpin, untag


@dataclass(frozen=True)
class MaintainReport:
    """What was deleted, and which versions are tagged or pinned now."""

    table: str
    deletion: Maintenance | None
    """None if the settings only tag, untag or unpin versions."""
    tags: list[Tag]
    pins: list[Pin]
    unpinned: tuple[Pin, ...] = ()
    """Pins of students that are gone, which were removed, or would be."""


def maintain(config: MaintainConfig) -> MaintainReport:
    """Tag, untag and unpin versions, or delete files that no version uses and nobody is writing.

    With tag, untag or unpin, nothing is deleted unless ``vacuum`` is set too.

    Raises:
        TableNotFoundError: if there is no such table or version.
        TableError: if the table can't be written.
    """
    table = Table.open(config.table).location
    changed = _change_tags_and_pins(config)
    gone = tuple(_gone(table, config.unpin_gone_after_days)) if config.unpin_gone_after_days is not None else ()
    for student in () if config.dry_run else gone:
        unpin(table, student.student)
    deletion = _delete(config) if config.vacuum or not changed else None
    if deletion and not config.dry_run:
        update_card(table)
    return MaintainReport(table, deletion, list(tags(table).values()), pins(table), gone)


def _gone(table: str, days: float) -> Iterator[Pin]:
    """Pins of students whose folder is gone, that are older than this."""
    limit = datetime.now(UTC) - timedelta(days=days)
    for pin in pins(table):
        folder = Path(pin.student)
        if pin.kind == "student" and folder.is_absolute() and datetime.fromisoformat(pin.time) <= limit:
            unfinished = folder.with_name(f"{folder.name}.training")
            if not folder.exists() and not unfinished.exists() and _has_content(folder.parent):
                yield pin


def _has_content(folder: Path) -> bool:
    """Whether a folder has anything in it; the folder in which a disk is mounted is empty without the disk."""
    try:
        return any(folder.iterdir())
    except OSError:
        return False


def _change_tags_and_pins(config: MaintainConfig) -> bool:
    """Tag, untag and unpin as the settings say; return whether they say so."""
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
