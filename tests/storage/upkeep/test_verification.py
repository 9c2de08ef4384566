"""verify names every damaged file of a table, and rows that it removes can be captured again."""

import os
import random
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable

from softlabel.storage.committing import try_commit
from softlabel.storage.errors import IntegrityError
from softlabel.storage.log.state import Shard
from softlabel.storage.places.place import content_hash
from softlabel.storage.reader import read
from softlabel.storage.schema import ROW_KEY, row_keys
from softlabel.storage.shard_file import add_action, parquet_options
from softlabel.storage.table import Table
from softlabel.storage.upkeep.examination import examine
from softlabel.storage.upkeep.rewrite import rewrite
from softlabel.storage.upkeep.rewrite_plan import Rewriting
from softlabel.storage.upkeep.verification import damage, remove_damaged, verify
from softlabel.storage.writer import ShardWriter
from tests.storage.tables import add, names_in, rows


def shard_file(table: Table, index: int = 0) -> Path:
    return Path(table.location, table.shards()[index].path)


def relative(table: Table, path: Path) -> str:
    return str(path.relative_to(table.location))


def flip(path: Path, at: int) -> None:
    """Change a byte, but keep the time of change."""
    stat, content = path.stat(), bytearray(path.read_bytes())
    content[at] ^= 1 << random.Random(at).randrange(8)
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_an_undamaged_table_has_no_findings(filled: Table):
    found = verify(filled, all_versions=True)
    assert (found.findings, found.orphans, found.unsolved) == ((), (), ())
    assert (found.version, found.shards, found.rows) == (2, len(filled.shards()), 80)
    assert found.bytes == sum(shard.bytes for shard in filled.shards())


def test_progress_counts_bytes_up_to_the_total(filled: Table):
    seen: list[tuple[int, int]] = []
    found = verify(filled, watch=lambda *progress: seen.append(progress))
    assert seen[-1] == (found.bytes, found.bytes)
    assert len(seen) == found.shards


def test_any_flipped_byte_is_named(filled: Table):
    path = shard_file(filled)
    content = path.read_bytes()
    for at in [0, 4, len(content) - 1, len(content) - 6, *random.Random(0).sample(range(len(content)), 12)]:
        flip(path, at)
        (finding,) = verify(filled).findings
        assert finding.path == relative(filled, path)
        path.write_bytes(content)
    assert verify(filled).findings == ()


@pytest.mark.parametrize("kept", [0, 10, -1])
def test_a_truncated_file_is_named(filled: Table, kept: int):
    path = shard_file(filled)
    path.write_bytes(path.read_bytes()[:kept])
    (finding,) = verify(filled).findings
    assert finding.path == relative(filled, path)
    assert "bytes" in finding.problem


def test_missing_and_swapped_files_are_named(filled: Table):
    missing, swapped = shard_file(filled, 0), shard_file(filled, 1)
    missing.unlink()
    shutil.copy(shard_file(filled, 2), swapped)
    findings = {finding.path: finding.problem for finding in verify(filled).findings}
    assert set(findings) == {relative(filled, missing), relative(filled, swapped)}
    assert findings[relative(filled, missing)] == "the file is missing"


def test_unused_files_are_orphans_and_not_damage(filled: Table):
    path = shard_file(filled).with_name("0" * 32 + ".parquet")
    path.write_bytes(b"?")
    found = verify(filled)
    assert (found.findings, found.orphans) == ((), (relative(filled, path),))


@pytest.mark.parametrize("pattern", ["_softlabel/vocabulary-*.parquet", "_softlabel/tokenizer-*/tokenizer.json"])
@pytest.mark.parametrize("how", [lambda path: flip(path, 1), Path.unlink])
def test_a_damaged_vocabulary_or_tokenizer_is_named(filled: Table, pattern: str, how):
    (path,) = Path(filled.location).glob(pattern)
    how(path)
    (finding,) = verify(filled).findings
    assert finding.path.startswith(pattern.partition("-")[0])
    assert remove_damaged(verify(filled)).removed == (), "no shard is to blame"


def test_old_versions_are_verified_by_number_or_with_all_versions(filled: Table):
    path = shard_file(filled)
    flip(path, 50)
    assert relative(filled, path) in remove_damaged(verify(filled)).removed
    newest = filled.newest()
    assert verify(newest).findings == ()
    (finding,) = verify(newest, all_versions=True).findings
    assert finding == verify(filled).findings[0]
    assert finding.path == relative(filled, path)


