"""Shards that are finished but belong to no version yet: a rewrite adds their rows, together with its other changes.

They survive the process that wrote them, so that a long run that was killed can continue with them.

    TABLE/_softlabel/rewritten/staged-<split>-<rows>-<hash of the table's settings>-<hash of the content>.parquet
"""

import re
from collections.abc import Iterator
from pathlib import PurePath

from softlabel.storage.log.state import Shard
from softlabel.storage.places.place import SIDE_FOLDER, hash_of
from softlabel.storage.table import Table

REWRITTEN = f"{SIDE_FOLDER}/rewritten"
"""Folder of finished shards that are not committed yet."""
_STAGED = re.compile(rf"{REWRITTEN}/staged-([a-z]+)-(\d+)-([0-9a-f]{{32}})-[0-9a-f]{{32}}\.parquet")


def staged_path(table: Table, shard: Shard) -> str:
    """Where a finished shard of a table is staged."""
    return f"{REWRITTEN}/staged-{shard.split}-{shard.rows}-{_settings(table)}-{PurePath(shard.path).name}"


def staged_shards(table: Table) -> Iterator[Shard]:
    """The staged shards that fit to a version of a table, in the order of their names. Their paths are where they are
    staged, so that the functions of ``storage.reader`` read them."""
    settings = _settings(table)
    for file in sorted(table.place.files(REWRITTEN), key=lambda file: file.name):
        if (found := _STAGED.fullmatch(file.name)) and found[3] == settings:
            yield Shard(file.name, found[1], int(found[2]), file.bytes)


def _settings(table: Table) -> str:
    """A hash of everything that the encoding of a row depends on."""
    return hash_of(f"{table.identity.model_dump_json()}\n{table.vocabulary_name}".encode())
