"""Reads shards, and checks them against their hashes and checksums, so that damaged bytes are never returned."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from softlabel.storage import format_1
from softlabel.storage.codec import decode
from softlabel.storage.errors import IntegrityError, TableError, recapture
from softlabel.storage.footer import column_bytes
from softlabel.storage.labels import SoftLabels
from softlabel.storage.log.state import Shard
from softlabel.storage.places.place import File, Place, content_hash, hash_in_name, reading
from softlabel.storage.records.takedown import tombstone
from softlabel.storage.schema import (
    FORMAT,
    PARTITION,
    SEQUENCE,
    SOFT_LABELS,
    conforming,
    row_schema,
    stored_as,
    without,
)
from softlabel.storage.table import Table

_HASHES: dict[tuple[str, File], str] = {}
"""Content hash of each file state that this process has checked, by place and file."""


def read(
    table: Table,
    shard: Shard,
    columns: Sequence[str] | None = None,
    row_groups: Sequence[int] | None = None,
) -> pa.Table:
    """Rows of a shard in the current format, in the order in which they were written.

    Args:
        table: the version that has the shard.
        shard: one of ``table.shards()``.
        columns: names of the columns to read; all by default. The split is in the shard's path, not among them.
        row_groups: numbers of the row groups to read; all by default.

    Raises:
        IntegrityError: if the shard is missing or damaged.
    """
    if table.format == FORMAT:
        return stored(table, shard, columns, row_groups)
    names = row_schema(table.carried).names if columns is None else columns
    names = [name for name in names if name != PARTITION]
    return current(table, stored(table, shard, stored_names(table, names), row_groups), names)


def stored_names(table: Table, columns: Sequence[str]) -> list[str]:
    """The columns that are stored, in the table's format, of which ``current`` makes these."""
    return list(columns) if table.format == FORMAT else format_1.columns_for(columns)


def current(table: Table, rows: pa.Table, columns: Sequence[str]) -> pa.Table:
    """These columns in the current format, of rows as they are stored, with the columns of ``stored_names``."""
    return rows.select(columns) if table.format == FORMAT else format_1.converted(rows, columns, table.numbering)


def stored(
    table: Table,
    shard: Shard,
    columns: Sequence[str] | None = None,
    row_groups: Sequence[int] | None = None,
) -> pa.Table:
    """Rows of a shard as they are stored, in the table's format; otherwise like ``read``."""
    names = list(columns) if columns is not None else None
    with open_shard(table, shard) as file, _reporting_damage(table, shard):
        wanted = range(file.num_row_groups) if row_groups is None else row_groups
        rows = file.read_row_groups(list(wanted), columns=names, use_threads=False)
        return conforming(rows, _schema(table, names))


def batches(table: Table, columns: Sequence[str], split: str | None = None) -> Iterator[tuple[Shard, pa.Table]]:
    """Each row group of each shard with its shard, in order; one row group is in memory at a time."""
    for shard in table.shards(split):
        with open_shard(table, shard) as file:
            groups = file.num_row_groups
        for group in range(groups):
            yield shard, read(table, shard, columns, [group])


def _schema(table: Table, columns: Sequence[str] | None) -> pa.Schema:
    """The table's schema of these stored columns; of all by default."""
    if columns is None:
        return without(table.schema, [PARTITION])
    return pa.schema([table.schema.field(name) for name in columns])


