"""Which files each version of a table names: the table's whole log, read once however many versions there are.

Delta opens one version at a time; what no version names, and what only old ones do, takes all of them to tell.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import unquote

from storage.commit_files import commit_file, commits
from storage.errors import IntegrityError
from storage.place import Place
from storage.schema import PARTITION
from storage.table import Shard, Table

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

    @property
    def versions(self) -> range:
        """All versions of the log."""
        return range(self.first, self.newest + 1)


def read_log(table: Table) -> Log:
    """Replay a table's log up to its newest version.

    Raises:
        IntegrityError: if a file of it is missing or damaged.
    """
    newest, there = table.newest().version, commits(table.place)
    first = newest
    while first - 1 in there:
        first -= 1
    replay = _Replay()
    if first:  # somebody has cleaned the log; its rest begins with a checkpoint
        replay.begin(Table.open(f"{table.location}@{first}"))
    versions = range(first + bool(first), newest + 1)
    with ThreadPoolExecutor(_THREADS, "softlabel-log") as pool:
        commits_read = pool.map(partial(_actions, table.place), versions)
        for version, actions in zip(versions, commits_read, strict=True):
            for action in actions:
                replay.step(version, action)
    return Log(first, newest, replay.end(newest))


def _actions(place: Place, version: int) -> list[dict[str, Any]]:
    """The lines of a commit."""
    try:
        actions = [json.loads(line) for line in place.read(commit_file(version)).splitlines()]
        if not actions:
            raise ValueError("an empty commit, as a power cut may leave it")
        return actions
    except (OSError, ValueError) as error:
        raise IntegrityError(
            "the table's log can't be read",
            found=repr(error),
            where=place.where(commit_file(version)),
            do="restore this file from a copy of the table",
        ) from error


class _Replay:
    """What the version that was reached names, and what earlier ones did."""

    def __init__(self) -> None:
        self._since: dict[str, tuple[int, Shard | None]] = {}
        self._beside: list[str] = []
        self._past: list[Named] = []

    def begin(self, table: Table) -> None:
        """Start from a version instead of from nothing."""
        for shard in table.shards():
            self._add(table.version, shard.path, shard)
        self._name_beside(table.version, [table.vocabulary_name, table.tokenizer_name])

    def step(self, version: int, action: dict[str, Any]) -> None:
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
