"""Checkpoints: files of the log that each describe a whole version, so that a reader needs few of the commits before.

delta-rs makes them, in a copy of the end of the log, because a power cut can empty the files that it writes. From there
they are written durably: first the checkpoint, then ``_last_checkpoint``, where other programs look for the newest.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake import DeltaTable
from deltalake import Schema as DeltaSchema
from deltalake.exceptions import DeltaError

from softlabel.storage.log.files import LARGEST_LINE, LOG, commit_file, list_log, read_commit
from softlabel.storage.log.state import Shard, counted_rows, named_path, softlabel_metadata, state, table_metadata
from softlabel.storage.places.place import Place
from softlabel.storage.schema import PARTITION

VERSIONS_PER_CHECKPOINT = 100
"""One checkpoint is made for so many versions."""
LAST_CHECKPOINT = f"{LOG}/_last_checkpoint"
"""File that tells which checkpoint is the newest, so that only the end of the log needs to be listed."""
_COLUMNS = ("add.path", "add.partitionValues", "add.size", "add.stats", "metaData")


def hinted(place: Place) -> int:
    """The version of the newest checkpoint according to ``_last_checkpoint``; 0 if there is no such valid file."""
    try:
        version = json.loads(place.read(LAST_CHECKPOINT, LARGEST_LINE))["version"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return 0
    return version if isinstance(version, int) and version > 0 else 0


def read_checkpoint(place: Place, names: Sequence[str]) -> tuple[dict[str, Any], dict[str, Shard]]:
    """Delta's ``metaData`` and the shards, by path, of a checkpoint.

    Args:
        place: place of the table.
        names: the checkpoint's file, or its parts.

    Raises:
        ValueError: if it is damaged.
        OSError: if it can't be read.
    """
    parts = [name for name in names if name.endswith(".checkpoint.parquet")] or names
    try:
        if parts is names and len(names) != int(names[0].split(".")[-2]):
            raise ValueError(f"{len(names)} of its parts are there")
        tables = [pq.ParquetFile(pa.BufferReader(place.read(name))).read(list(_COLUMNS)) for name in parts]
        rows = pa.concat_tables(tables).combine_chunks()
        metadata = [row for row in rows["metaData"].drop_null().to_pylist() if row is not None]
        if len(metadata) != 1:
            raise ValueError("not one row with the table's metadata")
        adds = rows["add"].drop_null()
        paths, sizes, stats = (pc.struct_field(adds, name).to_pylist() for name in ("path", "size", "stats"))
        splits = pc.map_lookup(pc.struct_field(adds, "partitionValues"), PARTITION, "first").to_pylist()
        counts = {text: counted_rows(text) for text in set(stats)}
        shards = map(Shard, map(named_path, paths), splits, map(counts.__getitem__, stats), sizes)
        DeltaSchema.from_json(metadata[0]["schemaString"])  # the state hash covers only the names and types of columns
        return table_metadata(metadata[0]), {shard.path: shard for shard in shards}
    except (pa.ArrowException, DeltaError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a checkpoint: {error}") from error


def checkpoint_problem(place: Place, version: int, names: Sequence[str]) -> str | None:
    """Why a checkpoint can't be used; None if it describes the version as the commit does.

    Raises:
        IntegrityError: if the commit can't be read.
        AccessError: if a file can't be read at the moment.
    """
    try:
        metadata, shards = read_checkpoint(place, names)
        lines = sorted(shard.line for shard in shards.values())
        found = state(version, metadata["configuration"], metadata["schemaString"], lines)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"this checkpoint can't be read: {' '.join(str(error).split())}"
    if found != softlabel_metadata(read_commit(place, version)).get("state"):
        return "the shards or properties in this checkpoint do not match its commit"
    return None


def write_checkpoint(place: Place, version: int) -> str:
    """Write the checkpoint of a version, durably; a damaged one is replaced. Returns the checkpoint's file.

    Raises:
        OSError: if a file can't be read or written.
        DeltaError: if the log is damaged.
    """
    start, names = _sound_before(place, version, list_log(place)[1])
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch, LOG).mkdir()
        for name in [*names, *map(commit_file, range(start + 1, version + 1))]:
            Path(scratch, name).write_bytes(place.read(name))
        DeltaTable(scratch, version=version).create_checkpoint()
        made = f"{LOG}/{version:020}.checkpoint.parquet"
        for name in (made, LAST_CHECKPOINT):
            place.write(name, Path(scratch, name).read_bytes())
    return made


def _sound_before(place: Place, version: int, there: Mapping[int, Sequence[str]]) -> tuple[int, Sequence[str]]:
    """The last checkpoint before a version that can be used, with its files; -1 if there is none."""
    for known in sorted((number for number in there if number < version), reverse=True):
        if checkpoint_problem(place, known, there[known]) is None:
            return known, there[known]
    return -1, []
