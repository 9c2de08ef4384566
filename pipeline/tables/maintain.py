"""Maintain a table: tag, untag and unpin versions, and delete files that no version uses."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from softlabel.pipeline.config.tables import MaintainConfig
from softlabel.storage.records.versions import Pin, Tag, new_tag, parse, pin_of, pins, tag, tag_of, tags, unpin, untag
from softlabel.storage.table import Table
from softlabel.storage.upkeep import maintenance
from softlabel.storage.upkeep.card import update_card
from softlabel.storage.upkeep.maintenance import Maintenance


@dataclass(frozen=True)
class MaintainReport:
    """What was deleted, and which versions are tagged or pinned then."""

    table: str
    deletion: Maintenance | None
    """None if the settings only tag, untag or unpin versions."""
    tags: list[Tag]
    pins: list[Pin]
    unpinned: tuple[Pin, ...] = ()
    """Pins of students that are gone, which were removed, or would be."""
    dry_run: bool = False
    """Whether nothing was written, and this is what would be."""


def maintain(config: MaintainConfig, *, dry_run: bool = False) -> MaintainReport:
    """Tag, untag and unpin versions, or delete files that no version uses and nobody is writing.

    With tag, untag or unpin, nothing is deleted unless ``vacuum`` is set too.

    Args:
        config: what to do.
        dry_run: only report what would be done.

    Raises:
        TableNotFoundError: if there is no such table or version.
        TableError: if the table can't be written.
    """
    table = Table.open(config.table).location
    names, held = _tags_and_pins(config, table, dry_run)
    changed = bool(config.untag or config.unpin or config.tag)
    gone = tuple(_gone(held, config.unpin_gone_after_days)) if config.unpin_gone_after_days is not None else ()
    for student in () if dry_run else gone:
        unpin(table, student.student)
    held = [pin for pin in held if pin not in gone]
    deletion = None
    if config.vacuum or not changed:
        protected = {tag.version for tag in names.values()} | {pin.version for pin in held}
        deletion = maintenance.maintain(
            parse(config.table)[0],
            keep_versions=config.keep_versions if config.vacuum else None,
            grace_hours=config.grace_hours,
            dry_run=dry_run,
            needed_versions=protected if dry_run else None,
        )
    if deletion and not dry_run:
        update_card(table)
    return MaintainReport(table, deletion, list(names.values()), held, gone, dry_run)


def _gone(held: Iterable[Pin], days: float) -> Iterator[Pin]:
    """Pins of students whose folder is gone, that are older than this."""
    limit = datetime.now(UTC) - timedelta(days=days)
    for pin in held:
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


def _tags_and_pins(config: MaintainConfig, table: str, dry_run: bool) -> tuple[dict[str, Tag], list[Pin]]:
    """Tag, untag and unpin as the settings say; returns the tags by name and the pins as they are then.

    A dry run raises the same errors, and writes nothing.
    """
    names, held = tags(table), pins(table)
    if config.untag:
        freed = tag_of(table, config.untag) if dry_run else untag(table, config.untag)
        names.pop(freed.name, None)
    if config.unpin:
        unpinned = pin_of(table, config.unpin) if dry_run else unpin(table, config.unpin)
        held.remove(unpinned)
    if config.tag:
        name, _, wanted = config.tag.partition("=")
        version = Table.open(f"{table}@{wanted}" if wanted else config.table).version
        names[name] = new_tag(table, version, name, names) if dry_run else tag(table, version, name)
    return (dict(sorted(names.items())), held) if dry_run else (tags(table), pins(table))
