"""Documents that are taken down are gone from every version, and no writer adds them again."""

import random
import signal
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from softlabel.storage.errors import PurgedError, TableError, TableNotFoundError
from softlabel.storage.places.open import place_of
from softlabel.storage.records.takedown import carry_over, purged_versions, purges, refusal
from softlabel.storage.records.versions import needed, pin, remaining, tag
from softlabel.storage.table import Table
from softlabel.storage.upkeep import purge as module
from softlabel.storage.upkeep.maintenance import maintain
from softlabel.storage.upkeep.purge import Purged, purge
from softlabel.storage.upkeep.rewrite import rewrite
from softlabel.storage.upkeep.rewrite_plan import Rewriting
from softlabel.storage.upkeep.verification import Finding, remove_damaged, verify
from softlabel.storage.writer import ShardWriter
from tests.storage.tables import PROCESSES, add, identity, make_table, names_in, rows

A = [f"a{i}" for i in range(40)]
B = [f"b{i}" for i in range(40)]
GONE = ["a1", "a7", "b2", "never-seen"]
ABOUT = {"operation": "purge"}
LAYOUT = (1000, 16)


def take_down(location: str) -> Purged:
    return purge(location, GONE, ABOUT, LAYOUT)[1]


def on_disk(location: str) -> set[str]:
    """Documents in all Parquet files with rows in the table's folder, used or unused."""
    found = set()
    place = place_of(location)
    for name in [file.name for file in place.files() if file.name.endswith(".parquet")]:
        if not name.startswith(("_softlabel/vocabulary", "_delta_log")):
            with place.fetch(name) as file:
                found.update(pq.read_table(file, columns=["document_id"]).column("document_id").to_pylist())
    return found


def test_documents_are_gone_from_every_version(filled: Table) -> None:
    compacted = rewrite(Rewriting(filled, filled, 1000, 16, compact=True), {})
    done = take_down(filled.location)
    newest = filled.newest()
    assert newest.version == compacted.version + 1
    assert names_in(newest) == sorted({*A, *B} - {*GONE})
    assert not on_disk(filled.location) & {*GONE}
    assert (done.documents, done.found) == (4, 3)
    assert done.versions == (1, 2, 3)
    assert {path.split("/")[0] for path in done.files} <= {"split=train", "split=eval"}
    assert newest.history()[0]["softlabel"]["operation"] == "purge"
    assert newest.history()[0]["softlabel"]["sequences"] == -3


def test_shards_without_the_documents_stay_unchanged(filled: Table) -> None:
    purge(filled.location, ["a1"], ABOUT, LAYOUT)
    of_b = {shard.path for shard in filled.shards()} - {s.path for s in Table.open(f"{filled.location}@0").shards()}
    kept = {shard.path for shard in filled.newest().shards()} & of_b
    assert len(kept) == 3


def test_opening_a_removed_version_explains_the_take_down(filled: Table) -> None:
    held = Table.open(filled.location)
    when = purges(filled.location)
    assert when == []
    take_down(filled.location)
    for version in (1, 2):
        with pytest.raises(PurgedError, match=r"taken down \(4 in all, on 20.*\n.*version 3 or a newer one") as error:
            Table.open(f"{filled.location}@{version}")
        assert "use the newest version" in str(error.value).replace(f"{filled.location}, ", "")
        assert isinstance(error.value, TableNotFoundError)
    with pytest.raises(PurgedError, match="version 3 or a newer one"):
        names_in(held)
    assert names_in(Table.open(f"{filled.location}@3")) == names_in(filled.newest())
    assert remaining(filled.location) == {0, 3}


def test_ids_of_the_documents_are_stored_only_as_hashes(filled: Table) -> None:
    purge(filled.location, ["a-very-telling-name"], ABOUT, LAYOUT)
    for path in Path(filled.location).rglob("*"):
        assert path.is_dir() or b"telling" not in path.read_bytes()
    assert refusal(filled.location)("a-very-telling-name")
    assert not refusal(filled.location)("a-very-telling-nam")


def test_no_writer_can_add_the_documents_again(filled: Table) -> None:
    with ShardWriter(filled) as early, ShardWriter(filled) as only_theirs:
        early.append(*rows(["a1", "c1"]))
        only_theirs.append(*rows(["b2"]))
        take_down(filled.location)
        assert early.commit({}).sequences == 1
        assert only_theirs.commit({}).sequences == 0
    assert add(filled.newest(), ["a7", "c2"]).sequences == 1
    assert names_in(filled.newest()) == sorted({*A, *B, "c1", "c2"} - {*GONE})
    take_down(filled.location)
    assert not on_disk(filled.location) & {*GONE}


