"""Checks every byte of a table, without its teacher, and lists each file that is damaged, missing or unknown.

Reads a few shards in parallel, one row group at a time, and keeps 8 bytes of each row to find duplicates.
``remove_damaged`` removes shards from the newest version, so that a new capture brings their rows back.
"""

import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from deltalake.transaction import RemoveAction

from softlabel.storage.committing import all_or_nothing, try_commit
from softlabel.storage.errors import IntegrityError, recapture
from softlabel.storage.key_index import damaged_files
from softlabel.storage.log.files import LOG
from softlabel.storage.log.state import Shard
from softlabel.storage.places.place import REJECTS, SIDE_FOLDER
from softlabel.storage.reader import outline
from softlabel.storage.records.versions import damaged_records, vacuumed
from softlabel.storage.schema import PARTITION, ROW_KEY, RowKey, row_keys
from softlabel.storage.sidecars import read_tokenizer, read_vocabulary
from softlabel.storage.table import Table
from softlabel.storage.upkeep.examination import Hashes, WrongShardError, examine
from softlabel.storage.upkeep.replay import Log, problems, replay

_KNOWN_FILES = re.compile(
    rf"README\.md|{LOG}/(\d{{20}}\.(json|checkpoint\..*)|_last_checkpoint)|{REJECTS}|"
    rf"{SIDE_FOLDER}/((writing|rewritten|unread)/.*|(tags|pins|vacuumed|purged|derived)/.*\.json|keys/[0-9a-f]{{32}}\.parquet|maintenance\.lock)"
)
"""Files that belong to a table although no version uses them."""
_KEYS_DAMAGED = (
    "this file of keys does not match the hash in its name; it is ignored, and softlabel maintain replaces it"
)
_THREADS = 4
"""Shards that are checked in parallel, each with one row group in memory."""
_SHOWN = 20
"""Number of findings that fit on one screen."""


@dataclass(frozen=True)
class Finding:
    """One problem of a table."""

    path: str
    """File, relative to the table."""
    problem: str


@dataclass(frozen=True)
class Verification:
    """The result of checking a table."""

    location: str
    version: int
    shards: int
    """Number of shards that were checked."""
    rows: int
    bytes: int
    findings: tuple[Finding, ...]
    orphans: tuple[str, ...]
    """Unknown files: foreign ones, leftovers of a stopped writer, or shards whose commit is missing."""
    removed: tuple[str, ...] = ()
    """Shards that were removed from the newest version."""
    removed_rows: int = 0
    """Number of rows in the removed shards; a capture brings them back."""

    @property
    def unsolved(self) -> tuple[Finding, ...]:
        """Findings other than those about removed shards."""
        return tuple(finding for finding in self.findings if finding.path not in self.removed)


def damage(found: Verification) -> IntegrityError:
    """The error that lists the unsolved findings, one per line."""
    lines = [f"{finding.path}: {finding.problem}" for finding in found.unsolved]
    more = [f"... and {len(lines) - _SHOWN} more (--json lists all)"] if len(lines) > _SHOWN else []
    shards = any(finding.path.startswith(f"{PARTITION}=") for finding in found.unsolved)
    remove = f"; or remove the damaged shards from its newest version with{recapture(found.location)}"
    return IntegrityError(
        "this table is damaged",
        expected="files that match the hashes in their names and in the commits",
        found="\n               ".join(lines[:_SHOWN] + more),
        where=f"{found.location}@{found.version}",
        do="restore these files from a copy of the table" + (remove if shards else ""),
        details=found,
    )


def verify(
    table: Table, *, all_versions: bool = False, watch: Callable[[int, int], None] | None = None
) -> Verification:
    """Check every byte of a version (its shards, vocabulary and tokenizer) and of the table's log and records.

    A shard must match the hash in its name, and have the number of rows in its commit, the table's columns, lists with
    matching lengths, and valid token ids. Each row must be in a version only once.

    Args:
        table: version to check.
        all_versions: also check the shards of every other version that can be opened.
        watch: called after each shard with the bytes checked so far and the total.

    Raises:
        IntegrityError: if the table's log can't be read; other problems are returned as findings.
        AccessError: if something can't be read at the moment.
    """
    table = table.unchecked()
    log, versions = replay(table), _Versions(table)
    findings = [Finding(*problem) for problem in problems(table, log).items()]
    shards = dict.fromkeys(table.listed, table.version)
    if all_versions and not findings:
        with suppress(IntegrityError):  # a damaged record, which is a finding; it hides which versions remain
            gone = vacuumed(table.location)
            shards |= {shard: version for shard, version in _shards_in_log(log, gone) if shard not in shards}
    for version in sorted(set(shards.values()) | {table.version}):
        findings += versions.sidecar_findings(version)
    findings += [Finding(name, "the record is damaged") for name in damaged_records(table.location)]
    findings += [Finding(name, _KEYS_DAMAGED) for name in damaged_files(table.place)]
    spans: dict[str, list[range]] = defaultdict(list)
    for named in log.named:
        spans[named.path].append(named.versions)
    rows, done, total = _Rows(table), 0, sum(shard.bytes for shard in shards)
    for shard, found in _examined([(versions[version], shard) for shard, version in shards.items()]):
        if isinstance(found, WrongShardError):
            findings.append(Finding(shard.path, str(found)))
        else:
            rows.add(shard, spans[shard.path] if all_versions else [range(table.version, table.version + 1)], found)
        done += shard.bytes
        if watch:
            watch(done, total)
    findings += rows.duplicates()
    return Verification(
        location=table.location,
        version=table.version,
        shards=len(shards),
        rows=rows.count,
        bytes=total,
        findings=tuple(dict.fromkeys(findings)),
        orphans=_orphans(table, log),
    )


