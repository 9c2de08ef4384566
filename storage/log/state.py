"""The state of a version as one hash, which its commit contains, so that a damaged log is always recognized.

A Delta log has no checksums, and the hashes of shards do not protect the log that lists them. In addition, ``previous``
in each commit is a hash of the commit file before it, so that ``verify`` can name the damaged file.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple
from urllib.parse import unquote

from softlabel.storage.log.commit_message import COMMIT_MESSAGE
from softlabel.storage.log.files import commit_file, lines_of, matches_its_hash
from softlabel.storage.places.place import hash_of
from softlabel.storage.schema import PARTITION

_OUTSIDE = re.compile(r"[\x00-\x1f\x7f%\\]|^[A-Za-z][A-Za-z0-9+.-]*:|^_|(^|/)\.{0,2}(/|$)")
"""Found in a decoded path that might leave the table, or lead to its log and records."""


class Shard(NamedTuple):
    """One Parquet file of one version."""

    path: str
    """Relative to the table."""
    split: str
    rows: int
    bytes: int

    @property
    def line(self) -> str:
        """Its line in the input of a state hash."""
        return f"shard {self.path} {self.split} {self.rows} {self.bytes}"


def added_shard(add: Mapping[str, Any]) -> Shard:
    """The shard that a line ``add`` of the log describes.

    Raises:
        ValueError: if it describes no shard; or a KeyError or TypeError.
    """
    rows = json.loads(add.get("stats") or "{}").get("numRecords", 0)
    return Shard(named_path(add["path"]), add["partitionValues"].get(PARTITION), rows, add["size"])


def named_path(path: str) -> str:
    """The path of a shard, as the log writes it, in a URL's form.

    Raises:
        ValueError: if it is not the path of a shard, for example because it leaves the table.
    """
    plain = unquote(path) if "%" in path else path
    if _OUTSIDE.search(plain):
        raise ValueError(f"{path!r} is not the path of a shard in the table")
    return plain


def state(version: int, properties: Mapping[str, str], schema: str, shards: Sequence[str]) -> str:
    """BLAKE2b-128, as 32 hexadecimal digits, of everything that defines a version; FORMAT.md specifies the input.

    Args:
        version: version number.
        properties: properties of the Delta table.
        schema: schema of the Delta table, as JSON.
        shards: lines of the version's shards, sorted.
    """
    lines = [f"version {version}"]
    lines += [f"property {name} {properties[name]}" for name in sorted(properties)]
    lines += [
        f"column {field['name']} {json.dumps(field['type'], sort_keys=True)}" for field in json.loads(schema)["fields"]
    ]
    return hash_of("\n".join([*lines, *shards]).encode())


def softlabel_metadata(actions: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """softlabel's metadata in the lines of a commit; empty if another program made the commit."""
    infos = (action["commitInfo"] for action in actions if "commitInfo" in action)
    return next((dict(info[COMMIT_MESSAGE]) for info in infos if COMMIT_MESSAGE in info), {})


class Chain:
    """Checks commits in order: each contains a hash of its own bytes, and the hash of the commit before it.

    Attributes:
        damaged: files of damaged or foreign commits, each with its problem.
    """

    def __init__(self) -> None:
        self.damaged: dict[str, str] = {}
        self._last = ""
        self._last_matches = False  # whether the commit before is known to be undamaged, by its own hash
        self._suspect = ""  # commit that was blamed for a difference which the commit after it may have caused

    def add(self, version: int, content: bytes) -> list[dict[str, Any]]:
        """Check the next commit; returns its lines.

        Raises:
            ValueError: if it is not a commit.
        """
        actions, name, before = lines_of(content), commit_file(version), commit_file(version - 1)
        message = softlabel_metadata(actions)
        previous, matches = message.get("previous"), matches_its_hash(content, message)
        follows = self._last in ("", previous)
        if not follows and before not in self.damaged and self._suspect:
            self.damaged.pop(self._suspect, None)
        self._suspect = ""
        if not matches:
            self.damaged[name] = "does not match the hash in it"
        elif not follows and previous is None:
            self.damaged[name] = "this commit was not made by softlabel"
        elif not follows and self._last_matches:
            self.damaged[name] = f"does not contain the hash of {PurePath(before).name}, which is undamaged"
        elif not follows:
            after = f"does not match the hash in {PurePath(name).name}: one of the two is damaged"
            self._suspect = "" if "hash" in message or before in self.damaged else before
            self.damaged.setdefault(before, after)
        self._last, self._last_matches = hash_of(content), matches and "hash" in message
        return actions
