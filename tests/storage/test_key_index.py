"""A commit reads only newer commits and shards that share a key; files of keys never change what is added."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from softlabel.storage import key_index, reader
from softlabel.storage.codec import decode
from softlabel.storage.key_index import KEYS, tidy
from softlabel.storage.places.folder import Folder
from softlabel.storage.places.place import hash_of
from softlabel.storage.table import Table
from softlabel.storage.upkeep.maintenance import maintain
from softlabel.storage.upkeep.purge import purge
from softlabel.storage.upkeep.verification import verify
from softlabel.storage.writer import ShardWriter
from tests.storage.tables import add, names_in, rows

PER_FILE = 4


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_index, "SHARDS_PER_FILE", PER_FILE)
    monkeypatch.setattr(key_index, "_FEW", 0)


def new_process() -> None:
    """Forget what only this process knows."""
    key_index._INDEXES.clear()


def written(table: Table, commits: int) -> list[str]:
    """Names of the rows of this many commits of one shard each."""
    names = [f"d{i}" for i in range(commits)]
    for name in names:
        add(table.newest(), [name], "train")
    new_process()
    return names


def files(table: Table) -> list[Path]:
    return sorted(Path(table.location, KEYS).glob("*.parquet"))


def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths of the shards whose keys are read from then on."""
    seen: list[str] = []
    real = key_index.outline

    def noted(table, shard, columns):
        seen.append(shard.path)
        return real(table, shard, columns)

    monkeypatch.setattr(key_index, "outline", noted)
    return seen


def test_a_new_process_reads_only_shards_that_no_file_of_keys_has(table: Table, monkeypatch: pytest.MonkeyPatch):
    names = written(table, 2 * PER_FILE + 1)
    seen = reads(monkeypatch)
    assert add(table.newest(), ["new", names[0], names[-1]], "train").sequences == 1
    assert len(seen) == 1
    add(table.newest(), ["newer"], "train")
    assert len(seen) == 1, "a process knows its own shards"


def test_soft_labels_are_copied_from_the_shards_that_have_them(table: Table, monkeypatch: pytest.MonkeyPatch):
    """However many others the table has."""
    names = written(table, 2 * PER_FILE)
    opened: list[str] = []
    real = reader.Outline.__init__

    def noted(self, table, shard):
        opened.append(shard.path)
        real(self, table, shard)

    monkeypatch.setattr(reader.Outline, "__init__", noted)
    copies, labels = rows([names[3], names[6]], "train")
    others = copies.set_column(copies.column_names.index("document_id"), "document_id", pa.array(["x", "y"]))
    with ShardWriter(table.newest()) as writer:
        writer.append_copies(others)
        assert len(opened) == 2
        assert writer.commit({}).sequences == 2
    found = {name: decode(part, table.numbering) for name, part in by_name(table.newest()).items() if name in "xy"}
    assert [found[name].positions for name in "xy"] == copies.column("positions").to_pylist()
    np.testing.assert_array_equal(np.concatenate([found[name].head_ids for name in "xy"]), labels.head_ids)


def by_name(table: Table) -> dict[str, pa.Table]:
    every = pa.concat_tables(reader.read(table, shard) for shard in table.shards())
    return {name: every.slice(i, 1) for i, name in enumerate(every.column("document_id").to_pylist())}


