"""Finds the files that each version of a table uses, by replaying the table's whole log once.

Delta opens one version at a time; to find files that no version uses, or only old versions, all versions are needed.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from softlabel.storage.errors import IntegrityError
from softlabel.storage.log.checkpoints import LAST_CHECKPOINT, checkpoint_problem, hinted, write_checkpoint
from softlabel.storage.log.files import LOG, commit_file, commits, list_log, read_bytes, unreadable_commit
from softlabel.storage.log.snapshot import load
from softlabel.storage.log.state import Chain, Shard, added_shard, named_path, table_metadata
from softlabel.storage.places.place import SIDE_FOLDER, Place
from softlabel.storage.table import Table

_SIDECAR_PROPERTIES = ("softlabel.vocabulary", "softlabel.tokenizer")
"""Properties of a version whose values are files in the side folder."""
_THREADS = 8
"""Commits that are read in parallel: in a bucket, each is a request."""


@dataclass(frozen=True)
class Named:
    """A file, and one range of versions that use it."""

    path: str
    """Relative to the table; of the tokenizer, the folder."""
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
    """Replay a table's log up to its newest version; damaged checkpoints do not matter.

    Raises:
        IntegrityError: if a commit is missing or damaged.
    """
    log = replay(table)
    for name, problem in (log.damaged or _mismatches(table, log)).items():
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
        return read_bytes(place, version)
    except OSError as error:
        raise unreadable_commit(place, version, error) from error


def problems(table: Table, log: Log) -> dict[str, str]:
    """Problems of a log by file: of commits; or else of checkpoints and of the newest commits.

    Raises:
        AccessError: if the log can't be read at the moment.
    """
    return log.damaged or {**checkpoint_problems(table, log), **_mismatches(table, log)}


def checkpoint_problems(table: Table, log: Log) -> dict[str, str]:
    """Damaged checkpoints by file, each with its problem; the table can be read without them.

    Raises:
        AccessError: if the log can't be read at the moment.
    """
    there = list_log(table.place)[1]
    found = {
        names[0]: problem
        for version, names in there.items()
        if version in log.versions and (problem := checkpoint_problem(table.place, version, names))
    }
    hint = hinted(table.place)
    if hint not in there and any(file.name == LAST_CHECKPOINT for file in table.place.files(LOG)):
        found[LAST_CHECKPOINT] = "names no checkpoint that exists" if hint else "can't be read"
    return found


def renew_checkpoints(table: Table, log: Log) -> list[str]:
    """Write damaged checkpoints anew, from the commits; returns their files.

    Raises:
        OSError: if a file can't be read or written.
    """
    found, there = checkpoint_problems(table, log), list_log(table.place)[1]
    if found:
        damaged = {version for version, names in there.items() if names[0] in found}
        for name in {LAST_CHECKPOINT, *(name for version in damaged for name in there[version])}:
            table.place.delete(name)  # something else, such as a folder, could not be replaced
        for version in sorted({*damaged, max(there, default=log.newest)}):  # the last one is the newest
            write_checkpoint(table.place, version)
    return list(found)


def _mismatches(table: Table, log: Log) -> dict[str, str]:
    """Commits of the given and the newest version, if they do not match the log before them, with the problem."""
    found = {}
    for version in {table.version, log.newest}:
        snapshot = load(table.place, version)
        try:
            if snapshot is not None:
                snapshot.require_sound(table.place)
        except IntegrityError as error:
            found[commit_file(version)] = str(error).splitlines()[0]
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
            shard = added_shard(action["add"])
            self._add(version, shard.path, shard)
        elif "remove" in action:
            self._remove(version, named_path(action["remove"]["path"]))
        elif "metaData" in action:
            properties = table_metadata(action["metaData"])["configuration"]
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
        for path in self._sidecars:
            self._remove(version, path)
        self._sidecars = [f"{SIDE_FOLDER}/{name}" for name in names]
        for path in self._sidecars:
            self._add(version, path, None)
