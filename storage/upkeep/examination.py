"""Checks every byte of one shard: that the file is undamaged, and that its rows are valid."""

from contextlib import suppress
from pathlib import PurePath
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from softlabel.storage.codec import flatten
from softlabel.storage.errors import IntegrityError
from softlabel.storage.log.state import Shard
from softlabel.storage.numbering import Numbering, running_sums
from softlabel.storage.places.place import content_hash, reading
from softlabel.storage.schema import PARTITION, ROW_KEY, conforming, stored_as, without
from softlabel.storage.table import Table

Hashes = NDArray[np.uint64]


class WrongShardError(Exception):
    """A shard is damaged or invalid; the message is one line."""


def examine(table: Table, shard: Shard) -> Hashes:
    """Read a whole shard, one row group at a time.

    Returns:
        (rows,) hash of each row's unique key, comparable within this process.

    Raises:
        WrongShardError: if the file is missing or damaged, or its rows are invalid.
        AccessError: if the shard can't be read at the moment.
    """
    try:
        _require("bytes", table.place.stat(shard.path).bytes, shard.bytes)
        with reading(table.place.where(shard.path)), table.place.fetch(shard.path) as content:
            _require("content hash", content_hash(content), PurePath(shard.path).stem)
            file = pq.ParquetFile(content, page_checksum_verification=True)
            _require("rows", file.metadata.num_rows, shard.rows)
            schema = without(table.schema, [PARTITION])
            _require_columns(file.schema_arrow, schema)
            groups = [np.zeros(0, np.uint64)]
            for group in range(file.num_row_groups):
                rows = conforming(file.read_row_group(group, use_threads=False), schema)
                _require_sense(table, rows)
                groups.append(_hash(rows))
    except (FileNotFoundError, NotADirectoryError):
        raise WrongShardError("the file is missing") from None
    except (OSError, ValueError, pa.ArrowException) as error:
        raise WrongShardError(f"can't be read: {' '.join(str(error).split())}") from error
    return np.concatenate(groups)


def _require(what: str, found: object, expected: object) -> None:
    if found != expected:
        raise WrongShardError(f"{what}: found {found}, expected {expected}")


def _require_columns(found: pa.Schema, expected: pa.Schema) -> None:
    types = {field.name: stored_as(field.type) for field in found}
    wanted = {field.name: field.type for field in expected}
    for name in sorted({*types, *wanted}):
        _require(f"column {name}", types.get(name, "none"), wanted.get(name, "none"))


def _require_sense(table: Table, rows: pa.Table) -> None:
    """Require lists with matching lengths, and ids below the size of the vocabulary."""
    tokens, positions = (rows.column(name).to_numpy() for name in ("tokens", "positions"))
    heads, tails = _sums(rows.column("head_counts")), _sums(rows.column("tail_counts"))
    lengths = {
        **dict.fromkeys(("token_ids", "loss_mask"), tokens),
        **dict.fromkeys(("head_counts", "head_clusters", "tail_counts", "entropies", "next_logprobs"), positions),
        "tail_log_masses": positions * len(table.temperatures),
        **dict.fromkeys(("head_ids", "head_codes"), heads),
        **dict.fromkeys(("tail_ids", "tail_draws", "tail_codes"), tails),
    }
    for name, expected in lengths.items():
        if name == "head_clusters" and table.format == 1:
            continue
        _require_each(rows, f"values in {name}", _lengths(rows.column(name)), expected)
    _require_each(rows, "captured tokens in loss_mask", _sums(rows.column("loss_mask")), positions)
    _require_range(rows, "token_ids", table.identity.padded_vocabulary)
    if table.format == 1:
        for name in ("head_ids", "tail_ids"):
            _require_range(rows, name, table.identity.vocabulary)
    else:
        _require_known(table, rows)
        with suppress(IntegrityError):  # a damaged vocabulary is a finding of its own
            _require_ids(table.numbering, rows)


def _require_known(table: Table, rows: pa.Table) -> None:
    """Require values, except in the columns in which they may be unknown."""
    may_be = {*table.identity.unknown, *(["next_logprobs"] if table.identity.classes is not None else ())}
    for name in {"tail_log_masses", "entropies", "next_logprobs"} - may_be:
        values = pc.list_flatten(rows.column(name)).to_numpy()
        unknown = int((values < 0).sum() if name == "entropies" else np.isnan(values).sum())
        if unknown:
            raise WrongShardError(f"{name}: {unknown} values are unknown, expected none")


def _require_ids(numbering: Numbering, rows: pa.Table) -> None:
    """Require clusters and numbers of the table's numbering, and tails that end within it."""
    flat = flatten(rows)
    _require_range(rows, "head_clusters", len(numbering.lists))
    for name in ("head_ids", "tail_ids"):
        _require_range(rows, name, len(numbering.places))
        if (numbering.places[flat[name]] < 0).any():
            raise WrongShardError(f"{name}: numbers that stand for no token id")
    highest = running_sums(numbering.places[flat["tail_ids"]], flat["tail_counts"]).max(initial=0)
    if highest >= max(len(numbering.numbers), 1):
        raise WrongShardError(f"tail_ids: places up to {highest}, expected below {len(numbering.numbers)}")


def _require_range(rows: pa.Table, name: str, end: int) -> None:
    low, high = pc.min_max(pc.list_flatten(rows.column(name))).as_py().values()
    if low is not None and not 0 <= low <= high < end:
        raise WrongShardError(f"{name}: values from {low} to {high}, expected from 0 to {end - 1}")


def _require_each(rows: pa.Table, what: str, found: NDArray[Any], expected: NDArray[Any]) -> None:
    wrong = np.flatnonzero(found != expected)
    if len(wrong):
        row = int(wrong[0])
        name = rows.column("document_id")[row].as_py()
        raise WrongShardError(f"{what} of document {name}: found {found[row]}, expected {expected[row]}")


def _lengths(lists: pa.ChunkedArray) -> NDArray[np.int64]:
    lengths: NDArray[np.int64] = pc.list_value_length(lists).to_numpy().astype(np.int64)
    return lengths


def _sums(lists: pa.ChunkedArray) -> NDArray[np.int64]:
    """Sum of each list."""
    totals = np.append(0, np.cumsum(pc.list_flatten(lists).to_numpy(), dtype=np.int64))
    ends = np.cumsum(_lengths(lists))
    sums: NDArray[np.int64] = totals[ends] - totals[ends - _lengths(lists)]
    return sums


def _hash(rows: pa.Table) -> Hashes:
    keys = pl.DataFrame(pl.from_arrow(rows.select(list(ROW_KEY))))
    hashes: Hashes = keys.hash_rows(seed=0).to_numpy()
    return hashes
