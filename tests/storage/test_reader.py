"""Reading returns what was written, or raises an error that names the file; never a wrong number."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from softlabel.storage.errors import IntegrityError, TableError
from softlabel.storage.log.state import Shard
from softlabel.storage.reader import batches, open_shard, outline, read, soft_labels_by_key
from softlabel.storage.schema import SOFT_LABELS
from softlabel.storage.table import Table
from softlabel.storage.upkeep.inspection import inspect
from tests.storage.tables import add, rows

SMALL = ["tokens", "positions"]


@pytest.fixture
def shard(table: Table) -> tuple[Table, Shard, Path]:
    """A table whose only shard has four row groups."""
    add(table, [f"a{i}" for i in range(60)], "train")
    newest = table.newest()
    (shard,) = newest.shards()
    return newest, shard, Path(newest.location) / shard.path


def test_columns_and_row_groups_can_be_selected(shard):
    table, file, _ = shard
    whole = read(table, file)
    assert whole.num_rows == 60
    assert "split" not in whole.column_names
    assert read(table, file, SMALL).equals(whole.select(SMALL))
    assert read(table, file, SMALL, [2, 0]).equals(
        pa.concat_tables([whole.slice(32, 16), whole.slice(0, 16)]).select(SMALL)
    )
    assert read(table, file, SMALL, []).num_rows == 0


def test_batches_and_outline_go_row_group_by_row_group(filled: Table):
    for split in (None, "train", "eval"):
        expected = [
            part
            for shard in filled.shards(split)
            for part in [read(filled, shard, SMALL, [n]) for n in range(open_shard(filled, shard).num_row_groups)]
        ]
        found = [part for _, part in batches(filled, SMALL, split)]
        outlined = [part for shard in filled.shards(split) for part in outline(filled, shard, SMALL)]
        assert len(found) == len(outlined) == len(expected)
        assert all(a.equals(b) and a.equals(c) for a, b, c in zip(found, outlined, expected, strict=True))


def test_soft_labels_are_found_by_key(filled: Table):
    names = ["b3", "a7", "b3", "a0"]
    keys = rows(names)[0].column("key").to_pylist()
    found = soft_labels_by_key(filled, keys)
    everything = pa.concat_tables(read(filled, shard) for shard in filled.shards())
    place = everything.column("document_id").to_pylist().index
    assert found.equals(everything.take([place(name) for name in names]).select(SOFT_LABELS.names))
    with pytest.raises(TableError, match="no longer has 1 sequences"):
        soft_labels_by_key(filled, [*keys, b"?" * 16])


def assert_damaged(work: Callable[[], object], path: Path) -> None:
    with pytest.raises(IntegrityError, match=path.name):
        work()


def test_every_flipped_byte_is_found(shard):
    """In data, page headers and footer: every 97th byte, and each of the last 400 bytes."""
    table, file, path = shard
    good = path.read_bytes()
    for offset in [*range(0, len(good), 97), *range(len(good) - 400, len(good))]:
        flipped = bytearray(good)
        flipped[offset] ^= 1 << offset % 8
        path.write_bytes(flipped)
        assert_damaged(lambda: read(table, file, SMALL, [0]), path)
    path.write_bytes(good)
    assert read(table, file).num_rows == 60


@pytest.mark.parametrize("step", [67, pytest.param(1, marks=pytest.mark.long)])
def test_an_inspection_finds_a_flipped_byte_or_shows_what_is_right(shard, step: int):
    """It does not check the hash of the content, and the footer has no checksum. pyarrow ends the process on some."""
    table, _, path = shard
    good, right, found = path.read_bytes(), inspect(table), 0
    footer = len(good) - 8 - int.from_bytes(good[-8:-4], "little")
    for offset in [*range(0, footer, 97 * step), *range(footer, len(good), step)]:
        flipped = bytearray(good)
        flipped[offset] ^= 1 << offset % 8
        path.write_bytes(flipped)
        try:
            assert inspect(table) == right, f"wrong numbers after byte {offset} flipped"
        except IntegrityError:
            found += 1
    assert found > 2000 / step


def test_a_byte_that_flips_after_the_first_check_is_found_or_was_not_read(shard):
    """If size and time are unchanged, page checksums find the damage, unless the byte is not read."""
    table, file, path = shard
    good, stat = path.read_bytes(), path.stat()
    expected = read(table, file)
    pages = len(good) - 8 - int.from_bytes(good[-8:-4], "little")
    works = [(lambda: read(table, file), expected), (small_columns(table, file), expected.select(SMALL))]
    found = 0
    for offset in range(4, pages, 53):
        flipped = bytearray(good)
        flipped[offset] ^= 1 << offset % 8
        path.write_bytes(flipped)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        for work, right in works:
            try:
                assert work().equals(right), f"wrong numbers after byte {offset} flipped"
            except IntegrityError:
                found += 1
    assert found > 100


def small_columns(table: Table, shard: Shard) -> Callable[[], pa.Table]:
    return lambda: pa.concat_tables(outline(table, shard, SMALL))


@pytest.mark.parametrize("keep", [0, 3, 500, -1, -8])
def test_a_truncated_shard_is_reported_as_damaged(shard, keep: int):
    table, file, path = shard
    path.write_bytes(path.read_bytes()[:keep])
    for work in (lambda: read(table, file), small_columns(table, file)):
        assert_damaged(work, path)
    assert_damaged(lambda: inspect(table), path)


def test_a_missing_shard_is_reported_as_damaged(shard):
    table, file, path = shard
    path.unlink()
    for work in (lambda: read(table, file), small_columns(table, file)):
        assert_damaged(work, path)
    assert_damaged(lambda: inspect(table), path)
    assert_damaged(lambda: list(batches(table, SMALL)), path)


def test_another_shard_under_the_same_name_is_reported_as_damaged(filled: Table):
    """Another shard of the same table, whole and well-formed, under this one's name."""
    one, other = filled.shards("train")
    path = Path(filled.location) / one.path
    shutil.copy(Path(filled.location) / other.path, path)
    assert_damaged(lambda: read(filled, one), path)
    assert_damaged(lambda: list(outline(filled, one, SMALL)), path)


def test_a_folder_in_place_of_a_shard_is_reported_as_damaged(shard):
    table, file, path = shard
    path.unlink()
    path.mkdir()
    assert_damaged(lambda: read(table, file), path)


def test_a_restored_shard_can_be_read_again(shard):
    table, file, path = shard
    good = path.read_bytes()
    path.write_bytes(b"x" + good[1:])
    assert_damaged(lambda: read(table, file), path)
    path.write_bytes(good)
    assert read(table, file).num_rows == 60