class Outline:
    """A shard of which only some columns are read, or only the footer; a context manager.

    Cheap enough for every shard of a table: it checks the file's size, whether the footer describes this file, and the
    checksums of the pages that it reads. Only ``read`` checks the hash of the whole content.
    """

    def __init__(self, table: Table, shard: Shard) -> None:
        self._table, self._shard = table, shard
        self._source = _source(table, shard)
        with _reporting_damage(table, shard):
            self._file = _parquet(table, self._source)
        if self._file.metadata.num_rows != shard.rows:
            self._file.close()
            raise self._wrong_footer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def row_groups(self) -> int:
        """How many row groups it has."""
        return int(self._file.num_row_groups)

    def column_bytes(self) -> dict[str, int]:
        """Compressed bytes of each column; also checks that the columns have the table's types.

        Raises:
            IntegrityError: if the footer is damaged.
        """
        with _reporting_damage(self._table, self._shard):
            try:
                sizes = column_bytes(self._source, self._shard.bytes)
            except ValueError:  # another program may have left gaps; then only the hash shows that nothing is damaged
                _source(self._table, self._shard, hash_in_name(self._shard.path))
                sizes = column_bytes(self._source, self._shard.bytes, gaps=True)
            found = {field.name: stored_as(field.type) for field in self._file.schema_arrow}
        if found != {field.name: field.type for field in _schema(self._table, None)} or found.keys() != sizes.keys():
            raise self._wrong_footer()
        return sizes

    def read(self, row_group: int, columns: Sequence[str]) -> pa.Table:
        """Columns of a row group as they are stored.

        Raises:
            IntegrityError: if these columns are damaged.
        """
        with _reporting_damage(self._table, self._shard):
            part = self._file.read_row_group(row_group, columns=list(columns), use_threads=False)
            if set(part.column_names) != set(columns) or len(part) > self._shard.rows:
                raise self._wrong_footer()
            part = conforming(part, _schema(self._table, columns))
        # Without the metadata in the footer, on which polars stops if it is damaged.
        return pa.table(part.columns, schema=pa.schema([field.remove_metadata() for field in part.schema]))

    def parts(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Columns of each row group, in order; see ``read``."""
        rows = 0
        for group in range(self.row_groups):
            part = self.read(group, columns)
            rows += len(part)
            yield part
        if rows != self._shard.rows:
            raise self._wrong_footer()

    def _wrong_footer(self) -> TableError:
        found = "a footer that does not match the number of rows, the columns or the size of the file"
        return _damage_error(self._table, self._shard, found)


def outline(table: Table, shard: Shard, columns: Sequence[str]) -> Iterator[pa.Table]:
    """A few small columns of each row group, in order; see ``Outline``.

    Raises:
        IntegrityError: if the shard is missing, truncated, or damaged in these columns.
    """
    with Outline(table, shard) as opened:
        yield from opened.parts(columns)


def index(table: Table, columns: Sequence[str]) -> pa.Table:
    """A few small columns of all rows, with their split; checked as by ``outline``.

    Raises:
        IntegrityError: if a shard is missing, truncated, or damaged in these columns.
    """
    names = [*columns, PARTITION]
    parts = [pa.schema([table.schema.field(name) for name in names]).empty_table()]
    for shard in table.shards():
        parts += [with_split(part, shard).select(names) for part in outline(table, shard, columns)]
    return pa.concat_tables(parts)


def captured_positions(table: Table) -> int:
    """Number of captured positions of all rows; a classifier's table has one for each document.

    Raises:
        IntegrityError: as ``index`` does.
    """
    return pc.sum(index(table, ["positions"]).column("positions")).as_py() or 0


def with_split(rows: pa.Table, shard: Shard) -> pa.Table:
    """A shard's rows with their split, which is otherwise only in the shard's path."""
    return rows.append_column(SEQUENCE.field(PARTITION), pa.array([shard.split] * len(rows), pa.string()))


def first_labels(table: Table, positions: int) -> SoftLabels:
    """The soft labels of the table's first positions, at least as many as asked for if it has them.

    Raises:
        IntegrityError: if a shard is damaged or missing.
    """
    parts = [decode(SOFT_LABELS.empty_table(), table.numbering)]
    for _, rows in batches(table, SOFT_LABELS.names):
        parts.append(decode(rows, table.numbering))
        if sum(part.positions for part in parts) >= positions:
            break
    return SoftLabels.concatenate(parts)


def soft_labels_by_key(table: Table, keys: Sequence[bytes], shards: Iterable[Shard] | None = None) -> pa.Table:
    """The encoded soft labels for each key, in the order of the keys.

    Args:
        table: version to search.
        keys: of the rows.
        shards: shards to search, of the version or staged; by default, all of the version.

    Raises:
        TableError: if a key is in none of them.
    """
    missing = set(keys)
    found: list[bytes] = []
    parts = [SOFT_LABELS.empty_table()]
    for shard in table.shards() if shards is None else shards:
        if not missing:
            break
        for group, part in enumerate(outline(table, shard, ["key"])):
            here = part.column("key").to_pylist()
            rows = [row for row, key in enumerate(here) if key in missing]
            if rows:
                parts.append(read(table, shard, SOFT_LABELS.names, [group]).take(pa.array(rows)))
                found += [here[row] for row in rows]
                missing.difference_update(found[-len(rows) :])
    if missing:
        raise TableError(
            f"the table no longer has {len(missing)} sequences whose soft labels were to be copied",
            expected="the same sequences in another document of the table",
            found="they were removed while this capture ran",
            where=table.location,
            do="run the capture again",
        )
    place = {key: row for row, key in enumerate(found)}
    return pa.concat_tables(parts).take(pa.array([place[key] for key in keys], pa.int64()))


def open_shard(table: Table, shard: Shard) -> pq.ParquetFile:
    """The Parquet file of a shard. Its content hash is checked the first time that this process opens the file.

    This check reads the whole file. From a disk, that costs far less than decoding it. From a bucket, it is an extra
    download, so the first pass over a table transfers each byte twice, and later passes once.

    Raises:
        IntegrityError: if the file is missing, truncated, or does not match the hash in its name.
    """
    source = _source(table, shard, hash_in_name(shard.path))
    with _reporting_damage(table, shard):
        return _parquet(table, source)


def _source(table: Table, shard: Shard, expected: str | None = None) -> Any:
    """The file of a shard. The hash is checked, if one is expected, before anything parses it: a footer has none."""
    with _reporting_damage(table, shard):
        source, file = table.place.open(shard.path)
        found = _content_hash(table.place, file) if expected and file.bytes == shard.bytes else expected
        if file.bytes == shard.bytes and found == expected:
            return source
    raise _damage_error(table, shard, f"{file.bytes} bytes" + (f" with the hash {found}" if found != expected else ""))


def _parquet(table: Table, source: Any) -> pq.ParquetFile:
    # Read adjacent column chunks in one request. On a disk, the threads for that would only cost time.
    return pq.ParquetFile(source, page_checksum_verification=True, pre_buffer=table.place.is_remote)


@contextmanager
def _reporting_damage(table: Table, shard: Shard) -> Iterator[None]:
    """Report any error of the Parquet reader as damage, because softlabel wrote every column and row that it reads.

    Raises:
        IntegrityError: if the shard is damaged or missing.
        AccessError: if the shard can't be read at the moment.
    """
    try:
        with reading(table.place.where(shard.path)):
            yield
    except (OSError, ValueError, pa.ArrowException) as error:
        raise _damage_error(table, shard, str(error)) from error


def _content_hash(place: Place, file: File) -> str:
    if (place.address, file) not in _HASHES:
        with place.fetch(file.name) as content:
            _HASHES[place.address, file] = content_hash(content)
    return _HASHES[place.address, file]


def _damage_error(table: Table, shard: Shard, found: str) -> TableError:
    return tombstone(table.location, shard.path) or IntegrityError(
        "a shard is damaged or missing; nothing was read from it",
        expected=f"{shard.bytes} bytes that match the hash in the file's name",
        found=found,
        where=table.place.where(shard.path),
        do="restore this file from a copy of the table; or remove the damaged shards with" + recapture(table.location),
    )