def test_a_table_without_files_of_keys_gets_them(table: Table, monkeypatch: pytest.MonkeyPatch):
    """As tables of earlier versions."""
    names = written(table, PER_FILE + 2)
    for file in files(table):
        file.unlink()
    seen = reads(monkeypatch)
    assert add(table.newest(), ["new", *names], "train").sequences == 1
    assert len(seen) == len(names)
    new_process()
    assert add(table.newest(), names, "train").sequences == 0
    assert len(seen) == len(names)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def rewritten(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """Another content, under its right name."""
    pq.write_table(change(pq.read_table(path)), path)
    path.rename(path.with_name(f"{hash_of(path.read_bytes())}.parquet"))


def without_keys(path: Path) -> None:
    rewritten(path, lambda rows: rows.set_column(1, "keys", pa.array([b""] * len(rows))))


def with_unknown_shards(path: Path) -> None:
    def more(rows: pa.Table) -> pa.Table:
        other = pa.table({"shard": ["split=train/gone.parquet"], "keys": [b"12345678"]}, schema=rows.schema)
        return pa.concat_tables([other, rows])

    rewritten(path, more)


def without_shards(path: Path) -> None:
    rewritten(path, lambda rows: rows.slice(1))


def of_another_kind(path: Path) -> None:
    rewritten(path, lambda rows: pa.table({"x": [1]}))


DAMAGES = (Path.unlink, emptied, flipped, without_keys, with_unknown_shards, without_shards, of_another_kind)


@pytest.mark.parametrize("damage", DAMAGES)
def test_rows_are_added_once_whatever_happens_to_files_of_keys(table: Table, damage: Callable[[Path], None]):
    names = written(table, 2 * PER_FILE)
    for file in files(table):
        damage(file)
    assert add(table.newest(), [*names, "new"], "train").sequences == 1
    assert names_in(table.newest()) == sorted([*names, "new"])


@pytest.mark.parametrize("damage", [emptied, flipped])
def test_verify_names_a_damaged_file_of_keys_and_maintain_removes_it(table: Table, damage: Callable[[Path], None]):
    written(table, PER_FILE)
    (file,) = files(table)
    assert verify(table.newest()).findings == ()
    damage(file)
    assert [finding.path for finding in verify(table.newest()).findings] == [f"{KEYS}/{file.name}"]
    maintain(table.location)
    assert verify(table.newest()).findings == verify(table.newest()).orphans == ()


def test_files_of_keys_stay_few(table: Table):
    names = written(table, 8 * PER_FILE)
    assert len(files(table)) <= 4
    described = [path for file in files(table) for path in pq.read_table(file)["shard"].to_pylist()]
    assert sorted(described) == sorted(shard.path for shard in table.newest().shards())
    tidy(table.newest())
    assert len(files(table)) == 1
    assert add(table.newest(), names, "train").sequences == 0


def test_a_take_down_leaves_no_key_of_its_documents(table: Table):
    names = written(table, 2 * PER_FILE)
    rows = table.newest().scan().select("document_id", "key").collect().iter_rows()
    gone = {key[:8] for document, key in rows if document == names[0]}
    assert any(part in file.read_bytes() for file in files(table) for part in gone)
    purge(table.location, [names[0]], {}, (1000, 16))
    assert not any(part in file.read_bytes() for file in files(table) for part in gone)
    new_process()
    assert add(table.newest(), names, "train").sequences == 0
    assert names_in(table.newest()) == names[1:]


def test_the_newest_version_is_found_by_reading_only_newer_commits(table: Table, monkeypatch: pytest.MonkeyPatch):
    known = table.newest()
    for name in ("a", "b", "c"):
        add(known, [name], "train")
    read: list[str] = []
    real = Folder.read

    def noted(self, name, *limit):
        read.append(name)
        return real(self, name, *limit)

    opened = Table.open(table.location)
    add(Table.open(table.location), ["d"], "train")
    monkeypatch.setattr(Folder, "read", noted)
    newest = opened.newest()
    assert newest.version == 4
    assert [int(Path(name).stem) for name in read] == [3, 4, 5]
    assert newest.shards() == Table.open(table.location).shards()
    assert opened.version == 3


def test_a_table_that_was_made_anew_at_the_same_place_is_read_anew(table: Table, tmp_path: Path):
    add(table, ["a"], "train")
    newest = table.newest()
    log = Path(table.location, "_delta_log", f"{1:020}.json")
    first, second = log.read_text().splitlines()
    log.unlink()
    assert newest.newest().version == 0
    about = json.loads(first)
    del about["commitInfo"]["softlabel"]["hash"]
    log.write_text("\n".join([json.dumps(about), second]))
    assert newest.newest().version == 1
