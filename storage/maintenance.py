"""Deletes what no version of a table names and nobody is writing; and, if asked, what only old versions name.

What a writer leaves that was killed, or lost a race: shards in the making, shards that were never committed, what a
rewriting has come to, copies of vocabulary and tokenizer that another was quicker with. A vacuum drops old versions
too, but never the newest, nor one that has a tag or the pin of a student.

A writer in flight is spared. On this machine its locks are seen, whatever its age. On another they may not be; so a
file is spared until it has lain unchanged for a grace period, by the clock that stamps this file system's files. A
clock that jumps back makes files seem younger than they are: they stay longer. One that jumps forward by more than the
grace period makes files of other machines seem old: then give no shorter grace period than the jump.
"""

import re
import shutil
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from storage.errors import TableError, UsageError
from storage.files import SIDE_FOLDER, WRITING, gate, writer_of
from storage.log import Log, read_log
from storage.rewrite import REWRITTEN
from storage.schema import PARTITION
from storage.table import Table
from storage.versions import needed, retire, vacuumed

GRACE_HOURS = 24.0

_SHARD = re.compile(r"[0-9a-f]{32}\.parquet")


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
        raise UsageError("the newest version always stays", expected="at least 1 version", found=keep_versions)
    location = Table.open(location).location
    try:
        with gate(location, alone=True) as now:
            log = read_log(Table.open(location))
            dropped = _dropped(location, log, keep_versions)
            kept = sorted(set(log.versions) - vacuumed(location) - dropped)
            deleted: list[Leftover] = []
            spared: list[Leftover] = []
            for leftover in _leftovers(Path(location), log, kept):
                young = _is_young(Path(location, leftover.path), now - 3600 * grace_hours)
                (spared if young else deleted).append(leftover)
            lost = _lost(log, {leftover.path for leftover in deleted}, dropped)
            if not dry_run:
                if lost:
                    retire(location, lost)
                for leftover in deleted:
                    _delete(Path(location, leftover.path))
    except OSError as error:
        raise TableError(
            "not all that was to be deleted could be; the table is whole",
            expected="a folder that can be written",
            found=error,
            where=location,
            do="mend the folder's permissions, then run the same command again",
        ) from error
    return Maintenance(location, log.newest, dry_run, tuple(deleted), tuple(spared), tuple(sorted(lost)))


def _dropped(location: str, log: Log, keep_versions: int | None) -> set[int]:
    """Versions that nobody needs."""
    old = log.versions[:-keep_versions] if keep_versions else range(0)
    return set(old) - needed(location)


def _lost(log: Log, deleted: set[str], dropped: set[int]) -> set[int]:
    """Those of the dropped versions that name a file which is deleted."""
    return {version for named in log.named if named.path in deleted for version in named.versions if version in dropped}


def _leftovers(folder: Path, log: Log, kept: list[int]) -> Iterator[Leftover]:
    """What none of the kept versions (in their order) names."""
    spans: dict[str, list[range]] = defaultdict(list)
    for named in log.named:
        spans[named.path].append(named.versions)

    def is_needed(name: str) -> bool:
        return any(bisect_left(kept, span.start) < bisect_left(kept, span.stop) for span in spans[name])

    for path in sorted(folder.glob(f"{PARTITION}=*/*")):
        name = str(path.relative_to(folder))
        if name in spans and not is_needed(name):
            yield _leftover(folder, path, "named by dropped versions alone")
        elif name not in spans and _SHARD.fullmatch(path.name):
            yield _leftover(folder, path, "a shard that was never committed")
    side = folder / SIDE_FOLDER
    for path in sorted(side.glob(f"{WRITING}/*")):
        yield _leftover(folder, path, "a shard in the making that its writer has left")
    for path in sorted(side.glob(f"{REWRITTEN}/*.parquet")):
        yield _leftover(folder, path, "a shard of a rewriting that was not finished")
    for path in sorted([*side.rglob("*.tmp"), *folder.glob("_delta_log/*.json#*")]):
        yield _leftover(folder, path, "written by half")
    for path in sorted([*side.glob("vocabulary-*.parquet"), *side.glob("tokenizer-*")]):
        if path.suffix != ".tmp" and not is_needed(path.name):
            yield _leftover(folder, path, "no version uses it")


def _leftover(folder: Path, path: Path, why: str) -> Leftover:
    return Leftover(str(path.relative_to(folder)), sum(_size(file) for file in [path, *path.rglob("*")]), why)


def _size(path: Path) -> int:
    with suppress(FileNotFoundError):  # its writer has finished it, or given it up, a moment ago
        return path.stat().st_size if path.is_file() else 0
    return 0


def _is_young(path: Path, limit: float) -> bool:
    """Whether a writer may be at work on a file still."""
    alive = writer_of(path) if path.parent.name == WRITING else None
    if alive is not None:
        return alive
    try:
        stat = path.stat()
    except FileNotFoundError:
        return True
    return max(stat.st_mtime, stat.st_ctime) > limit


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