def forge(table: Table, name: str, change, count: int = 5, claimed: int | None = None) -> str:
    """Commit a shard with changed rows, but with the right name and checksums."""
    (shard,) = [shard for shard in table.shards("train") if shard.rows >= count][:1]
    original = read(table, shard).slice(0, count)
    ids = pa.array([f"{name}{i}" for i in range(count)], pa.string())
    forged = change(original.set_column(original.column_names.index("document_id"), original.field("document_id"), ids))
    path = Path(table.location, "split=train/forged.parquet")
    pq.write_table(forged, path, **parquet_options(forged.schema))
    with path.open("rb") as file:
        path = path.rename(path.with_name(f"{content_hash(file)}.parquet"))
    rows = len(forged) if claimed is None else claimed
    made = Shard(relative(table, path), "train", rows, path.stat().st_size)
    assert try_commit(table.newest(), [add_action(made)], {})
    return made.path


def replace_column(name: str, make):
    def change(table: pa.Table) -> pa.Table:
        index = table.column_names.index(name)
        values = table.column(name).to_pylist()
        return table.set_column(index, table.field(name), pa.array(make(values), table.field(name).type))

    return change


def longer(values):
    return [values[0] + values[0][:1], *values[1:]]


FORGERIES = {
    "nothing": (lambda table: table, None),
    "head_ids": (replace_column("head_ids", longer), "values in head_ids of document x0"),
    "tail_codes": (replace_column("tail_codes", longer), "values in tail_codes of document x0"),
    "masses": (replace_column("tail_log_masses", longer), "values in tail_log_masses of document x0"),
    "entropies": (replace_column("entropies", longer), "values in entropies of document x0"),
    "positions": (replace_column("positions", lambda values: [v + 1 for v in values]), "head_counts of document x0"),
    "mask": (
        replace_column("loss_mask", lambda values: [[True] * len(v) for v in values]),
        "captured tokens in loss_mask of document x0",
    ),
    "ranks": (
        replace_column("head_ids", lambda values: [[10**6] * len(v) for v in values]),
        "head_ids: values from 1000000",
    ),
    "tokens": (
        replace_column("token_ids", lambda values: [[-1] * len(v) for v in values]),
        "token_ids: values from -1",
    ),
    "columns": (lambda table: table.drop_columns(["year"]), "column year: found none, expected int64"),
    "types": (
        lambda table: table.drop_columns(["year"]).append_column("year", table.column("year").cast(pa.float64())),
        "column year: found double, expected int64",
    ),
    "order": (lambda table: table.select(table.column_names[::-1]), None),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_invalid_rows_are_named(filled: Table, name: str):
    """Undamaged files with invalid content, as another program may write them."""
    change, problem = FORGERIES[name]
    path = forge(filled, "x", change)
    findings = verify(filled.newest()).findings
    if problem is None:
        assert findings == (), "a change without effect is no problem"
    else:
        (finding,) = findings
        assert finding.path == path
        assert problem in finding.problem


def test_a_wrong_number_of_rows_in_a_commit_is_named(filled: Table):
    path = forge(filled, "x", lambda table: table, claimed=7)
    (finding,) = verify(filled.newest()).findings
    assert (finding.path, finding.problem) == (path, "rows: found 5, expected 7")


def test_duplicate_rows_are_named_and_removed(filled: Table):
    def again(table: pa.Table) -> pa.Table:
        return pa.concat_tables([table, table.slice(0, 2)])

    inside = forge(filled, "x", again)
    (finding,) = verify(filled.newest()).findings
    assert finding.path == inside
    assert finding.problem == f"2 of its rows are duplicates of rows in {inside}"
    between = forge(filled.newest(), "x", lambda table: table, count=4)
    findings = verify(filled.newest()).findings
    assert {finding.path for finding in findings} <= {inside, between}
    assert sum(int(finding.problem.split()[0]) for finding in findings) == 6
    taken = remove_damaged(verify(filled.newest()))
    assert taken.unsolved == ()
    assert verify(filled.newest()).findings == ()


def test_duplicate_rows_are_found_within_each_version_only(filled: Table):
    """The same rows in another shard of another version, as after a rewrite, are not duplicates."""
    assert rewrite(Rewriting(filled, filled, 1000, 16, compact=True), {}).replaced
    assert verify(filled.newest(), all_versions=True).findings == ()
    again = forge(filled.newest(), "x", lambda table: pa.concat_tables([table, table.slice(0, 2)]))
    remove_damaged(verify(filled.newest()))
    assert verify(filled.newest()).findings == ()
    (finding,) = verify(filled.newest(), all_versions=True).findings
    assert finding.path == again
    with ShardWriter(filled.newest()) as writer:
        writer.append(*rows(["a1", "z"]))
        writer.commit({})
    one, other = (forge(filled.newest(), "y", lambda table: table, count=count) for count in (4, 3))
    remove_damaged(verify(filled.newest()))
    findings = {finding.path: finding.problem for finding in verify(filled.newest(), all_versions=True).findings}
    assert set(findings) - {again} in ({one}, {other})
    assert "3 of its rows are duplicates of rows in" in findings[(set(findings) - {again}).pop()]


def test_removed_rows_can_be_captured_again(filled: Table):
    names = names_in(filled)
    flip(shard_file(filled, 0), 100)
    shard_file(filled, 1).unlink()
    taken = remove_damaged(verify(filled))
    newest = filled.newest()
    assert newest.version == 3, "one commit for both"
    assert taken.removed_rows == len(names) - len(names_in(newest))
    assert remove_damaged(taken).removed == taken.removed
    assert newest.newest().version == 3
    with ShardWriter(newest) as writer:
        writer.append(*rows(names))
        assert writer.commit({}).sequences == taken.removed_rows
    assert names_in(newest.newest()) == names
    assert verify(newest.newest()).findings == ()
    about = newest.history()[0]["softlabel"]
    assert about["operation"] == "remove 2 damaged shards"
    assert about["sequences"] == -taken.removed_rows


def test_a_writer_can_commit_after_damaged_shards_were_removed(filled: Table):
    """Its commit is made on top of the removal, and may add removed rows again."""
    flip(shard_file(filled), 100)
    with ShardWriter(filled) as writer:
        writer.append(*rows(["z"]))
        remove_damaged(verify(filled))
        assert writer.commit({}).sequences == 1
    assert "z" in names_in(filled.newest())


def test_the_error_has_a_line_for_each_finding_and_fits_on_a_screen(table: Table):
    for n in range(40):
        add(table, [f"{n}"])
    newest = table.newest()
    for shard in newest.shards():
        Path(newest.location, shard.path).unlink()
    found = verify(newest)
    error = damage(found)
    assert isinstance(error, IntegrityError)
    assert len(str(error).splitlines()) < 30
    assert "... and 20 more" in str(error)
    assert f"softlabel verify {table.location} --remove-damaged" in str(error)
    assert error.details == found


def test_the_error_recommends_removing_shards_only_if_a_shard_is_damaged(filled: Table):
    flip(Path(filled.location, "_softlabel", filled.vocabulary_name), 10)
    error = str(damage(verify(filled)))
    assert "restore these files" in error
    assert "--remove-damaged" not in error
    flip(shard_file(filled), 100)
    assert "--remove-damaged" in str(damage(verify(filled)))


def test_a_reader_of_a_damaged_shard_names_the_repair_command(filled: Table):
    flip(shard_file(filled), 100)
    with pytest.raises(IntegrityError, match=r"verify .*table --remove-damaged") as error:
        read(filled, filled.shards()[0])
    assert shard_file(filled).name in str(error.value)


def test_a_damaged_log_is_named(filled: Table):
    log = Path(filled.location, "_delta_log", f"{1:020}.json")
    opened = Table.open(filled.location)
    DeltaTable(filled.location).create_checkpoint()
    log.write_text(log.read_text()[:50])
    with pytest.raises(IntegrityError, match=log.name):
        verify(opened)


def test_different_rows_have_different_hashes(filled: Table):
    """verify finds duplicates by these hashes."""
    seen = np.concatenate([examine(filled, shard) for shard in filled.shards()])
    keys = [key for shard in filled.shards() for key in row_keys(read(filled, shard, ROW_KEY))]
    assert len(set(seen.tolist())) == len(set(keys)) == len(seen)
