"""What the log says about one version, read from a checkpoint and the commits after it, or from all commits.

A checkpoint that can't be read, or does not match its commit, is passed over: the commits before it say the same. From
one version, the next is reached by reading only the commits in between.
"""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from softlabel.storage.errors import IntegrityError
from softlabel.storage.log.checkpoints import hinted, read_checkpoint
from softlabel.storage.log.files import (
    FORMAT_PROPERTY,
    commit_file,
    lines_of,
    list_log,
    matches_its_hash,
    read_bytes,
    unreadable_commit,
)
from softlabel.storage.log.state import Shard, added_shard, named_path, softlabel_metadata, state, table_metadata
from softlabel.storage.places.place import Place, hash_of

_THREADS = 8
"""Commits that are read in parallel from a bucket, where each is a request."""


@dataclass(frozen=True)
class Snapshot:
    """One version of a table.

    Attributes:
        version: its number; -1 before the first commit.
        metadata: Delta's ``metaData``: columns and properties.
        shards: its shards, by path.
        lines: the lines of the shards in the state hash, sorted.
        message: softlabel's metadata in its commit.
        digest: hash of its commit's file.
        damaged: the first commit that was read and does not match its own hash, if any.
    """

    version: int
    metadata: Mapping[str, Any]
    shards: Mapping[str, Shard]
    lines: Sequence[str]
    message: Mapping[str, Any]
    digest: str
    damaged: int | None = None

    @property
    def properties(self) -> dict[str, str]:
        """Properties of the Delta table."""
        return dict(self.metadata["configuration"])

    @property
    def schema(self) -> str:
        """Columns of the Delta table, as JSON."""
        return str(self.metadata["schemaString"])

    @cached_property
    def state(self) -> str:
        """Its state hash (see ``storage.log.state``), which its commit must contain."""
        return state(self.version, self.properties, self.schema, self.lines)

    @cached_property
    def is_sound(self) -> bool:
        """Whether its state is that in its commit, and its commits match their own hashes."""
        return self.damaged is None and self.message.get("state") == self.state

    def state_after(
        self, added: Iterable[Shard], removed: Iterable[str], properties: Mapping[str, str], schema: str
    ) -> str:
        """The state hash of the next version, with these changes.

        Args:
            added: new shards.
            removed: paths of shards of this version.
            properties: properties of the Delta table.
            schema: schema of the Delta table, as JSON.
        """
        gone = {self.shards[path].line for path in removed}
        return state(self.version + 1, properties, schema, _merged(self.lines, gone, added))

    def require_sound(self, place: Place) -> None:
        """Refuse a version whose state differs from the state hash in its commit.

        Raises:
            IntegrityError: if they differ, if the commit has no state hash, or if a commit does not match its own hash.
        """
        if self.is_sound:
            return
        if self.damaged is not None:
            raise IntegrityError(
                "the table's log is damaged: a commit has no hash, or does not match the hash in it",
                where=place.where(commit_file(self.damaged)),
                do="restore this file from a copy of the table",
            )
        where = place.where(commit_file(self.version))
        if "state" not in self.message:
            raise IntegrityError(
                "a program other than softlabel made this version: its commit has no state hash",
                expected="a commit made by softlabel, with a state hash",
                where=where,
                do=f"use the version before, {place.address}@{self.version - 1}"
                if self.version
                else "capture a new table",
            )
        raise IntegrityError(
            "the table's log is damaged: this version's shards or properties do not match its commit",
            expected=f"state hash {self.message['state']}",
            found=f"state hash {self.state}",
            where=where,
            do=f"run softlabel verify {place.address} to find the damaged file, and restore it from a copy of the"
            " table",
        )


_NOTHING = Snapshot(-1, {}, {}, [], {}, "")


def load(place: Place, version: int | None = None) -> Snapshot | None:
    """Read a version, by default the newest; None if there is no such version.

    If no way of reading the log gives a version that matches its commit, one that does not is returned.

    Raises:
        IntegrityError: if a commit is missing or invalid.
        AccessError: if the log can't be read at the moment.
    """
    hint = hinted(place)
    commits, checkpoints = list_log(place, hint if version is None or version >= hint else 0)
    if hint and hint not in checkpoints:
        commits, checkpoints = list_log(place)
    wanted = max([*commits, *checkpoints], default=-1) if version is None else version
    if wanted not in commits and wanted not in checkpoints:
        return None
    found = _from_checkpoints(place, wanted, checkpoints)
    if found is None and hint:  # checkpoints before this one
        commits, checkpoints = list_log(place)
        found = _from_checkpoints(place, wanted, {v: names for v, names in checkpoints.items() if v < hint})
    if found is None or (not found.is_sound and 0 in list_log(place)[0]):
        return _advanced(place, _NOTHING, wanted)
    return found


