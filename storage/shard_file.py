"""Writes one shard: collects rows in a temporary Parquet file, and gives it its final name."""

import json
import os
import time
from contextlib import suppress
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake.transaction import AddAction

from softlabel.storage.errors import IntegrityError
from softlabel.storage.log.state import Shard
from softlabel.storage.places.place import Place, content_hash
from softlabel.storage.schema import PARTITION, SEQUENCE, SOFT_LABELS, RowKey, row_keys, without

_LEVELS = {
    **dict.fromkeys(("head_ids", "tail_ids", "tail_counts", "tail_codes"), 1),
    **dict.fromkeys(("tail_log_masses", "next_logprobs"), 3),
    "tail_draws": 6,
    "head_codes": 8,
    **dict.fromkeys(("token_ids", "head_clusters"), 15),
}
"""zstd's level for columns of numbers; 10 for the others."""


def add_action(shard: Shard) -> AddAction:
    """The commit action that adds a shard to the table."""
    # Only the number of rows: wrong minimum or maximum values would silently hide rows from queries.
    stats = json.dumps({"numRecords": shard.rows})
    return AddAction(shard.path, shard.bytes, {PARTITION: shard.split}, int(time.time() * 1000), True, stats)


def shard_of(action: AddAction) -> Shard:
    """The shard of an add action: the inverse of ``add_action``."""
    split, rows = action.partition_values[PARTITION], json.loads(action.stats)["numRecords"]
    return Shard(action.path, str(split), rows, action.size)


class ShardFile:
    """A shard that is being written: buffers rows into whole row groups, in a temporary file until it is published."""

    def __init__(self, place: Place, schema: pa.Schema, split: str, row_group: int) -> None:
        self._place = place
        self._schema = without(schema, [PARTITION])
        self._split = split
        self._row_group = row_group
        self._buffer: list[pa.Table] = []
        self._open()

    def _open(self) -> None:
        self._draft = self._place.draft()
        try:
            self._writer = pq.ParquetWriter(self._draft.file, self._schema, **parquet_options(self._schema))
        except OSError:
            self._draft.discard()
            raise
        self.keys: dict[RowKey, None] = {}
        self.positions = self.written_positions = self.written_bytes = 0

    def append(self, rows: pa.Table) -> None:
        """Add rows of the table's schema; rows that the file has already are skipped."""
        new = []
        for key in row_keys(rows):
            new.append(key not in self.keys)
            self.keys[key] = None
        if not all(new):
            rows = rows.filter(pa.array(new))
        self.positions += pc.sum(rows.column("positions")).as_py() or 0
        self._buffer.append(rows.select(self._schema.names).cast(self._schema))
        while sum(map(len, self._buffer)) >= self._row_group:
            self._write_row_group(self._row_group)

    def _write_row_group(self, count: int) -> None:
        rows = pa.concat_tables(self._buffer)
        group = rows.slice(0, count).combine_chunks()
        self._writer.write_table(group, row_group_size=count)
        self.written_positions += pc.sum(group.column("positions")).as_py()
        self.written_bytes = self._draft.file.tell()
        self._buffer = [rows.slice(count)] if len(rows) > count else []

    def finish(self) -> None:
        """Close the file, check the number of rows in its footer, and compute its name from its content."""
        if self._buffer:
            self._write_row_group(sum(map(len, self._buffer)))
        self._writer.close()
        self._draft.file.flush()
        found = pq.read_metadata(self._draft.file).num_rows
        if found != len(self.keys):
            raise IntegrityError(
                "a shard was not written completely",
                expected=f"{len(self.keys)} rows",
                found=f"{found} rows",
                do="check the disk, then run the same command again; this shard was not added to the table",
            )
        self.shard_path = f"{PARTITION}={self._split}/{content_hash(self._draft.file)}.parquet"

    def drop(self, taken: set[RowKey]) -> None:
        """Rewrite the file without rows that the table has already; the old file is discarded."""
        kept = [key not in taken for key in self.keys]
        if all(kept):
            return
        rows = pq.ParquetFile(self._draft.file).read().cast(self._schema).filter(pa.array(kept))
        self.discard()
        self._open()
        if len(rows):
            self.append(rows)
        self.finish()

    @property
    def shard(self) -> Shard:
        """The finished file as a shard of the table."""
        return Shard(self.shard_path, self._split, len(self.keys), os.fstat(self._draft.file.fileno()).st_size)

    def publish(self, name: str | None = None) -> None:
        """Give the file its final name, or a temporary ``name``.

        Another writer with the same rows makes an identical file with the same name. Then the file exists already, and
        the first to commit adds it to the table.
        """
        self._draft.publish(name or self.shard_path)

    def discard(self) -> None:
        """Close the file, and delete it unless it is published: another writer may be about to commit the same file."""
        with suppress(OSError):  # on a full disk, writing the footer fails too
            self._writer.close()
        self._draft.discard()


def parquet_options(schema: pa.Schema) -> dict[str, Any]:
    """Options of the Parquet writer, chosen for the smallest files at a speed that does not slow a capture down.

    Bytes of equal significance are distributed alike, so lists of numbers are split by byte and compressed by zstd's
    entropy coder; a dictionary would make them larger. The numbers of ids compress better at zstd's lowest level than
    at its highest. Codes repeat from position to position, which only a higher level finds; but a level above 8 takes
    half as long again for 1% less. Token ids and clusters gain more from the next levels than these cost, and floats
    next to nothing from any. ``tests.benchmarks.table`` shows the bytes by column.
    """
    own = [field.name for field in (*SEQUENCE, *SOFT_LABELS) if pa.types.is_list(field.type)]
    numbers = [name for name in own if name != "loss_mask" and name in schema.names]
    levels = {name: _LEVELS.get(name, 10) for name in numbers}
    return {
        "compression": "zstd",
        "compression_level": {_leaf(name): level for name, level in levels.items()},
        "column_encoding": {_leaf(name): "BYTE_STREAM_SPLIT" for name in numbers},
        "use_dictionary": [field.name for field in schema if pa.types.is_string(field.type)],
        "write_page_checksum": True,
        "write_statistics": False,
        "version": "2.6",
    }


def _leaf(name: str) -> str:
    return f"{name}.list.element"
