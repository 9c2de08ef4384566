"""Creating and opening tables: versions, wrong paths, damaged logs, and two processes that create at once."""

import os
import shutil
from multiprocessing.queues import SimpleQueue as Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from deltalake import write_deltalake

from softlabel.storage.errors import IntegrityError, ProvenanceError, TableError, TableNotFoundError, UsageError
from softlabel.storage.identity import Identity
from softlabel.storage.schema import SEQUENCE, SOFT_LABELS
from softlabel.storage.table import Table, parse
from softlabel.storage.upkeep.maintenance import maintain
from tests.storage.tables import (
    CARRIED,
    PROCESSES,
    VOCABULARY,
    add,
    identity,
    make_table,
    names_in,
    process,
    random_labels,
)


def test_a_new_table_has_no_rows_and_the_given_identity(table: Table):
    assert table.version == 0
    assert table.shards() == []
    assert table.identity == identity()
    assert table.temperatures == (1.0,)
    assert table.carried.equals(CARRIED)
    assert table.schema.equals(pa.schema([*SEQUENCE, *SOFT_LABELS, *CARRIED]))
    assert sorted(file.name for file in table.tokenizer.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    assert Table.exists(table.location)


def test_token_ids_are_ranked_by_frequency(table: Table, tmp_path: Path):
    labels = random_labels(50, seed=0)
    made = Table.create(str(tmp_path / "ranked"), identity(), CARRIED, labels, table.tokenizer)
    counts = np.bincount(np.concatenate([labels.head_ids, labels.tail_ids]), minlength=VOCABULARY)
    numbering = made.numbering
    assert numbering.vocabulary.dtype == numbering.ranks.dtype == np.int32
    assert (np.diff(counts[numbering.vocabulary]) <= 0).all()
    np.testing.assert_array_equal(numbering.ranks[numbering.vocabulary], np.arange(VOCABULARY))
    np.testing.assert_array_equal(np.sort(numbering.vocabulary), np.arange(VOCABULARY))


def test_old_versions_stay_unchanged(filled: Table):
    assert [Table.open(f"{filled.location}@{n}").version for n in range(3)] == [0, 1, 2]
    assert Table.open(filled.location).version == filled.newest().version == 2
    first = Table.open(f"{filled.location}@1")
    assert sum(shard.rows for shard in first.shards()) == 40
    assert first.scan().collect().height == 40
    assert filled.scan().collect().height == 80
    assert {shard.path for shard in first.shards()} < {shard.path for shard in filled.shards()}
    assert [shard.split for shard in filled.shards("eval")] == ["eval"] * 2


def test_history_of_an_old_version_ends_with_it(filled: Table):
    for version in range(3):
        history = Table.open(f"{filled.location}@{version}").history()
        assert [commit["version"] for commit in history] == list(range(version, -1, -1))
        assert [commit["operation"] for commit in history] == ["WRITE"] * version + ["CREATE TABLE"]


@pytest.mark.parametrize(
    ("location", "parsed"),
    [
        ("a/b", ("a/b", None)),
        ("a/b@12", ("a/b", 12)),
        ("a@b", ("a", "b")),
        ("a@1/b@2", ("a@1/b", 2)),
        ("a@b/c", ("a@b/c", None)),
    ],
)
def test_parse_separates_path_and_version(location, parsed):
    assert parse(location) == parsed


def test_a_missing_table_or_version_is_reported(filled: Table, tmp_path: Path):
    with pytest.raises(TableNotFoundError, match="no version 7"):
        Table.open(f"{filled.location}@7")
    for path in (tmp_path / "nothing", tmp_path / "empty", tmp_path / "file"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        (tmp_path / "file").write_text("x")
        with pytest.raises(TableNotFoundError, match="no soft-label table here"):
            Table.open(str(path))
        assert not Table.exists(str(path))
    assert not (tmp_path / "nothing").exists(), "opening creates nothing"


def test_another_kind_of_delta_table_is_refused(tmp_path: Path):
    write_deltalake(tmp_path / "other", pa.table({"x": [1]}))
    with pytest.raises(TableError, match=r"no such property(.|\n)*other"):
        Table.open(str(tmp_path / "other"))
    with pytest.raises(TableError, match="not a soft-label table"):
        make_table(tmp_path / "other", identity())
    write_deltalake(tmp_path / "parts", pa.table({"x": [1, 2], "city": ["New York", None]}), partition_by=["city"])
    with pytest.raises(TableError, match="not a soft-label table"):
        Table.open(str(tmp_path / "parts"))


def test_a_damaged_log_is_not_reported_as_a_missing_table(filled: Table):
    log = Path(filled.location) / "_delta_log" / f"{1:020}.json"
    log.write_text(log.read_text()[:100])
    for location in (filled.location, f"{filled.location}@1"):
        with pytest.raises(IntegrityError, match="log can't be read"):
            Table.open(location)


@pytest.mark.parametrize("damage", ["flip", "remove", "foreign"])
def test_a_damaged_vocabulary_is_named(filled: Table, damage: str):
    (path,) = Path(filled.location).glob("_softlabel/vocabulary-*")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "flip":
        path.write_bytes(content)
    elif damage == "remove":
        path.unlink()
    else:
        shutil.copy(next(Path(filled.location).glob("split=train/*")), path)
    with pytest.raises(IntegrityError, match=path.name):
        _ = Table.open(filled.location).numbering


def test_creating_again_opens_the_table_or_refuses_another_identity(filled: Table):
    again = make_table(Path(filled.location), identity(), seed=1)
    assert again.version == 2
    assert again.vocabulary_name == filled.vocabulary_name
    selection = identity().selection.model_copy(update={"max_k": 5})
    with pytest.raises(ProvenanceError, match=r"selection.max_k: the table has 8, this run 5") as error:
        make_table(Path(filled.location), identity(selection=selection))
    assert "min_k" not in str(error.value)


@pytest.mark.parametrize(
    "field",
    [pa.field("positions", pa.int64()), pa.field("when", pa.time64("us")), pa.field("xs", pa.list_(pa.uint64()))],
)
def test_columns_that_cannot_be_carried_are_refused(tmp_path: Path, field: pa.Field):
    (tmp_path / "tokenizer").mkdir()
    with pytest.raises(UsageError, match=field.name):
        Table.create(str(tmp_path / "t"), identity(), pa.schema([field]), random_labels(5), tmp_path / "tokenizer")
    assert not (tmp_path / "t").exists()


def test_a_folder_that_cannot_be_created_is_reported(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "tokenizer").mkdir()
    for location in (tmp_path / "file" / "table", Path("/proc/table")):
        with pytest.raises(TableError, match=f"can't be created(.|\n)*{location}"):
            Table.create(str(location), identity(), CARRIED, random_labels(5), tmp_path / "tokenizer")


def test_a_tokenizer_that_cannot_be_copied_leaves_no_table(tmp_path: Path):
    with pytest.raises(TableError, match="can't be created"):
        Table.create(str(tmp_path / "t"), identity(), CARRIED, random_labels(5), tmp_path / "nothing")
    assert not Table.exists(str(tmp_path / "t"))


def create_often(folder: Path | str, identity: Identity, seed: int, start: Barrier, made: Queue) -> None:
    """Create 15 tables, each at the same moment as another process; put each vocabulary or error into ``made``."""
    found = []
    for n in range(15):
        start.wait(60)
        try:
            found.append(make_table(f"{folder}/table{n}", identity, seed).numbering.vocabulary.tolist())
        except ProvenanceError as error:
            found.append(str(error))
    made.put(found)


def race(folder: Path | str, identities: list[Identity]) -> list[list[list[int] | str]]:
    start, made = PROCESSES.Barrier(2), [PROCESSES.SimpleQueue() for _ in identities]
    racers = [
        process(create_often, folder, identity, seed, start, queue)
        for seed, (identity, queue) in enumerate(zip(identities, made, strict=True))
    ]
    for racer in racers:
        racer.start()
    found = [queue.get() for queue in made]
    for racer in racers:
        racer.join()
    return found


def test_two_processes_that_create_the_same_table_share_it(tmp_path: Path):
    """Both get the same table, whose ranking comes from the labels of the first."""
    first, second = race(tmp_path, [identity(), identity()])
    assert first == second
    by_seed = [
        make_table(tmp_path / f"alone{n}" / "table", identity(), n).numbering.vocabulary.tolist() for n in range(2)
    ]
    assert all(ids in by_seed for ids in first)
    for n in range(15):
        table = Table.open(str(tmp_path / f"table{n}"))
        assert table.version == 0
        assert add(table, ["a"]).sequences == 1


def test_of_two_processes_that_create_different_tables_one_is_refused(tmp_path: Path):
    """One creates it; the other gets an error that names the difference."""
    other = identity(selection=identity().selection.model_copy(update={"seed": 1}))
    for a, b in zip(*race(tmp_path, [identity(), other]), strict=True):
        (error,) = [part for part in (a, b) if isinstance(part, str)]
        assert "selection.seed: the table has" in error
        assert "temperatures" not in error


def test_an_emptied_commit_file_is_named_and_nothing_is_deleted(filled: Table):
    """delta-rs reads it as a commit without changes: the shards would then be deleted as leftovers."""
    newest = Path(filled.location, "_delta_log", f"{filled.version:020}.json")
    newest.write_bytes(b"")
    for look in (lambda: Table.open(filled.location), lambda: maintain(filled.location, grace_hours=0)):
        with pytest.raises(IntegrityError, match=newest.name):
            look()
    newest.unlink()
    add(Table.open(filled.location), [f"b{i}" for i in range(40)])
    assert names_in(filled.newest()) == names_in(filled)
    Path(filled.location, "_delta_log", f"{1:020}.json").write_bytes(b"")
    with pytest.raises(IntegrityError, match=f"{1:020}.json"):
        maintain(filled.location, grace_hours=0)


def test_a_commit_survives_a_power_cut(table: Table, monkeypatch: pytest.MonkeyPatch):
    synced, real = [], os.fsync

    def noted(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    add(table, ["a"])
    log = Path(table.location, "_delta_log")
    assert {(log / f"{1:020}.json").stat().st_ino, log.stat().st_ino} <= set(synced)


def test_no_table_is_created_where_shards_have_lost_their_log(filled: Table):
    """They would be deleted as leftovers of the new table."""
    log = Path(filled.location, "_delta_log")
    log.rename(log.with_name("away"))
    with pytest.raises(IntegrityError, match=r"the log of the table that they belong to is missing(.|\n)*split="):
        make_table(filled.location, identity())
    assert not log.exists()


def test_a_table_is_scanned_whatever_its_folder_is_called(tmp_path: Path):
    """A name that looks like a pattern is none."""
    for name, rows in {"bXc": ["other"], "b*c": ["a", "b"], "[1]": ["c"]}.items():
        made = make_table(tmp_path / name, identity())
        add(made, rows)
        assert sorted(made.newest().scan().collect()["document_id"]) == rows
