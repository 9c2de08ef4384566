"""Deletes files that no version of a table uses and nobody is writing; on request, also those of old versions.

Also renews what only makes a table faster to use: damaged checkpoints of the log, and the files of keys.

Writers that were killed, or lost a race, leave such files: unfinished shards, shards that were never committed, shards
of an unfinished rewrite, and unused copies of the vocabulary and tokenizer. A vacuum also drops old versions, but never
the newest, nor one with a tag or a pin.

Files of active writers are spared. On this machine, locks show which writers are active. Locks of other machines may be
invisible, and a bucket has none; so a file is also spared until it has been unchanged for a grace period, by the clock
of its place. Its age is checked again just before it is deleted: a writer that is about to commit an identical file has
made it young, and checks after its commit that it exists (``storage.writer``). Only a writer that does all of this
between the last check and the deletion would lose a file; ``verify`` would report it.

If a clock jumps back, files seem younger and are kept longer. If it jumps forward by more than the grace period, active
writers' files on other machines seem old: then use a grace period that is longer than the jump.
"""

import re
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby

from softlabel.storage.errors import TableError, UsageError
from softlabel.storage.key_index import tidy
from softlabel.storage.log.files import LOG
from softlabel.storage.places.open import place_of
from softlabel.storage.places.place import SIDE_FOLDER, WRITING, File, Place
from softlabel.storage.records.versions import needed, retire, vacuumed
from softlabel.storage.schema import PARTITION
from softlabel.storage.staging import REWRITTEN
from softlabel.storage.table import Table
from softlabel.storage.upkeep.replay import Log, checkpoint_problems, read_log, renew_checkpoints

GRACE_HOURS = 24.0

_SHARD = re.compile(rf"{PARTITION}=[^/]*/[0-9a-f]{{32}}\.parquet")
_PARTIAL = re.compile(rf"{SIDE_FOLDER}/.*\.tmp|{LOG}/.*\.json(#.*|\..*\.tmp)")
_SIDECAR = re.compile(rf"{SIDE_FOLDER}/(?:vocabulary-[^/]*\.parquet|tokenizer-[^/]*)(?![^/])")


@dataclass(frozen=True)
class Leftover:
    """A file or a folder that the table does not need."""

    path: str
    """Relative to the table."""
    bytes: int
    why: str


@dataclass(frozen=True)
class Maintenance:
    """What maintenance deleted, or would delete."""

    location: str
    version: int
    """The newest version."""
    dry_run: bool
    deleted: tuple[Leftover, ...]
    spared: tuple[Leftover, ...]
    """Not needed either, but kept: younger than the grace period, or being written."""
    vacuumed: tuple[int, ...]
    """Versions that can no longer be opened because of this."""
    renewed: tuple[str, ...] = ()
    """Damaged checkpoints of the log that were written anew, or would be."""

    @property
    def bytes(self) -> int:
        """Size of everything that was deleted."""
        return sum(leftover.bytes for leftover in self.deleted)


