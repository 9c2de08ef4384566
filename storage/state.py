"""What a version is, as one hash that its commit says: a log that was damaged is never taken for other rows.

Delta's log has no checksums of its own, and a shard's hash tells nothing of the log that names it, or fails to.
``previous`` ties each commit to the bytes of the one before it, so that ``verify`` can name the file that is damaged.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from softlabel.storage.commit_files import commit_file, lines_of, read_commit
from softlabel.storage.errors import IntegrityError
from softlabel.storage.places.place import Place, hash_of

COMMIT_MESSAGE = "softlabel"
"""The part of a commit's metadata that says what softlabel did."""


@dataclass(frozen=True)
class Shard:
    """One Parquet file of one version."""

    path: str
    """Relative to the table."""
    split: str
    rows: int
    bytes: int


def state(version: int, properties: Mapping[str, str], schema: str, shards: Iterable[Shard]) -> str:
    """BLAKE2b-128, as 32 hexadecimal digits, of all that a version tells its readers; FORMAT.md has the lines.

    Args:
        version: its number.
        properties: of the Delta table.
        schema: of the Delta table, as JSON.
        shards: in any order.
    """
    lines = [f"version {version}"]
    lines += [f"property {name} {properties[name]}" for name in sorted(properties)]
    lines += [
        f"column {field['name']} {json.dumps(field['type'], sort_keys=True)}" for field in json.loads(schema)["fields"]
    ]
    lines += sorted(f"shard {shard.path} {shard.split} {shard.rows} {shard.bytes}" for shard in shards)
    return hash_of("\n".join(lines).encode())


def said(actions: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What softlabel says of a commit, given its lines; empty if something else made it."""
    infos = (action["commitInfo"] for action in actions if "commitInfo" in action)
    return next((dict(info[COMMIT_MESSAGE]) for info in infos if COMMIT_MESSAGE in info), {})


class Chain:
    """Commits in their order, each made on the bytes of the one before.

    Attributes:
        damaged: files of commits that are not the ones that were written, and how that is known.
    """

    def __init__(self) -> None:
        self.damaged: dict[str, str] = {}
        self._last = ""

    def add(self, version: int, content: bytes) -> list[dict[str, Any]]:
        """The lines of the next commit.

        Raises:
            ValueError: if it has none.
        """
        actions = lines_of(content)
        previous = said(actions).get("previous")
        if self._last and previous is None:
            self.damaged[commit_file(version)] = "this commit was not made by softlabel"
        elif self._last not in ("", previous):
            after = f"does not match the hash in {PurePath(commit_file(version)).name}: one of the two is damaged"
            self.damaged[commit_file(version - 1)] = after
        self._last = hash_of(content)
        return actions


def require_state(place: Place, version: int, found: str) -> None:
    """Refuse a version that is not what its commit says that it is.

    Raises:
        IntegrityError: naming the commit.
    """
    expected = said(read_commit(place, version)).get("state")
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
