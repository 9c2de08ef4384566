"""Looks at every byte of a table, without its teacher, and names each file that is damaged, missing or foreign.

Reads a few shards at once, each a row group at a time; of each row it keeps 8 bytes, to find those that are there
twice. ``remove_damaged`` takes shards out of the newest version, after which their rows are pending again.
"""

import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from deltalake.transaction import RemoveAction

from softlabel.storage.commit_files import LOG
from softlabel.storage.committing import all_or_nothing, committed
from softlabel.storage.errors import IntegrityError, recapture
from softlabel.storage.identity import circumstances
from softlabel.storage.places.place import REJECTS, SIDE_FOLDER
from softlabel.storage.reader import outline
from softlabel.storage.schema import PARTITION, ROW_KEY, row_keys
from softlabel.storage.shard_file import RowKey
from softlabel.storage.sidecars import read_tokenizer, read_vocabulary
from softlabel.storage.state import Shard
from softlabel.storage.table import Table
from softlabel.storage.upkeep.examination import Hashes, WrongShardError, examine
from softlabel.storage.upkeep.log import Log, problems, replay
from softlabel.storage.versions import damaged_records, vacuumed

_EXPLAINED = re.compile(
    rf"{LOG}/(\d{{20}}\.(json|checkpoint\..*)|_last_checkpoint)|{REJECTS}|"
    rf"{SIDE_FOLDER}/((writing|rewritten)/.*|(tags|pins|vacuumed|purged)/.*\.json|maintenance\.lock)"
)
"""Files of a table that no version names."""
_THREADS = 4
"""Shards that are looked at side by side, each with one row group in memory."""
_SHOWN = 20
"""Findings that fit one screen."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    path: str
    """Of the file, relative to the table."""
    problem: str


@dataclass(frozen=True)
class Verification:
    """What a look at every byte has found."""

    location: str
    version: int
    shards: int
    """Shards that were looked at."""
    rows: int
    bytes: int
    findings: tuple[Finding, ...]
    orphans: tuple[str, ...]
    """Files that nothing explains: of no version, of a writer that was stopped, or of a commit that is gone."""
    removed: tuple[str, ...] = ()
    """Shards that were taken out of the newest version."""
    removed_rows: int = 0
    """Their rows, which are pending again."""

    @property
    def unsolved(self) -> tuple[Finding, ...]:
        """What is wrong still."""
        return tuple(finding for finding in self.findings if finding.path not in self.removed)


def damage(found: Verification) -> IntegrityError:
    """The error that says what was found, a line each."""
    lines = [f"{finding.path}: {finding.problem}" for finding in found.unsolved]
    more = [f"... and {len(lines) - _SHOWN} more (--json lists all)"] if len(lines) > _SHOWN else []
    return IntegrityError(
        "this table is damaged",
        expected="files that match the hashes in their names and in the commits",
        found="\n               ".join(lines[:_SHOWN] + more),
        where=f"{found.location}@{found.version}",
        do="restore these files from a copy of the table; or remove the damaged shards from its newest version with"
        + recapture(found.location),
        details=found,
    )


def verify(
    table: Table, *, all_versions: bool = False, watch: Callable[[int, int], None] | None = None
) -> Verification:
    """Look at every byte of a version: its shards, its vocabulary, its tokenizer; and of the table's log and records.

    A shard's content must have the hash in its name; its rows the number that its commit says, the table's columns,
    lists of lengths that fit each other, and ids that there are; and each row must be in a version only once.

    Args:
        table: the version.
        all_versions: look at the shards of every version that can be opened, too.
        watch: told of each shard: bytes that were looked at, and bytes to look at in all.

    Raises:
        IntegrityError: if the table's log can't be read; whatever else is wrong is in what is returned.
        AccessError: if something can't be read at the moment, so that nothing can be said of it.
    """
    log, kept = replay(table), _Opened(table)
    findings = [Finding(*problem) for problem in problems(table, log).items()]
    shards = dict.fromkeys(table.listed, table.version)
    if all_versions and not findings:
        shards |= {shard: version for shard, version in _ever(log, vacuumed(table.location)) if shard not in shards}
    for version in sorted(set(shards.values()) | {table.version}):
        findings += kept.beside(version)
    findings += [Finding(name, "a damaged record") for name in damaged_records(table.location)]
    spans: dict[str, list[range]] = defaultdict(list)
    for named in log.named:
        spans[named.path].append(named.versions)
    rows, done, total = _Rows(table), 0, sum(shard.bytes for shard in shards)
    for shard, found in _examined([(kept[version], shard) for shard, version in shards.items()]):
        if isinstance(found, WrongShardError):
            findings.append(Finding(shard.path, str(found)))
        else:
            rows.add(shard, spans[shard.path] if all_versions else [range(table.version, table.version + 1)], found)
        done += shard.bytes
        if watch:
            watch(done, total)
    findings += rows.twice()
    return Verification(
        location=table.location,
        version=table.version,
        shards=len(shards),
        rows=rows.count,
        bytes=total,
        findings=tuple(dict.fromkeys(findings)),
        orphans=_orphans(table, log),
    )


def remove_damaged(found: Verification) -> Verification:
    """Take every shard that something is wrong with out of the newest version, in one commit.

    Its rows are pending from then on: a capture of the same documents brings exactly them back. The files stay where
    they are, for the versions that name them, until ``maintain`` vacuums these.

    Raises:
        TableError: if the commit can't be written.
    """
    damaged = {finding.path for finding in found.findings}
    while True:
        newest = Table.open(found.location)
        going = [shard for shard in newest.shards() if shard.path in damaged]
        if not going:
            return found
        now = int(time.time() * 1000)
        actions = [RemoveAction(shard.path, True, now, shard.bytes, {PARTITION: shard.split}) for shard in going]
        about = {
            "operation": f"remove {len(going)} damaged shards",
            "circumstances": circumstances(),
            "sequences": -sum(shard.rows for shard in going),
            "bytes": -sum(shard.bytes for shard in going),
        }
        with all_or_nothing(found.location):
            done = committed(newest, actions, about)
        if done:
            removed = tuple(shard.path for shard in going)
            return replace(found, removed=removed, removed_rows=sum(shard.rows for shard in going))


def _examined(jobs: Sequence[tuple[Table, Shard]]) -> Iterator[tuple[Shard, Hashes | WrongShardError]]:
    """Each shard with what came of looking at it, in order."""

    def look(job: tuple[Table, Shard]) -> Hashes | WrongShardError:
        try:
            return examine(*job)
        except WrongShardError as wrong:
            return wrong

    pool = ThreadPoolExecutor(_THREADS, "softlabel-verify")
    try:
        yield from zip((shard for _, shard in jobs), pool.map(look, jobs), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)


class _Opened:
    """The versions that shards are looked at in."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self._versions = {table.version: table}

    def __getitem__(self, version: int) -> Table:
        if version not in self._versions:
            self._versions[version] = Table.open(f"{self._table.location}@{version}")
        return self._versions[version]

    def beside(self, version: int) -> Iterator[Finding]:
        """What is wrong with a version's vocabulary and tokenizer."""
        table = self[version]
        for check, name in ((read_vocabulary, table.vocabulary_name), (read_tokenizer, table.tokenizer_name)):
            try:
                check(table.place, name)
            except IntegrityError as error:
                yield Finding(f"{SIDE_FOLDER}/{name}", str(error).splitlines()[0])