def maintain(
    location: str,
    *,
    keep_versions: int | None = None,
    grace_hours: float = GRACE_HOURS,
    dry_run: bool = False,
    needed_versions: Collection[int] | None = None,
) -> Maintenance:
    """Delete files that the table does not need. If it is killed, the table stays valid, and it can be run again.

    Args:
        location: location of the table.
        keep_versions: number of newest versions to keep; older ones are dropped, except those with a tag or a pin, and
            those that need no file that is deleted. None drops no version.
        grace_hours: keep files that are younger than this.
        dry_run: report what would be deleted, but delete nothing.
        needed_versions: in a dry run, the versions that would have a tag or a pin; by default those that have one.

    Raises:
        TableNotFoundError: if there is no table.
        TableError: if a file can't be deleted, or a version to be dropped is being tagged or pinned.
    """
    if keep_versions is not None and keep_versions < 1:
        raise UsageError(
            "the newest version is always kept", expected="keep_versions of at least 1", found=keep_versions
        )
    location = Table.open(location).location
    place = place_of(location)
    try:
        # Only a deletion has to keep writers out and use the clock of the place.
        with nullcontext(time.time_ns()) if dry_run else place.gate(exclusive=True) as now:
            limit = now - round(grace_hours * 3600e9)
            # List the files before reading the log, so that the log has every commit of a listed file.
            files = sorted(place.files(), key=lambda file: file.name)
            table = Table.open(location)
            log = read_log(table)
            renewed = tuple(checkpoint_problems(table, log)) if dry_run else tuple(renew_checkpoints(table, log))
            protected = needed(location) if needed_versions is None else needed_versions
            dropped = _old(log, keep_versions).difference(protected)
            kept = sorted(set(log.versions) - vacuumed(location) - dropped)
            found = list(_leftovers(files, log, kept))
            deleted = [leftover for leftover, changed in found if not _is_young(place, leftover, changed, limit)]
            lost = _lost(log, {leftover.path for leftover in deleted}, dropped)
            if not dry_run:
                retire(location, lost)
                deleted = [leftover for leftover in deleted if _delete(place, leftover, limit)]
                tidy(Table.open(location))
    except OSError as error:
        raise TableError(
            "some files that the table does not need could not be deleted; the table is intact",
            expected="write permission for the folder",
            found=error,
            where=location,
            do="fix the folder's permissions, then run the same command again",
        ) from error
    spared = tuple(leftover for leftover, _ in found if leftover not in deleted)
    return Maintenance(location, log.newest, dry_run, tuple(deleted), spared, tuple(sorted(lost)), renewed)


def _old(log: Log, keep_versions: int | None) -> set[int]:
    """Versions that are not among the newest."""
    return set(log.versions[:-keep_versions] if keep_versions else range(0))


def _lost(log: Log, deleted: set[str], dropped: set[int]) -> set[int]:
    """Dropped versions that need a deleted file."""
    return {version for named in log.named if named.path in deleted for version in named.versions if version in dropped}


def _leftovers(files: list[File], log: Log, kept: list[int]) -> Iterator[tuple[Leftover, int]]:
    """Files that none of the kept versions (in order) needs, each with its time of change."""
    spans: dict[str, list[range]] = defaultdict(list)
    for named in log.named:
        spans[named.path].append(named.versions)

    def is_needed(name: str) -> bool:
        return any(bisect_left(kept, span.start) < bisect_left(kept, span.stop) for span in spans[name])

    for path, group in groupby(files, key=lambda file: _folder_or_file(file.name)):
        if why := _reason(path, path in spans, is_needed):
            parts = list(group)
            yield Leftover(path, sum(file.bytes for file in parts), why), max(file.changed for file in parts)


def _folder_or_file(name: str) -> str:
    """The file itself; or the tokenizer's folder that contains it, which is kept or deleted as a whole."""
    sidecar = _SIDECAR.match(name)
    return sidecar[0] if sidecar else name


def _reason(path: str, named: bool, is_needed: Callable[[str], bool]) -> str | None:
    """Why a file is not needed; None if it is needed, or if softlabel did not write it."""
    if named:
        return None if is_needed(path) else "only used by dropped versions"
    if _SHARD.fullmatch(path):
        return "a shard that no commit contains"
    if path.startswith(f"{WRITING}/"):
        return "an unfinished shard whose writer has stopped"
    if path.startswith(f"{REWRITTEN}/"):
        return "a shard of an unfinished rewrite"
    if _PARTIAL.fullmatch(path):
        return "a partly written file"
    if _SIDECAR.fullmatch(path):
        return "not used by any version"
    return None


def _is_young(place: Place, leftover: Leftover, changed: int, limit: int) -> bool:
    """Whether a writer may still need the file."""
    alive = place.is_written(leftover.path) if leftover.path.startswith(f"{WRITING}/") else None
    return changed > limit if alive is None else alive


def _delete(place: Place, leftover: Leftover, limit: int) -> bool:
    """Delete a file, unless a writer has made it young meanwhile; returns whether it was deleted."""
    try:
        changed = place.stat(leftover.path).changed
    except FileNotFoundError:  # a bucket has no folders
        changed = max((file.changed for file in place.files(leftover.path)), default=limit)
    if _is_young(place, leftover, changed, limit):
        return False
    place.delete(leftover.path)
    return True
