"""A table is narrowed or split again in place, in one version, even with other writers; old versions stay."""

from pathlib import Path
from typing import Any

import pytest

from softlabel.pipeline import ReprocessConfig, reprocess
from softlabel.pipeline.progress import Progress
from softlabel.storage.codec import decode
from softlabel.storage.committing import try_commit
from softlabel.storage.errors import IntegrityError, ProvenanceError
from softlabel.storage.table import Change, Table
from softlabel.storage.upkeep.inspection import history
from softlabel.storage.upkeep.maintenance import maintain
from softlabel.storage.upkeep.rewrite import ConflictError
from softlabel.storage.upkeep.verification import verify
from tests.pipeline.tables.test_reprocess import SMALL, A, B, in_a_process, rows_of, run, two_sources
from tests.storage.tables import PROCESSES, add, names_in


@pytest.fixture
def table(tmp_path: Path) -> Table:
    return two_sources(tmp_path / "table")


SETTINGS_IN_PLACE = (
    {"selection": {"max_k": 4, "draws": 3, "temperatures": [1.0]}},
    {"shards": {**SMALL, "eval_fraction": 0.5}},
    {"where": "source = 'a'", "selection": {"temperatures": [1.0]}, "shards": {**SMALL, "eval_fraction": 0.0}},
)


@pytest.mark.parametrize("settings", SETTINGS_IN_PLACE)
def test_a_table_changed_in_place_equals_one_changed_into_another_table(
    table: Table, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """It takes one version, and old versions stay readable."""
    before, old = rows_of(table), table.identity
    run(table.location, tmp_path / "other", **settings)
    other = Table.open(str(tmp_path / "other"))
    report = run(table.location, **settings)
    newest = Table.open(table.location)
    assert (report.version, newest.version) == (3, 3)
    assert newest.identity == other.identity != old
    columns = rows_of(other).column_names
    assert rows_of(newest, columns).equals(rows_of(other, columns))
    assert newest.scan().select("document_id").collect().height == len(rows_of(other))
    first = Table.open(f"{table.location}@2")
    assert first.identity == old
    assert rows_of(first).equals(before)
    assert verify(newest).findings == ()
    assert history(newest)[0].operation == report.operation
    assert run(table.location, **settings).version == 3, "there is nothing to do any more"


def test_no_shard_is_written_if_only_the_identity_changes(table: Table) -> None:
    run(table.location, shards={**SMALL, "eval_fraction": 0.5})
    before = Table.open(table.location)
    report = run(table.location, shards={**SMALL, "eval_fraction": 0.5000001}, selection={"max_k": 8, "draws": 6})
    newest = before.newest()
    assert (newest.version, newest.identity.sequences.eval_fraction) == (4, 0.5000001)
    assert newest.shards() == before.shards()
    assert (report.rows.left, report.rows.sequences, report.rows.shards) == (80, 0, 0)


def test_a_shard_that_narrowing_does_not_change_stays(table: Table) -> None:
    """No commit removes and adds the same file."""
    one_a_split = {"positions": 1_000_000}
    run(table.location, selection={"draws": 0}, shards=one_a_split)
    before = Table.open(table.location)
    largest = int(decode(rows_of(before), before.numbering).head_counts.max())
    selection = before.identity.selection.model_copy(update={"max_k": 99})
    wider = before.identity.model_copy(update={"selection": selection})
    assert try_commit(before, [], {"operation": "test"}, change=Change(wider))
    rows = run(table.location, selection={"max_k": largest}, shards=one_a_split).rows
    newest = Table.open(table.location)
    assert newest.identity.selection.max_k == largest
    assert (rows.left, rows.sequences, newest.shards()) == (80, 0, before.shards())
    assert verify(newest).findings == ()


def test_rows_added_while_a_table_is_narrowed_make_the_narrowing_fail(table: Table) -> None:
    def add_row(progress: Progress) -> None:
        if Table.open(table.location).version == 2:
            add(table, ["c1"])

    config = {"source": table.location, "selection": {"max_k": 4}, "shards": SMALL}
    with pytest.raises(ConflictError, match="meanwhile"):
        reprocess(ReprocessConfig.model_validate(config), add_row)
    assert Table.open(table.location).identity == table.identity
    reprocess(ReprocessConfig.model_validate(config))
    with pytest.raises(ProvenanceError, match="derived_from"):
        add(table, ["c2"])
    assert names_in(Table.open(table.location)) == sorted([*A, *B, "c1"])


def test_remains_of_a_killed_commit_are_removed_and_a_damaged_commit_is_named(table: Table) -> None:
    run(table.location, selection={"max_k": 4})
    log = Path(table.location, "_delta_log")
    left = log / f"{4:020}.json.{'0' * 32}.tmp"
    left.write_text("{")
    assert verify(Table.open(table.location)).orphans == (f"_delta_log/{left.name}",)
    maintain(table.location, grace_hours=-1)
    assert not left.exists()
    commit = log / f"{3:020}.json"
    commit.write_text(commit.read_text().replace("softlabel.identity", "softlabel.identify"))
    with pytest.raises(IntegrityError, match=commit.name):
        Table.open(table.location)


def test_of_several_runs_that_narrow_a_table_at_once_one_succeeds(table: Table) -> None:
    workers = [
        PROCESSES.Process(target=in_a_process, args=({"source": table.location, "selection": {"max_k": k}},))
        for k in (2, 3, 4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    newest = Table.open(table.location)
    assert newest.version >= 3
    assert names_in(newest) == sorted([*A, *B])
    assert verify(newest).findings == ()
    assert decode(rows_of(newest), newest.numbering).head_counts.max() == newest.identity.selection.max_k
