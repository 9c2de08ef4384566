"""A table in a bucket behaves like one in a folder: the same tests, and those for a bucket only."""

import tempfile
import uuid
from collections.abc import Iterator
from typing import Any

import obstore
import pytest
from obstore.store import S3Store

from softlabel.storage import committing
from softlabel.storage.errors import IntegrityError, TableError, TableNotFoundError, UsageError
from softlabel.storage.places import bucket
from softlabel.storage.places.open import place_of
from softlabel.storage.reader import read
from softlabel.storage.records.versions import tag
from softlabel.storage.table import Table
from softlabel.storage.upkeep.maintenance import maintain
from softlabel.storage.upkeep.verification import remove_damaged, verify
from softlabel.storage.writer import ShardWriter
from tests import buckets
from tests.storage import test_table, test_writer
from tests.storage.records import test_versions
from tests.storage.tables import CARRIED, add, identity, make_table, names_in, random_labels, rows
from tests.storage.upkeep import test_maintenance, test_rewrite, test_takedown, test_vacuum

A = [f"a{i}" for i in range(40)]


@pytest.fixture(scope="module", autouse=True)
def server(moto: str) -> Iterator[None]:
    with buckets.environment(moto):
        yield


@pytest.fixture
def table() -> Table:
    """A table without rows; the shared tests below, written for a folder, use it too."""
    return make_table(f"{buckets.BUCKET}/{uuid.uuid4().hex}/table", identity())


test_committed_rows_are_in_the_newest_version = test_writer.test_committed_rows_are_in_the_newest_version
test_rows_are_read_back_as_they_were_written = test_writer.test_rows_are_read_back_as_they_were_written
test_uncommitted_rows_leave_no_files = test_writer.test_uncommitted_rows_leave_no_files
test_overlapping_writers_store_each_row_once = test_writer.test_overlapping_writers_store_each_row_once
test_a_writer_that_loses_races_adds_only_missing_rows = (
    test_writer.test_a_writer_that_loses_races_adds_only_missing_rows
)
test_identical_shards_of_two_writers_are_stored_once = test_writer.test_identical_shards_of_two_writers_are_stored_once
test_a_new_table_has_no_rows_and_the_given_identity = test_table.test_a_new_table_has_no_rows_and_the_given_identity
test_old_versions_stay_unchanged = test_table.test_old_versions_stay_unchanged
test_a_student_pins_the_version_that_it_read_last = test_versions.test_a_student_pins_the_version_that_it_read_last
test_a_table_without_leftovers_stays_unchanged = test_maintenance.test_a_table_without_leftovers_stays_unchanged
test_vacuum_drops_old_versions_and_lists_them = test_vacuum.test_vacuum_drops_old_versions_and_lists_them
test_a_shard_that_was_captured_again_is_not_vacuumed = test_vacuum.test_a_shard_that_was_captured_again_is_not_vacuumed
test_rows_are_dropped_in_one_new_version = test_rewrite.test_rows_are_dropped_in_one_new_version
test_documents_are_gone_from_every_version = test_takedown.test_documents_are_gone_from_every_version


def test_an_address_is_the_same_however_it_is_written(table: Table) -> None:
    assert place_of(f"{table.location}/").address == table.place.address
    assert Table.open(f"{table.location}/@0").version == 0
    tag(table.location, 0, "empty")
    assert Table.open(f"{table.location}@empty").version == 0


