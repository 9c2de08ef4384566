"""Deletes what no version of a table names and nobody is writing; and, if asked, what only old versions name.

What a writer leaves that was killed, or lost a race: shards in the making, shards that were never committed, what a
rewriting has come to, copies of vocabulary and tokenizer that another was quicker with. A vacuum drops old versions
too, but never the newest, nor one that has a tag or the pin of a student.

A writer in flight is spared. On this machine its locks are seen, whatever its age. On another they may not be, and in
a bucket there are none; so a file is spared until it has lain unchanged for a grace period, by the clock that stamps
the files of its place, and its age is looked at once more before it is deleted: a writer that is about to commit a twin
of it has made it young, and looks for it after its commit (``storage.writer``). Only a writer that does all that in the
moment between such a look and the deletion would lose a file: ``verify`` names it.

A clock that jumps back makes files seem younger than they are: they stay longer. One that jumps forward by more than
the grace period makes files of other machines seem old: then give no shorter grace period than the jump.
"""

import re
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby

from softlabel.storage.commit_files import LOG
from softlabel.storage.errors import TableError, UsageError
from softlabel.storage.places.open import place_of
from softlabel.storage.places.place import SIDE_FOLDER, WRITING, File, Place
from softlabel.storage.schema import PARTITION
from softlabel.storage.table import Table
from softlabel.storage.upkeep.log import Log, read_log
from softlabel.storage.upkeep.rewrite import REWRITTEN
from softlabel.storage.versions import needed, retire, vacuumed

GRACE_HOURS = 24.0

_SHARD = re.compile(rf"{PARTITION}=[^/]*/[0-9a-f]{{32}}\.parquet")
_HALF = re.compile(rf"{SIDE_FOLDER}/.*\.tmp|{LOG}/.*\.json(#.*|\..*\.tmp)")
_BESIDE = re.compile(rf"{SIDE_FOLDER}/(vocabulary-[^/]*\.parquet|tokenizer-[^/]*)(?![^/])")


@dataclass(frozen=True)
class Leftover:
    """A file, or a folder, that the table does not need."""

    path: str
    """Relative to the table."""
    bytes: int
    why: str


@dataclass(frozen=True)
class Maintenance:
    """What was deleted, or would be."""

    location: str
    version: int
    """The newest."""
    dry_run: bool
    deleted: tuple[Leftover, ...]
    spared: tuple[Leftover, ...]
    """Not needed either, but younger than the grace period, or being written."""
    vacuumed: tuple[int, ...]
    """Versions that can no longer be opened because of this."""

    @property
    def bytes(self) -> int:
        """Of all that was deleted."""
        return sum(leftover.bytes for leftover in self.deleted)


def maintain(
    location: str, *, keep_versions: int | None = None, grace_hours: float = GRACE_HOURS, dry_run: bool = False
) -> Maintenance:
    """Delete what is not needed. Killed at any moment, it leaves a valid table, and can be run again.

    Args:
        location: the table's folder.
        keep_versions: drop all but so many of the newest versions, those with a tag or a pin, and those that lose
            nothing by it; None drops none.
        grace_hours: spare files that are younger.
        dry_run: delete nothing.

    Raises:
        TableNotFoundError: if there is no table.
        TableError: if the folder can't be written, or a version that was to be dropped is tagged at this moment.
    """
    if keep_versions is not None and keep_versions < 1:
        raise UsageError(
            "the newest version is always kept", expected="keep_versions of at least 1", found=keep_versions
        )
    location = Table.open(location).location
    place = place_of(location)
    try:
        # Only who deletes has to keep writers out, and to go by the place's own clock.
        with nullcontext(time.time_ns()) if dry_run else place.gate(alone=True) as now:
            limit = now - round(grace_hours * 3600e9)
            files = sorted(place.files(), key=lambda file: file.name)  # and then the log: what has come since is in it
            log = read_log(Table.open(location))
            dropped = _dropped(location, log, keep_versions)
            kept = sorted(set(log.versions) - vacuumed(location) - dropped)
            found = list(_leftovers(files, log, kept))
            deleted = [leftover for leftover, changed in found if not _is_young(place, leftover, changed, limit)]
            lost = _lost(log, {leftover.path for leftover in deleted}, dropped)
            if not dry_run:
                if lost:
                    retire(location, lost)
                deleted = [leftover for leftover in deleted if _delete(place, leftover, limit)]
    except OSError as error:
        raise TableError(
            "some files that the table does not need could not be deleted; the table is intact",
            expected="write permission for the folder",
            found=error,
            where=location,
            do="fix the folder's permissions, then run the same command again",
        ) from error
    spared = tuple(leftover for leftover, _ in found if leftover not in deleted)
    return Maintenance(location, log.newest, dry_run, tuple(deleted), spared, tuple(sorted(lost)))


def _dropped(location: str, log: Log, keep_versions: int | None) -> set[int]:
    """Versions that nobody needs."""
    old = log.versions[:-keep_versions] if keep_versions else range(0)
    return set(old) - needed(location)


def _lost(log: Log, deleted: set[str], dropped: set[int]) -> set[int]:
    """Those of the dropped versions that name a file which is deleted."""
    return {version for named in log.named if named.path in deleted for version in named.versions if version in dropped}


def _leftovers(files: list[File], log: Log, kept: list[int]) -> Iterator[tuple[Leftover, int]]:
    """What none of the kept versions (in their order) names, with its last change."""
    spans: dict[str, list[range]] = defaultdict(list)
    for named in log.named:
        spans[named.path].append(named.versions)

    def is_needed(name: str) -> bool:
        return any(bisect_left(kept, span.start) < bisect_left(kept, span.stop) for span in spans[name])

    for path, group in groupby(files, key=lambda file: _folder_or_file(file.name)):
        if why := _why(path, path in spans, is_needed):
            parts = list(group)
            yield Leftover(path, sum(file.bytes for file in parts), why), max(file.changed for file in parts)


def _folder_or_file(name: str) -> str:
    """A tokenizer's folder is one thing, whatever is in it."""
    beside = _BESIDE.match(name)
    return beside[0] if beside else name


def _why(path: str, named: bool, is_needed: Callable[[str], bool]) -> str | None:
    """Why a file is not needed; None if it is, or is none of ours."""
    if named:
        return None if is_needed(path) else "only used by dropped versions"
    if _SHARD.fullmatch(path):
        return "a shard that no commit contains"
    if path.startswith(f"{WRITING}/"):
        return "an unfinished shard whose writer has stopped"
    if path.startswith(f"{REWRITTEN}/"):
        return "a shard of an unfinished rewrite"
    if _HALF.fullmatch(path):
        return "a partly written file"
    if (beside := _BESIDE.fullmatch(path)) and not is_needed(beside[1]):
        return "not used by any version"
    return None


def _is_young(place: Place, leftover: Leftover, changed: int, limit: int) -> bool:
    """Whether a writer may be at work on a file still."""
    alive = place.is_written(leftover.path) if leftover.path.startswith(f"{WRITING}/") else None
    return changed > limit if alive is None else alive


def _delete(place: Place, leftover: Leftover, limit: int) -> bool:
    """Delete it, unless somebody is about to commit its twin, and has made it young: whether it was deleted."""
    try:
        changed = place.stat(leftover.path).changed
    except FileNotFoundError:  # a bucket knows no folders
        changed = max((file.changed for file in place.files(leftover.path)), default=limit)
    if _is_young(place, leftover, changed, limit):
        return False
    place.delete(leftover.path)
    return True
