"""Finds the files that each version of a table uses, by replaying the table's whole log once.

Delta opens one version at a time; to find files that no version uses, or only old versions, all versions are needed.
"""

import json
from bisect import bisect_left
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from softlabel.storage.errors import IntegrityError
from softlabel.storage.log_files import checkpoints, commit_file, commits, unreadable_commit
from softlabel.storage.places.place import Place
from softlabel.storage.schema import PARTITION
from softlabel.storage.state import Chain, Shard
from softlabel.storage.table import Table
from softlabel.storage.versions import remaining

_SIDECAR_PROPERTIES = ("softlabel.vocabulary", "softlabel.tokenizer")
"""Properties of a version whose values are files in the side folder."""
_THREADS = 8
"""Commits that are read in parallel: in a bucket, each is a request."""


@dataclass(frozen=True)
class Named:
    """A file, and one range of versions that use it."""

    path: str
    """Relative to the table; for the vocabulary and the tokenizer, relative to the side folder."""
    versions: range
    shard: Shard | None
    """None for the vocabulary and the tokenizer."""


@dataclass(frozen=True)
class Log:
    """The files that the versions of a table use."""

    first: int
    """The oldest version in the log."""
    newest: int
    named: list[Named]
    """A file that was removed and added again has one entry for each range of versions."""
    damaged: dict[str, str]
    """Damaged or foreign commits, each with its problem."""

    @property
    def versions(self) -> range:
        """All versions of the log."""
        return range(self.first, self.newest + 1)


def read_log(table: Table) -> Log:
    """Replay a table's log up to its newest version.

    Raises:
        IntegrityError: if a file of it is missing or damaged.
    """
    log = replay(table)
    for name, problem in problems(table, log).items():
        raise IntegrityError(
            "the table's log is damaged",
            found=problem,
            where=table.place.where(name),
            do="restore this file from a copy of the table",
        )
    return log


def replay(table: Table) -> Log:
    """Replay a log without checking that it is undamaged.

    Raises:
        IntegrityError: if a file of it can't be read.
    """
    newest, there = table.newest().version, commits(table.place)
    first = newest
    while first - 1 in there:
        first -= 1
    replay = _Replay(table.place)
    if first:  # another program has removed old commits; the log begins with a checkpoint
        replay.begin(Table.open(f"{table.location}@{first}"))
    versions = range(first, newest + 1)
    with ThreadPoolExecutor(_THREADS, "softlabel-log") as pool:
        contents = pool.map(lambda version: _content(table.place, version), versions)
        for version, content in zip(versions, contents, strict=True):
            replay.commit(version, content)
    return Log(first, newest, replay.end(newest), replay.chain.damaged)


def _content(place: Place, version: int) -> bytes:
    try:
        return place.read(commit_file(version))
    except OSError as error:
        raise unreadable_commit(place, version, error) from error


def problems(table: Table, log: Log) -> dict[str, str]:
    """Problems of a log by file: of commits; or else of checkpoints; or else of the newest commits.

    Raises:
        AccessError: if the log can't be read at the moment.
    """
    if log.damaged:
        return log.damaged
    kept, files = sorted(remaining(table.location)), checkpoints(table.place)
    after = {kept[i]: name for version, name in files.items() if (i := bisect_left(kept, version)) < len(kept)}
    last = {version: commit_file(version) for version in (table.version, log.newest) if version in kept}
    return _mismatches(table, after) or _mismatches(table, last)


def _mismatches(table: Table, blamed: Mapping[int, str]) -> dict[str, str]:
    """Files that are to blame for versions which Delta does not read as their commits describe, with the problem."""
    found = {}
    for version, name in blamed.items():
        try:
            Table.open(f"{table.location}@{version}").shards()
        except IntegrityError as error:
            found[name] = str(error).splitlines()[0]
    return found


class _Replay:
    """Replays commits in order, and records which versions use each file."""

    def __init__(self, place: Place) -> None:
        self.chain = Chain()
        self._place = place
        self._start_version: int | None = None
        self._since: dict[str, tuple[int, Shard | None]] = {}
        self._sidecars: list[str] = []
        self._past: list[Named] = []

    def begin(self, table: Table) -> None:
        """Start from a version instead of from an empty table."""
        self._start_version = table.version
        for shard in table.shards():
            self._add(table.version, shard.path, shard)
        self._name_sidecars(table.version, [table.vocabulary_name, table.tokenizer_name])

    def commit(self, version: int, content: bytes) -> None:
        """Replay a commit."""
        try:
            actions = self.chain.add(version, content)
            for action in actions if version != self._start_version else ():
                self._step(version, action)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise unreadable_commit(self._place, version, error) from error

    def _step(self, version: int, action: dict[str, Any]) -> None:
        """Replay one line of a commit."""
        if "add" in action:
            add = action["add"]
            path = unquote(add["path"])
            rows = json.loads(add.get("stats") or "{}").get("numRecords", 0)
            self._add(version, path, Shard(path, add["partitionValues"][PARTITION], rows, add["size"]))
        elif "remove" in action:
            self._remove(version, unquote(action["remove"]["path"]))
        elif "metaData" in action:
            properties = action["metaData"]["configuration"]
            self._name_sidecars(version, [properties[name] for name in _SIDECAR_PROPERTIES])

    def end(self, newest: int) -> list[Named]:
        """All files that any version uses."""
        for path in list(self._since):
            self._remove(newest + 1, path)
        return self._past

    def _add(self, version: int, path: str, shard: Shard | None) -> None:
        self._remove(version, path)
        self._since[path] = version, shard

    def _remove(self, version: int, path: str) -> None:
        if path in self._since:
            since, shard = self._since.pop(path)
            if since < version:
                self._past.append(Named(path, range(since, version), shard))

    def _name_sidecars(self, version: int, names: list[str]) -> None:
        for name in self._sidecars:
            self._remove(version, name)
        for name in names:
            self._add(version, name, None)
        self._sidecars = names
