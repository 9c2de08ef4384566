"""A rewrite is one commit with each row once, whatever other writers commit and whenever it is killed."""

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from softlabel.storage.codec import decode
from softlabel.storage.committing import try_commit
from softlabel.storage.errors import TableError, UsageError
from softlabel.storage.reader import read
from softlabel.storage.schema import SOFT_LABELS
from softlabel.storage.table import Table
from softlabel.storage.upkeep import rewrite as module
from softlabel.storage.upkeep.rewrite import ConflictError, rewrite
from softlabel.storage.upkeep.rewrite_plan import Rewriting
from softlabel.storage.upkeep.verification import verify
from tests.numberings import by_id
from tests.storage.tables import PROCESSES, add, identity, make_table, names_in

A = [f"a{i}" for i in range(40)]
B = [f"b{i}" for i in range(40)]


def named(*names: str) -> Callable[[pa.Table], NDArray[np.bool_]]:
    """Keep the documents with these ids."""
    return lambda rows: np.isin(rows.column("document_id").to_numpy(zero_copy_only=False).astype(str), names)


def of_source(source: str) -> Callable[[pa.Table], NDArray[np.bool_]]:
    return lambda rows: rows.column("source").to_numpy(zero_copy_only=False) == source


def contents(table: Table) -> list[dict[str, object]]:
    """Every row, all columns and its split, in the order of the documents' names; ids as the teacher has them."""
    rows = []
    for shard in table.shards():
        part = read(table, shard)
        for i in range(len(part)):
            labels = by_id(decode(part.slice(i, 1), table.numbering))
            row = part.slice(i, 1).drop_columns([name for name in SOFT_LABELS.names if name != "head_codes"])
            soft = {name: values.tolist() for name, values in vars(labels).items() if name != "tail_logprobs"}
            rows.append({**row.to_pylist()[0], **soft, "split": shard.split})
    return sorted(rows, key=lambda row: str(row["document_id"]))


def waiting(table: Table) -> list[str]:
    """Finished shards that are not committed yet."""
    return sorted(file.name for file in table.place.files("_softlabel/rewritten"))


def job(table: Table, **more: object) -> Rewriting:
    return Rewriting(table, **({"target": table, "positions": 100, "row_group": 16} | more))  # type: ignore[arg-type]


def test_rows_are_dropped_in_one_new_version(filled: Table) -> None:
    before = contents(filled)
    done = rewrite(job(filled, keep=named(*A, *B[:30]), columns=("document_id",)), {"operation": "test"})
    newest = filled.newest()
    assert (done.version, newest.version) == (3, 3)
    assert contents(newest) == [row for row in before if row["document_id"] in {*A, *B[:30]}]
    assert contents(Table.open(f"{filled.location}@2")) == before, "the old version is unchanged"
    assert (done.dropped, done.left + done.sequences) == (10, 70)
    assert waiting(filled) == []
    about = newest.history()[0]["softlabel"]
    assert (about["operation"], about["sequences"]) == ("test", -10)
    assert about["positions"] == -sum(row["positions"] for row in before if row["document_id"] in B[30:])
    assert about["bytes"] == sum(s.bytes for s in newest.shards()) - sum(s.bytes for s in filled.shards())


def test_shards_that_need_no_change_are_kept(filled: Table) -> None:
    of_a = {shard.path for shard in Table.open(f"{filled.location}@1").shards()}
    done = rewrite(job(filled, keep=named(*A, *B[:30]), columns=("document_id",)), {})
    assert of_a < {shard.path for shard in filled.newest().shards()}
    assert (done.left, done.replaced) == (40, 2)


def test_a_rewrite_without_changes_makes_no_version(filled: Table) -> None:
    assert rewrite(job(filled, keep=named(*A, *B), columns=("document_id",)), {}).version == 2
    assert rewrite(job(filled), {}).left == 80
    assert filled.newest().version == 2


def test_a_filter_that_leaves_nothing_changes_nothing(filled: Table) -> None:
    with pytest.raises(UsageError, match="no row would be left"):
        rewrite(job(filled, keep=named("c"), columns=("document_id",)), {})
    assert filled.newest().version == 2


