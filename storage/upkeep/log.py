"""Which files each version of a table names: the table's whole log, read once however many versions there are.

Delta opens one version at a time; what no version names, and what only old ones do, takes all of them to tell.
"""

import json
from bisect import bisect_left
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from softlabel.storage.commit_files import checkpoints, commit_file, commits, unreadable
from softlabel.storage.errors import IntegrityError
from softlabel.storage.places.place import Place
from softlabel.storage.schema import PARTITION
from softlabel.storage.state import Chain, Shard
from softlabel.storage.table import Table
from softlabel.storage.versions import remaining

_BESIDE = ("softlabel.vocabulary", "softlabel.tokenizer")
"""Properties of a version that name files in the side folder."""
_THREADS = 8
"""Commits that are read side by side: in a bucket, each is a request."""


@dataclass(frozen=True)
class Named:
    """A file, and one run of the versions that name it."""

    path: str
    """Relative to the table; for what lies beside the shards, its name in the side folder."""
    versions: range
    shard: Shard | None
    """None for what lies beside the shards."""


@dataclass(frozen=True)
class Log:
    """What all versions of a table name."""

    first: int
    """The oldest version that the log still has."""
    newest: int
    named: list[Named]
    """A path that was removed and came back is here once for each time."""
    damaged: dict[str, str]
    """Commits that are not the ones that were written, and how that is known."""

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
    """What a log says, whether or not it is the one that was written.

    Raises:
        IntegrityError: if a file of it can't be read.
    """
    newest, there = table.newest().version, commits(table.place)
    first = newest
    while first - 1 in there:
        first -= 1
    replay = _Replay(table.place)
    if first:  # somebody has cleaned the log; its rest begins with a checkpoint
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
        raise unreadable(place, version, error) from error


def problems(table: Table, log: Log) -> dict[str, str]:
    """What is wrong with a log, by file: a commit; or a checkpoint; or else what the newest commits say.

    Raises:
        AccessError: if that can't be told at the moment.
    """
    if log.damaged:
        return log.damaged
    kept, files = sorted(remaining(table.location)), checkpoints(table.place)
    after = {kept[i]: name for version, name in files.items() if (i := bisect_left(kept, version)) < len(kept)}
    last = {version: commit_file(version) for version in (table.version, log.newest) if version in kept}
    return _unlike_commits(table, after) or _unlike_commits(table, last)


def _unlike_commits(table: Table, blamed: Mapping[int, str]) -> dict[str, str]:
    """Versions that Delta reads otherwise than their commits say, by the file that is to blame for each."""
    found = {}
    for version, name in blamed.items():
        try:
            Table.open(f"{table.location}@{version}").shards()
        except IntegrityError as error:
            found[name] = str(error).splitlines()[0]
    return found


class _Replay:
    """What the version that was reached names, and what earlier ones did."""

    def __init__(self, place: Place) -> None:
        self.chain = Chain()
        self._place = place
        self._begun: int | None = None
        self._since: dict[str, tuple[int, Shard | None]] = {}
        self._beside: list[str] = []
        self._past: list[Named] = []

    def begin(self, table: Table) -> None:
        """Start from a version instead of from nothing."""
        self._begun = table.version
        for shard in table.shards():
            self._add(table.version, shard.path, shard)
        self._name_beside(table.version, [table.vocabulary_name, table.tokenizer_name])

    def commit(self, version: int, content: bytes) -> None:
        """Take a commit into account."""
        try:
            actions = self.chain.add(version, content)
            for action in actions if version != self._begun else ():
                self._step(version, action)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise unreadable(self._place, version, error) from error

    def _step(self, version: int, action: dict[str, Any]) -> None:
        """Take one line of a commit into account."""
        if "add" in action:
            add = action["add"]
            path = unquote(add["path"])
            rows = json.loads(add.get("stats") or "{}").get("numRecords", 0)
            self._add(version, path, Shard(path, add["partitionValues"][PARTITION], rows, add["size"]))
        elif "remove" in action:
            self._remove(version, unquote(action["remove"]["path"]))
        elif "metaData" in action:
            properties = action["metaData"]["configuration"]
            self._name_beside(version, [properties[name] for name in _BESIDE])

    def end(self, newest: int) -> list[Named]:
        """Everything that was ever named."""
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

    def _name_beside(self, version: int, names: list[str]) -> None:
        for name in self._beside:
            self._remove(version, name)
        for name in names:
            self._add(version, name, None)
        self._beside = names