def test_a_writer_about_to_commit_leaves_out_the_documents(filled: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has read the refuse list before the take-down, and commits afterwards."""
    from softlabel.storage import writer as writing

    honest, taken = writing.try_commit, []

    def late(*args: object) -> bool:
        if not taken:
            taken.append(rewrite_only(filled.location))
        return honest(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(writing, "try_commit", late)
    with ShardWriter(filled) as early:
        early.append(*rows(["never-seen", "c1"], "train"))
        assert early.commit({}).sequences == 1
    assert names_in(filled.newest()) == sorted({*A, *B, "c1"} - {*GONE})
    take_down(filled.location)
    assert not on_disk(filled.location) & {*GONE}


def rewrite_only(location: str) -> None:
    """A take-down up to its commit; the rest would wait for the writer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "place_of", stop)
        with pytest.raises(KeyboardInterrupt):
            take_down(location)


def stop(*args: object, **more: object) -> None:
    raise KeyboardInterrupt


def test_rows_that_are_committed_meanwhile_are_taken_down_too(filled: Table) -> None:
    brought = []

    def bring(done: int) -> None:
        if not brought:
            with pytest.MonkeyPatch.context() as patch:  # a writer that knows of no refuse list
                patch.setattr("softlabel.storage.writer.refusal", lambda table: lambda name: False)
                brought.append(add(filled.newest(), ["never-seen", "c1"]))

    purge(filled.location, GONE, ABOUT, LAYOUT, bring)
    assert names_in(filled.newest()) == sorted({*A, *B, "c1"} - {*GONE})
    assert not on_disk(filled.location) & {*GONE}


def test_unused_files_with_the_documents_are_deleted_too(filled: Table) -> None:
    """Including files with temporary names, and damaged files, which may contain the documents."""
    shard, folder = filled.shards()[0], Path(filled.location)
    waiting = folder / "_softlabel" / "rewritten" / f"0-{Path(shard.path).name}"
    waiting.parent.mkdir()
    for copy in (waiting, folder / "split=train" / f"{'0' * 32}.parquet"):
        copy.write_bytes((folder / shard.path).read_bytes())
    (folder / "split=train" / f"{'1' * 32}.parquet").write_bytes(b"PAR1 nothing of the kind")
    foreign = folder / "split=train" / "part-0.parquet"
    foreign.write_bytes(b"mine")
    documents = set(pq.read_table(folder / shard.path).column("document_id").to_pylist())
    done = purge(filled.location, documents, ABOUT, LAYOUT)[1]
    assert any(line.startswith("split=train/part-0.parquet, which was not checked") for line in done.out_of_reach)
    foreign.unlink()
    assert not on_disk(filled.location) & documents
    deleted = {str(waiting.relative_to(folder)), *(f"split=train/{digit * 32}.parquet" for digit in "01")}
    assert deleted < {*done.files}


def test_a_damaged_old_shard_is_deleted_too(table: Table) -> None:
    """A flipped byte can hide a document's id, so a damaged shard is deleted, and its version is lost."""
    add(table, ["secret", *A], "train")
    damaged = Path(table.location, table.newest().shards()[0].path)
    remove_damaged(replace(verify(table.newest()), findings=(Finding(f"split=train/{damaged.name}", "?"),)))
    good = damaged.read_bytes()
    place = pq.read_metadata(damaged).row_group(0).column(1).data_page_offset
    for at in range(place, place + 1000):
        damaged.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with suppress(OSError, ValueError):
            if "secret" not in pq.read_table(damaged, columns=["document_id"])["document_id"].to_pylist():
                break
    done = purge(table.location, ["secret"], ABOUT, LAYOUT)[1]
    assert (done.files, done.versions) == ((f"split=train/{damaged.name}",), (1,))
    assert not damaged.exists()


def test_broken_tags_and_pins_and_unreachable_copies_are_listed(filled: Table, tmp_path: Path) -> None:
    pin(filled.location, filled.version, tmp_path / "student")
    tag(filled.location, filled.version, "paper")
    tag(filled.location, 0, "empty")
    done = take_down(filled.location)
    assert done.broken == (f"student {tmp_path}/student, of version 2", "tag paper, of version 2")
    reach = "\n".join(done.out_of_reach)
    assert f"student {tmp_path}/student, trained on version 2" in reach
    assert "copies" in reach
    assert "object store" in reach
    assert needed(filled.location) == {0, 2}
    with pytest.raises(PurgedError):
        Table.open(f"{filled.location}@paper")