def test_small_shards_are_merged_once(table: Table) -> None:
    for start in range(0, 40, 4):
        add(table.newest(), A[start : start + 4], "train")
    table = table.newest()
    before, limit = contents(table), 100
    done = rewrite(job(table, compact=True), {})
    newest = table.newest()
    assert contents(newest) == before
    sizes = [sum(read(newest, shard, ["positions"]).column("positions").to_pylist()) for shard in newest.shards()]
    assert max(sizes) <= limit
    assert len(sizes) == done.shards < 5 < len(table.shards()) == done.replaced
    assert sorted(sizes)[1] > limit - 13, "all but one are full: the next sequence would not fit"
    assert rewrite(job(newest, compact=True), {}).version == newest.version, "and so they stay"


def test_documents_move_to_their_new_split(filled: Table) -> None:
    done = rewrite(job(filled, split=lambda name: "eval" if name.endswith("1") else "train"), {})
    newest = filled.newest()
    assert {row["document_id"] for row in contents(newest) if row["split"] == "eval"} == {
        n for n in A + B if n[-1] == "1"
    }
    assert names_in(newest) == sorted(A + B)
    assert done.dropped == 0


def test_rows_are_stored_with_the_ranks_of_the_target_table(filled: Table, tmp_path: Path) -> None:
    other = make_table(tmp_path / "other", identity(), seed=9)
    assert other.vocabulary_name != filled.vocabulary_name
    done = rewrite(job(filled, target=other, keep=of_source("a"), columns=("source",)), {})
    assert (done.sequences, done.dropped, done.version) == (40, 40, 1)
    assert contents(other.newest()) == [row for row in contents(filled) if row["source"] == "a"]
    assert filled.newest().version == 2


def test_only_missing_rows_are_added_to_another_table(filled: Table, tmp_path: Path) -> None:
    other = make_table(tmp_path / "other", identity())
    rewrite(job(filled, target=other), {})
    again = rewrite(job(filled, target=other.newest()), {})
    assert (again.version, again.sequences, again.left, again.dropped) == (1, 0, 80, 0)
    add(filled, ["c1", "c2"])
    more = rewrite(job(filled.newest(), target=other.newest()), {})
    assert (more.sequences, more.left) == (2, 80)
    assert contents(other.newest()) == contents(filled.newest())


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kept=st.sets(st.sampled_from(A + B), min_size=1),
    held_out=st.none() | st.sets(st.sampled_from(A + B)),
    limit=st.integers(1, 300),
    compact=st.booleans(),
)
def test_each_kept_row_is_stored_once_whatever_the_settings(
    filled: Table, kept: set[str], held_out: set[str] | None, limit: int, compact: bool
) -> None:
    first = Table.open(f"{filled.location}@2")
    target = make_table(Path(filled.location).parent / f"t{time.monotonic_ns()}", identity())
    split = None if held_out is None else (lambda name: "eval" if name in held_out else "train")
    done = rewrite(
        job(
            first,
            target=target,
            keep=named(*kept),
            columns=("document_id",),
            split=split,
            positions=limit,
            compact=compact,
        ),
        {},
    )
    newest = target.newest()
    assert names_in(newest) == sorted(kept)
    assert (done.sequences, done.dropped) == (len(kept), 80 - len(kept))
    for shard in newest.shards():
        rows = read(newest, shard, ["positions", "document_id"])
        assert sum(rows.column("positions").to_pylist()) <= limit or len(rows) == 1
        if held_out is not None:
            assert {name in held_out for name in rows.column("document_id").to_pylist()} == {shard.split == "eval"}


def test_shards_that_others_add_meanwhile_are_kept(filled: Table) -> None:
    brought = []

    def bring(rows: int) -> None:
        if not brought:
            brought.append(add(filled.newest(), ["c1", "c2"]))

    done = rewrite(job(filled, keep=of_source("a"), columns=("source",), compact=True), {}, bring)
    assert done.version == 4
    assert names_in(filled.newest()) == sorted([*A, "c1", "c2"])


def test_shards_that_others_remove_meanwhile_stop_the_rewrite(filled: Table) -> None:
    def take(rows: int) -> None:
        if filled.newest().version == 2:
            rewrite(job(filled.newest(), keep=of_source("b"), columns=("source",)), {})

    with pytest.raises(ConflictError, match="meanwhile"):
        rewrite(job(filled, compact=True, positions=1000), {}, take)
    assert names_in(filled.newest()) == sorted(B)
    assert waiting(filled) == []


