"""The state of a version as one hash, which its commit contains, so that a damaged log is always recognized.

A Delta log has no checksums, and the hashes of shards do not protect the log that lists them. In addition, ``previous``
in each commit is a hash of the commit file before it, so that ``verify`` can name the damaged file.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from softlabel.storage.commit_message import COMMIT_MESSAGE
from softlabel.storage.errors import IntegrityError
from softlabel.storage.log_files import commit_file, lines_of, read_commit
from softlabel.storage.places.place import Place, hash_of


@dataclass(frozen=True)
class Shard:
    """One Parquet file of one version."""

    path: str
    """Relative to the table."""
    split: str
    rows: int
    bytes: int


def state(version: int, properties: Mapping[str, str], schema: str, shards: Iterable[Shard]) -> str:
    """BLAKE2b-128, as 32 hexadecimal digits, of everything that defines a version; FORMAT.md specifies the input.

    Args:
        version: version number.
        properties: properties of the Delta table.
        schema: schema of the Delta table, as JSON.
        shards: shards of the version, in any order.
    """
    lines = [f"version {version}"]
    lines += [f"property {name} {properties[name]}" for name in sorted(properties)]
    lines += [
        f"column {field['name']} {json.dumps(field['type'], sort_keys=True)}" for field in json.loads(schema)["fields"]
    ]
    lines += sorted(f"shard {shard.path} {shard.split} {shard.rows} {shard.bytes}" for shard in shards)
    return hash_of("\n".join(lines).encode())


def softlabel_metadata(actions: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """softlabel's metadata in the lines of a commit; empty if another program made the commit."""
    infos = (action["commitInfo"] for action in actions if "commitInfo" in action)
    return next((dict(info[COMMIT_MESSAGE]) for info in infos if COMMIT_MESSAGE in info), {})


class Chain:
    """Checks commits in order: each contains the hash of the commit before it.

    Attributes:
        damaged: files of damaged or foreign commits, each with its problem.
    """

    def __init__(self) -> None:
        self.damaged: dict[str, str] = {}
        self._last = ""

    def add(self, version: int, content: bytes) -> list[dict[str, Any]]:
        """Check the next commit; returns its lines.

        Raises:
            ValueError: if it is not a commit.
        """
        actions = lines_of(content)
        previous = softlabel_metadata(actions).get("previous")
        if self._last and previous is None:
            self.damaged[commit_file(version)] = "this commit was not made by softlabel"
        elif self._last not in ("", previous):
            after = f"does not match the hash in {PurePath(commit_file(version)).name}: one of the two is damaged"
            self.damaged[commit_file(version - 1)] = after
        self._last = hash_of(content)
        return actions


def require_state(place: Place, version: int, found: str) -> None:
    """Refuse a version whose state differs from the state hash in its commit.

    Raises:
        IntegrityError: if they differ, or if the commit has no state hash.
    """
    expected = softlabel_metadata(read_commit(place, version)).get("state")
    if found == expected:
        return
    if expected is None:
        raise IntegrityError(
            "a program other than softlabel made this version: its commit has no state hash",
            expected="a commit made by softlabel, with a state hash",
            where=place.where(commit_file(version)),
            do=f"use the version before, {place.address}@{version - 1}" if version else "capture a new table",
        )
    raise IntegrityError(
        "the table's log is damaged: this version's shards or properties do not match its commit",
        expected=f"state hash {expected}",
        found=f"state hash {found}",
        where=place.where(commit_file(version)),
        do=f"run softlabel verify {place.address} to find the damaged file, and restore it from a copy of the table",
    )