def test_other_documents_with_the_same_text_are_listed(table: Table) -> None:
    sequences, labels = rows(["a1", "a2"])
    for name in ("a1", "twin"):
        column = sequences.schema.get_field_index("document_id")
        named = sequences.set_column(column, sequences.schema.field(column), [[name, f"{name}-other"]])
        with ShardWriter(table.newest()) as writer:
            writer.append(named, labels)
            writer.commit({})
    assert purge(table.location, ["a1"], ABOUT, LAYOUT)[1].same_text == ("twin",)


def test_a_repeated_take_down_finds_nothing(filled: Table) -> None:
    first, again = take_down(filled.location), take_down(filled.location)
    assert (again.documents, again.found, again.files, again.versions) == (4, 0, (), first.versions)
    assert filled.newest().version == 3, "no second commit"
    take_down_one = purge(filled.location, ["b3"], ABOUT, LAYOUT)[1]
    assert (take_down_one.found, take_down_one.versions) == (1, (2, 3))
    assert names_in(filled.newest()) == sorted({*A, *B} - {*GONE, "b3"})
    assert set(purged_versions(filled.location)) == {1, 2, 3}


def test_verify_has_no_findings_after_a_take_down(filled: Table) -> None:
    take_down(filled.location)
    found = verify(filled.newest(), all_versions=True)
    assert (found.findings, found.orphans) == ((), ())
    assert maintain(filled.location, grace_hours=0).deleted == ()


def test_every_document_of_a_table_can_be_taken_down(filled: Table) -> None:
    purge(filled.location, [*A, *B], ABOUT, LAYOUT)
    assert names_in(filled.newest()) == []
    assert on_disk(filled.location) == set()


def test_the_refuse_list_can_be_copied_to_another_table(filled: Table, tmp_path: Path) -> None:
    take_down(filled.location)
    other = make_table(tmp_path / "other", identity())
    carry_over(filled.location, other.location)
    assert add(other, ["a1", "c1"]).sequences == 1
    assert purged_versions(other.location) == {}


def test_after_a_failed_deletion_the_take_down_can_be_repeated(filled: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda self, **more: refuse(self) if "split=" in str(self) else None)
        with pytest.raises(TableError, match="some files with these documents could not be deleted"):
            take_down(filled.location)
    assert on_disk(filled.location) & {*GONE}
    take_down(filled.location)
    assert not on_disk(filled.location) & {*GONE}


def test_after_a_full_disk_the_take_down_can_be_repeated(filled: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("softlabel.storage.upkeep.rewrite.ShardFile", full)
        with pytest.raises(TableError, match=r"still in the table(.|\n)*No space left(.|\n)*it continues"):
            take_down(filled.location)
    assert add(filled, ["never-seen"]).sequences == 0, "it is refused by now"
    assert take_down(filled.location).found == 3


def write_on(location: str) -> None:
    """Add rows forever, including those of the documents that are taken down."""
    for i in range(10**6):
        add(Table.open(location), [f"c{i}", GONE[i % 4], f"d{i}"])


def test_a_take_down_that_is_killed_at_any_moment_can_be_repeated(table: Table) -> None:
    """10 times, while a writer is active: the next run always ends with a table without the documents."""
    chance, died, window = random.Random(1), 0, 0.12
    for turn in range(10):
        tmp = make_table(Path(table.location).parent / f"turn{turn}" / "table", identity())
        for i in range(6):
            add(tmp.newest(), [f"{i}-{j}" for j in range(10)] + ["a1", "b2"][: i % 3])
        writer = PROCESSES.Process(target=write_on, args=(tmp.location,))
        remover = PROCESSES.Process(target=take_down, args=(tmp.location,))
        writer.start()
        remover.start()
        time.sleep(chance.uniform(0, window))
        for process in (remover, writer):
            process.kill()
            process.join()
        died += remover.exitcode == -signal.SIGKILL
        window *= 1.1 if remover.exitcode else 0.5  # however fast or busy the machine is, most are killed at work
        take_down(tmp.location)
        found = set(names_in(tmp.newest()))
        assert not found & {*GONE}
        assert {f"{i}-{j}" for i in range(6) for j in range(10)} <= found, "nobody else's rows are lost"
        assert not on_disk(tmp.location) & {*GONE}
        assert not list(Path(tmp.location, "_softlabel", "writing").glob("*"))
    assert died > 3, "some were killed while there was something to do"