def test_of_two_rewrites_into_one_table_at_once_one_is_refused(filled: Table, tmp_path: Path) -> None:
    other = make_table(tmp_path / "other", identity())

    def bring(rows: int) -> None:
        if other.newest().version == 0:
            rewrite(job(filled, target=other.newest()), {})

    with pytest.raises(ConflictError):
        rewrite(job(filled, target=other), {}, bring)
    assert names_in(other.newest()) == sorted(A + B)


def test_a_rewrite_that_loses_a_race_commits_on_top_of_the_others(
    filled: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another writer commits between the last check of the table and the commit."""
    others = iter([["c1"], ["c2"]])

    def late(newest: Table, *more: object) -> bool:
        if names := next(others, None):
            add(newest, names)
        return try_commit(newest, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "try_commit", late)
    assert rewrite(job(filled, keep=of_source("a"), columns=("source",)), {}).version == 5
    assert names_in(filled.newest()) == sorted([*A, "c1", "c2"])


def test_an_unwritable_folder_leaves_the_table_unchanged(filled: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise PermissionError(13, "Permission denied", str(target))

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(TableError, match="it is unchanged"):
        rewrite(job(filled, compact=True, positions=1000), {})
    monkeypatch.undo()
    assert names_in(filled.newest()) == sorted(A + B)
    assert filled.newest().version == 2


def compact(location: str) -> None:
    table = Table.open(location)
    rewrite(job(table, keep=of_source("a"), columns=("source",), compact=True), {"operation": "test"})


def finished(table: Table) -> int:
    """How many new shards wait for a commit, or have their final names already because the commit was about to come."""
    committed = {shard.path for shard in table.shards()}
    named = [file for file in table.place.files() if file.name.startswith("split=") and file.name not in committed]
    return len(waiting(table)) + len(named)


def test_a_rewrite_that_is_killed_can_be_repeated(table: Table) -> None:
    """12 times, at random moments: the table is unchanged until the commit, and finished shards are kept."""
    names = [f"{'ab'[i % 2]}{i}" for i in range(400)]
    for start in range(0, 400, 40):
        add(table.newest(), names[start : start + 40])
    table = table.newest()
    before, version, chance = contents(table), table.version, random.Random(0)
    most, died, window = 0, 0, 0.05
    for _ in range(12):
        worker = PROCESSES.Process(target=compact, args=(table.location,))
        worker.start()
        time.sleep(chance.uniform(0, window))
        worker.kill()
        worker.join()
        died += worker.exitcode == -signal.SIGKILL
        window *= 1.4  # however fast or busy the machine is, the first dies, and later ones get further
        newest = table.newest()
        if newest.version > version:
            break
        assert contents(newest) == before
        assert finished(newest) >= most, "nothing that was finished is lost"
        most = finished(newest)
    assert died
    compact(table.location)
    newest = table.newest()
    assert newest.version == version + 1
    assert contents(newest) == [row for row in before if row["source"] == "a"]
    assert waiting(newest) == []


def test_finished_shards_of_an_interrupted_rewrite_are_reused(filled: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    made, everything = [], {"split": lambda name: "train"}

    class Counted(module.ShardFile):
        def finish(self) -> None:
            super().finish()
            made.append(self.shard_path)

    monkeypatch.setattr(module, "ShardFile", Counted)
    with pytest.raises(KeyboardInterrupt):
        rewrite(job(filled, **everything), {}, interrupt_after(40))
    finished = list(made)
    assert len(waiting(filled)) == len(finished) > 0
    done = rewrite(job(filled, **everything), {})
    assert len(made) == len(set(made)) == done.shards
    assert set(finished) < {shard.path for shard in filled.newest().shards()}
    decode(read(filled.newest(), filled.newest().shards()[0]), filled.numbering)


def test_a_finished_shard_that_was_damaged_meanwhile_is_made_again(filled: Table) -> None:
    everything = {"split": lambda name: "train"}
    with pytest.raises(KeyboardInterrupt):
        rewrite(job(filled, **everything), {}, interrupt_after(40))
    for name in (found := waiting(filled)):
        path = Path(filled.location, name)
        path.write_bytes(path.read_bytes()[:-1])
    assert found
    rewrite(job(filled, **everything), {})
    assert verify(filled.newest()).findings == ()
    assert names_in(filled.newest()) == sorted(A + B)
    assert waiting(filled) == []


def interrupt_after(rows: int) -> Callable[[int], None]:
    def watch(done: int) -> None:
        if done >= rows:
            raise KeyboardInterrupt

    return watch