class _Rows:
    """All rows of the versions that are looked at, by a hash of what makes each the only one of its version."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self._parts: list[tuple[Shard, list[range], Hashes]] = []
        self.count = 0

    def add(self, shard: Shard, versions: list[range], hashes: Hashes) -> None:
        """Remember a shard's rows, and the versions that have them."""
        self.count += len(hashes)
        self._parts.append((shard, versions, hashes))

    def twice(self) -> Iterator[Finding]:
        """Shards with rows that another shard of the same version has too."""
        suspects = self._suspects()
        holders: dict[RowKey, list[tuple[str, list[range]]]] = defaultdict(list)
        for shard, versions, hashes in self._parts if len(suspects) else ():
            rows = np.flatnonzero(np.isin(hashes, suspects))
            if not len(rows):
                continue
            keys = row_keys(pa.concat_tables(outline(self._table, shard, ROW_KEY)).take(pa.array(rows)))
            others = Counter({shard.path: len(keys) - len(set(keys))})
            for key in set(keys):
                others.update([path for path, theirs in holders[key] if _meet(theirs, versions)][:1])
                holders[key].append((shard.path, versions))
            for path, count in (+others).items():
                yield Finding(shard.path, f"{count} of its rows are duplicates of rows in {path}")

    def _suspects(self) -> Hashes:
        """Hashes that come twice in a version: sorted by where they begin, one begins before the last has ended."""
        spans = [(hashes, span) for _, versions, hashes in self._parts for span in versions]
        hashes = np.concatenate([np.zeros(0, np.uint64), *(part for part, _ in spans)])
        starts = np.repeat([span.start for _, span in spans], [len(part) for part, _ in spans])
        stops = np.repeat([span.stop for _, span in spans], [len(part) for part, _ in spans])
        order = np.lexsort((starts, hashes))
        hashes, starts, stops = hashes[order], starts[order], stops[order]
        return np.unique(hashes[1:][(hashes[1:] == hashes[:-1]) & (starts[1:] < stops[:-1])])


def _meet(some: list[range], others: list[range]) -> bool:
    return any(a.start < b.stop and b.start < a.stop for a in some for b in others)


def _ever(log: Log, gone: set[int]) -> Iterator[tuple[Shard, int]]:
    """Every shard that a version names which can be opened, and the newest such version."""
    for named in log.named:
        version = next((version for version in reversed(named.versions) if version not in gone), None)
        if named.shard is not None and version is not None:
            yield named.shard, version


def _orphans(table: Table, log: Log) -> tuple[str, ...]:
    shards = {named.path for named in log.named if named.shard}
    beside = tuple(f"{SIDE_FOLDER}/{named.path}" for named in log.named if not named.shard)
    paths = (file.name for file in table.place.files() if not _EXPLAINED.fullmatch(file.name))
    return tuple(sorted(path for path in paths if path not in shards and not path.startswith(beside)))