def follow(place: Place, known: Snapshot) -> Snapshot | None:
    """The newest version, by reading only the commits after a known one; None if there is no table any more."""
    try:
        unchanged = known.is_sound and hash_of(read_bytes(place, known.version)) == known.digest
    except OSError:
        unchanged = False
    if not unchanged:
        return load(place)
    contents: list[bytes] = []
    while (content := _next(place, known.version + len(contents) + 1)) is not None:
        contents.append(content)
    return _with_commits(place, known, contents) if contents else known


def _next(place: Place, version: int) -> bytes | None:
    try:
        return read_bytes(place, version)
    except (FileNotFoundError, IsADirectoryError):  # a folder lets nobody make this commit
        return None
    except OSError as error:
        raise unreadable_commit(place, version, error) from error


def _from_checkpoints(place: Place, wanted: int, checkpoints: Mapping[int, Sequence[str]]) -> Snapshot | None:
    """Read a version from the last checkpoint that can be read; None if there is none."""
    for start in sorted((version for version in checkpoints if version <= wanted), reverse=True):
        try:
            metadata, shards = read_checkpoint(place, checkpoints[start])
        except (OSError, ValueError):
            continue
        lines = sorted(shard.line for shard in shards.values())
        return _advanced(place, Snapshot(start, metadata, shards, lines, {}, ""), wanted)
    return None


def _advanced(place: Place, base: Snapshot, wanted: int) -> Snapshot:
    versions = range(min(base.version + 1, wanted), wanted + 1)

    def content(version: int) -> bytes:
        try:
            return read_bytes(place, version)
        except OSError as error:
            raise unreadable_commit(place, version, error) from error

    if place.is_remote:
        with ThreadPoolExecutor(_THREADS, "softlabel-log") as pool:
            contents = list(pool.map(content, versions))
    else:
        contents = list(map(content, versions))
    if base.version == wanted:  # only its message is needed
        try:
            message = softlabel_metadata(lines_of(contents[0]))
            matches = matches_its_hash(contents[0], message, base.metadata)
        except (ValueError, TypeError) as error:
            raise unreadable_commit(place, wanted, error) from error
        about = message, hash_of(contents[0]), None if matches else wanted
        return Snapshot(wanted, base.metadata, base.shards, base.lines, *about)
    return _with_commits(place, base, contents)


def _with_commits(place: Place, base: Snapshot, contents: Sequence[bytes]) -> Snapshot:
    """The version that is reached from another by these commits; of another program's table, only its properties."""
    metadata, shards, touched = base.metadata, dict(base.shards), set[str]()
    version, damaged, message = base.version, base.damaged, base.message
    for content in contents:
        version += 1
        try:
            actions = lines_of(content)
            for action in actions:
                if "metaData" in action:
                    metadata = table_metadata(action["metaData"])
            for action in actions if FORMAT_PROPERTY in metadata.get("configuration", {}) else ():
                if "add" in action:
                    shard = added_shard(action["add"])
                    shards[shard.path] = shard
                    touched.add(shard.path)
                elif "remove" in action:
                    path = named_path(action["remove"]["path"])
                    shards.pop(path, None)
                    touched.add(path)
            message = softlabel_metadata(actions)
            matches = matches_its_hash(content, message, metadata)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise unreadable_commit(place, version, error) from error
        damaged = damaged if matches or damaged is not None else version
    gone = {base.shards[path].line for path in touched if path in base.shards}
    lines = _merged(base.lines, gone, (shards[path] for path in touched if path in shards))
    return Snapshot(version, metadata, shards, lines, message, hash_of(contents[-1]), damaged)


def _merged(lines: Sequence[str], gone: set[str], added: Iterable[Shard]) -> list[str]:
    """Sorted lines without some of them and with others; sorting is fast, because most are in order."""
    kept = [line for line in lines if line not in gone] if gone else list(lines)
    return sorted([*kept, *(shard.line for shard in added)])