def test_damaged_and_missing_objects_are_named_and_can_be_captured_again(filled: Table) -> None:
    damaged, missing = filled.shards()[:2]
    content = bytearray(filled.place.read(damaged.path))
    content[len(content) // 2] ^= 1
    filled.place.write(damaged.path, bytes(content))
    filled.place.delete(missing.path)
    for shard in (damaged, missing):
        with pytest.raises(IntegrityError, match=shard.path):
            read(filled, shard)
    found = verify(filled)
    assert {finding.path for finding in found.findings} == {damaged.path, missing.path}
    assert remove_damaged(found).removed_rows == damaged.rows + missing.rows
    add(filled, [f"{part}{i}" for part in "ab" for i in range(40)])
    assert verify(filled.newest()).findings == ()
    assert len(names_in(filled.newest())) == 80


@pytest.mark.parametrize("size", [0, 3])
def test_a_truncated_object_is_reported_as_damaged(filled: Table, size: int) -> None:
    filled.place.write(filled.shards()[0].path, b"PAR"[:size])
    with pytest.raises(IntegrityError, match=f"{size} bytes"):
        read(filled, filled.shards()[0])


def test_leftovers_are_found_and_removed(filled: Table) -> None:
    lost = f"split=train/{'0' * 32}.parquet"
    other = Table.create(filled.location, identity(), CARRIED, random_labels(50, seed=9), filled.tokenizer)
    assert other.version == filled.version
    for name in (lost, "_softlabel/rewritten/0-1.parquet", "split=train/notes.txt"):
        filled.place.write(name, b"?")
    assert {leftover.path for leftover in maintain(filled.location).spared} >= {lost}
    deleted = [leftover.path for leftover in maintain(filled.location, grace_hours=-1).deleted]
    assert len(deleted) == 3
    assert lost in deleted
    assert verify(filled).orphans == ("split=train/notes.txt",)
    assert names_in(filled) == names_in(filled.newest())


def test_a_file_that_maintenance_deletes_before_the_commit_is_restored(
    table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without locks, maintenance may mistake a file that is about to be committed for a leftover."""
    real = committing.write_commit

    def late(*args: Any) -> bool:
        assert len(maintain(table.location, grace_hours=-1).deleted) == 2
        return real(*args)

    monkeypatch.setattr(committing, "write_commit", late)
    add(table, A)
    assert names_in(table.newest()) == sorted(A)


def test_a_file_that_was_uploaded_again_since_the_listing_is_spared(
    table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ShardWriter(table) as writer:
        writer.append(*rows(A, "train"))
        for file in writer._files.values():
            file.finish()
            file.publish()
    (orphan,) = list(table.place.files("split=train"))
    aged = obstore.list

    def old(*args: object, **kwargs: object) -> object:
        """The listing shows an old time; the object was uploaded again since."""
        for page in aged(*args, **kwargs):  # type: ignore[call-overload]
            yield [{**meta, "last_modified": meta["last_modified"].replace(year=2020)} for meta in page]

    monkeypatch.setattr(obstore, "list", old)
    done = maintain(table.location, grace_hours=1)
    assert done.deleted == ()
    assert [leftover.path for leftover in done.spared] == [orphan.name]
    table.place.stat(orphan.name)


def test_a_row_group_is_read_in_few_requests(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adjacent column chunks in one request, and not page by page."""
    add(table, [f"a{i}" for i in range(600)], "train")
    newest = table.newest()
    (shard,) = newest.shards()
    read(newest, shard, ["tokens"], [0])
    ranges: list[int] = []
    real = obstore.get_range

    def counted(store: S3Store, name: str, *, start: int, end: int) -> object:
        ranges.append(end - start)
        return real(store, name, start=start, end=end)

    monkeypatch.setattr(obstore, "get_range", counted)
    read(newest, shard, None, [3])
    assert shard.bytes > 200_000
    assert len(ranges) <= 2


def test_a_failing_network_is_not_reported_as_damage(filled: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> object:
        raise obstore.exceptions.GenericError("Generic S3 error: HTTP error: connection reset")

    shard = filled.shards()[0]
    read(filled, shard, ["tokens"])
    monkeypatch.setattr(bucket, "_TAIL", 8)  # so that the rest is a request of its own
    monkeypatch.setattr(obstore, "get_range", fail)
    with pytest.raises(TableError, match=r"can't be used(.|\n)*connection reset") as error:
        read(filled, shard)
    assert not isinstance(error.value, IntegrityError)
    monkeypatch.setattr(obstore, "get", fail)
    with pytest.raises(TableError, match="can't be used"):
        verify(filled)


def test_a_full_local_disk_is_not_reported_as_damage(filled: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise ``verify --remove-damaged`` would remove good shards."""

    def full() -> object:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    for look in (lambda: verify(filled), lambda: read(filled, filled.shards()[0])):
        with pytest.raises(TableError, match=r"can't be copied to this machine(.|\n)*No usable") as error:
            look()
        assert not isinstance(error.value, IntegrityError)


@pytest.mark.parametrize(
    ("variable", "value", "found"),
    [
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:9", "error sending request"),
        ("location", "s3://nobody/table", "NoSuchBucket"),
    ],
)
def test_an_unusable_bucket_is_reported_neither_as_empty_nor_as_damaged(
    filled: Table, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, found: str
) -> None:
    """Otherwise verify would report shards as lost when the network is down."""
    location = value if variable == "location" else filled.location
    if variable != "location":
        monkeypatch.setenv(variable, value)
    with pytest.raises(TableError, match=f"can't be used(.|\n)*{found}(.|\n)*{location}") as error:
        Table.open(location)
    assert not isinstance(error.value, TableNotFoundError | IntegrityError)
    assert "a-secret" not in str(error.value)
    assert len(str(error.value).splitlines()) < 8


@pytest.mark.parametrize("location", ["gs://bucket/table", "s3:///table", "file:///table"])
def test_other_kinds_of_urls_are_refused(location: str) -> None:
    """A URL must never become the path of a local folder."""
    with pytest.raises(UsageError, match=f"can't use a table at this location(.|\\n)*{location}"):
        Table.open(location)


def test_a_bucket_without_a_table_is_reported() -> None:
    with pytest.raises(TableNotFoundError, match="no soft-label table here"):
        Table.open(f"{buckets.BUCKET}/nothing")