def remove_damaged(found: Verification, *, dry_run: bool = False) -> Verification:
    """Remove every shard with a finding from the newest version, in one commit.

    A capture of the same documents then brings exactly the missing rows back. The files stay, for old versions that use
    them, until ``maintain`` vacuums these versions.

    Raises:
        TableError: if the commit can't be written.
    """
    damaged = {finding.path for finding in found.findings}
    while True:
        newest = Table.open(found.location)
        going = [shard for shard in newest.shards() if shard.path in damaged]
        if not going:
            return found
        removed = replace(
            found, removed=tuple(shard.path for shard in going), removed_rows=sum(shard.rows for shard in going)
        )
        if dry_run:
            return removed
        now = int(time.time() * 1000)
        actions = [RemoveAction(shard.path, True, now, shard.bytes, {PARTITION: shard.split}) for shard in going]
        about = {
            "operation": f"remove {len(going)} damaged shards",
            "sequences": -sum(shard.rows for shard in going),
            "bytes": -sum(shard.bytes for shard in going),
        }
        with all_or_nothing(found.location):
            done = try_commit(newest, actions, about)
        if done:
            return removed


def _examined(jobs: Sequence[tuple[Table, Shard]]) -> Iterator[tuple[Shard, Hashes | WrongShardError]]:
    """Each shard with the hashes of its rows, or with the error that was found, in order."""

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


class _Versions:
    """Opens versions of a table, each once."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self._versions = {table.version: table}

    def __getitem__(self, version: int) -> Table:
        if version not in self._versions:
            self._versions[version] = Table.open(f"{self._table.location}@{version}").unchecked()
        return self._versions[version]

    def sidecar_findings(self, version: int) -> Iterator[Finding]:
        """Problems of a version's vocabulary and tokenizer."""
        table = self[version]
        for check, name in ((read_vocabulary, table.vocabulary_name), (read_tokenizer, table.tokenizer_name)):
            try:
                check(table.place, name)
            except IntegrityError as error:
                yield Finding(f"{SIDE_FOLDER}/{name}", str(error).splitlines()[0])


class _Rows:
    """Finds duplicate rows in the checked versions, by hashes of the rows' unique keys."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self._parts: list[tuple[Shard, list[range], Hashes]] = []
        self.count = 0

    def add(self, shard: Shard, versions: list[range], hashes: Hashes) -> None:
        """Add the rows of a shard, with the ranges of versions that have it."""
        self.count += len(hashes)
        self._parts.append((shard, versions, hashes))

    def duplicates(self) -> Iterator[Finding]:
        """Findings for shards with rows that are also elsewhere in the same version."""
        suspects = self._suspects()
        holders: dict[RowKey, list[tuple[str, list[range]]]] = defaultdict(list)
        for shard, versions, hashes in self._parts if len(suspects) else ():
            rows = np.flatnonzero(np.isin(hashes, suspects))
            if not len(rows):
                continue
            keys = row_keys(pa.concat_tables(outline(self._table, shard, ROW_KEY)).take(pa.array(rows)))
            others = Counter({shard.path: len(keys) - len(set(keys))})
            for key in set(keys):
                others.update([path for path, theirs in holders[key] if _overlap(theirs, versions)][:1])
                holders[key].append((shard.path, versions))
            for path, count in (+others).items():
                yield Finding(shard.path, f"{count} of its rows are duplicates of rows in {path}")

    def _suspects(self) -> Hashes:
        """Hashes that occur twice in a version: in order of start, one range starts before the previous one ends."""
        spans = [(hashes, span) for _, versions, hashes in self._parts for span in versions]
        hashes = np.concatenate([np.zeros(0, np.uint64), *(part for part, _ in spans)])
        starts = np.repeat([span.start for _, span in spans], [len(part) for part, _ in spans])
        stops = np.repeat([span.stop for _, span in spans], [len(part) for part, _ in spans])
        order = np.lexsort((starts, hashes))
        hashes, starts, stops = hashes[order], starts[order], stops[order]
        return np.unique(hashes[1:][(hashes[1:] == hashes[:-1]) & (starts[1:] < stops[:-1])])


def _overlap(some: list[range], others: list[range]) -> bool:
    return any(a.start < b.stop and b.start < a.stop for a in some for b in others)


def _shards_in_log(log: Log, gone: set[int]) -> Iterator[tuple[Shard, int]]:
    """Every shard of the versions that can be opened, each with the newest such version."""
    for named in log.named:
        version = next((version for version in reversed(named.versions) if version not in gone), None)
        if named.shard is not None and version is not None:
            yield named.shard, version


def _orphans(table: Table, log: Log) -> tuple[str, ...]:
    shards = {named.path for named in log.named if named.shard}
    sidecars = tuple(named.path for named in log.named if not named.shard)
    paths = (file.name for file in table.place.files() if not _KNOWN_FILES.fullmatch(file.name))
    return tuple(sorted(path for path in paths if path not in shards and not path.startswith(sidecars)))
