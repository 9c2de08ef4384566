"""The state of a version as one hash, which its commit contains, so that a damaged log is always recognized.

A Delta log has no checksums, and the hashes of shards do not protect the log that lists them. In addition, ``previous``
in each commit is a hash of the commit file before it, so that ``verify`` can name the damaged file.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import PurePath
from typing import Any, NamedTuple
from urllib.parse import unquote

from softlabel.storage.log.commit_message import COMMIT_MESSAGE
from softlabel.storage.log.files import commit_file, lines_of, matches_its_hash
from softlabel.storage.places.place import hash_of
from softlabel.storage.schema import PARTITION

_OUTSIDE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff%\\]|^[A-Za-z][A-Za-z0-9+.-]*:|^_|(^|/)\.{0,2}(/|$)")
"""Found in a decoded path that might leave the table, lead to its log and records, or be no file's name."""


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
        ValueError: if it describes no shard; or a KeyError, TypeError or AttributeError.
    """
    split, rows = add["partitionValues"].get(PARTITION), counted_rows(add.get("stats"))
    shard = Shard(named_path(add["path"]), split, rows, add["size"])
    if not (isinstance(split, str | None) and all(isinstance(count, int) and count >= 0 for count in shard[2:])):
        raise ValueError(f"the split, the rows or the bytes of {shard.path} are not what they can be")
    return shard


def counted_rows(stats: str | None) -> Any:
    """The number of rows in a shard's statistics; 0 without any.

    Raises:
        ValueError: if they are no statistics; or a TypeError or AttributeError.
    """
    try:
        return json.loads(stats or "{}").get("numRecords", 0)
    except RecursionError as error:
        raise ValueError("statistics that are nested too deeply") from error


def table_metadata(line: Mapping[str, Any]) -> dict[str, Any]:
    """Delta's ``metaData``, as a line of the log or a row of a checkpoint has it.

    Raises:
        ValueError: if it does not define a table; or a KeyError or TypeError.
    """
    properties = dict(line["configuration"])
    if not all(isinstance(text, str) for text in (line["id"], line["schemaString"], *properties.values())):
        raise ValueError("the table's id, columns and properties are not texts")
    _column_lines(line["schemaString"])
    return {**line, "configuration": properties}


def named_path(path: str) -> str:
    """The path of a shard, as the log writes it, in a URL's form.

    Raises:
        ValueError: if it is not the path of a shard, for example because it leaves the table.
    """
    plain = unquote(path) if "%" in path else path
    if _OUTSIDE.search(plain):
        raise ValueError(f"{path[:300]!r} is not the path of a shard in the table")
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
    lines += _column_lines(schema)
    return hash_of("\n".join([*lines, *shards]).encode(errors="surrogatepass"))  # JSON may have half a character


def _column_lines(schema: str) -> list[str]:
    try:
        fields = json.loads(schema)["fields"]
        return [f"column {field['name']} {json.dumps(field['type'], sort_keys=True)}" for field in fields]
    except RecursionError as error:
        raise ValueError("columns that are nested too deeply") from error


def softlabel_metadata(actions: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """softlabel's metadata in the lines of a commit; empty if another program made the commit."""
    infos = (action["commitInfo"] for action in actions if "commitInfo" in action)
    return next((dict(info[COMMIT_MESSAGE]) for info in infos if COMMIT_MESSAGE in info), {})


def commit_info(content: bytes) -> dict[str, Any]:
    """What a commit says for people: Delta's ``commitInfo``.

    Raises:
        ValueError: if it lacks its time or its operation; or a TypeError.
    """
    info = next((dict(line["commitInfo"]) for line in lines_of(content) if "commitInfo" in line), {})
    with suppress(KeyError, OverflowError):
        datetime.fromtimestamp(info["timestamp"] / 1000, UTC)
        if isinstance(info["operation"], str):
            return info
    raise ValueError("the commit lacks its time or its operation")


class Chain:
    """Checks commits in order: each contains a hash of its own bytes, and the hash of the commit before it.

    Attributes:
        damaged: files of damaged or foreign commits, each with its problem.
        metadata: Delta's ``metaData`` of the last commit that has one, or of the version before the first commit.
    """

    def __init__(self) -> None:
        self.damaged: dict[str, str] = {}
        self.metadata: Mapping[str, Any] = {}
        self._last = ""
        self._last_matches = False  # whether the commit before is known to be undamaged, by its own hash
        self._suspect = ""  # commit that was blamed for a difference which the commit after it may have caused

    def add(self, version: int, content: bytes) -> list[dict[str, Any]]:
        """Check the next commit; returns its lines.

        Raises:
            ValueError: if it is not a commit; or a KeyError or TypeError.
        """
        actions, name, before = lines_of(content), commit_file(version), commit_file(version - 1)
        message = softlabel_metadata(actions)
        for line in actions:
            if "metaData" in line:
                self.metadata = table_metadata(line["metaData"])
        previous, matches = message.get("previous"), matches_its_hash(content, message, self.metadata)
        follows = self._last in ("", previous)
        if not follows and before not in self.damaged and self._suspect:
            self.damaged.pop(self._suspect, None)
        self._suspect = ""
        if not matches:
            self.damaged[name] = "does not match the hash in it" if "hash" in message else "has no hash of its own"
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
