"""What was damaged or planted in a table's folder is named, read past or refused; nothing hangs and nothing leaks."""

import json
import os
import re
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable

from softlabel.storage.committing import try_commit
from softlabel.storage.errors import IntegrityError, SoftlabelError, TableError
from softlabel.storage.log.files import LARGEST_LINE, commit_file
from softlabel.storage.log.state import Chain, Shard, state
from softlabel.storage.places.place import hash_of
from softlabel.storage.reader import read
from softlabel.storage.records import store
from softlabel.storage.records.derivations import derived, record_derived
from softlabel.storage.records.sealed_json import seal, unseal
from softlabel.storage.records.takedown import purges, refuse
from softlabel.storage.records.versions import pin, pins, retire, tag, tags, vacuumed
from softlabel.storage.shard_file import add_action
from softlabel.storage.table import Table
from softlabel.storage.upkeep.inspection import history, inspect
from softlabel.storage.upkeep.maintenance import maintain
from softlabel.storage.upkeep.replay import read_log
from softlabel.storage.upkeep.verification import remove_damaged, verify
from softlabel.storage.views.view import open_table
from tests.storage.tables import CARRIED, add, identity, make_table, names_in

LAST = "_delta_log/_last_checkpoint"
CHECKPOINT = f"_delta_log/{2:020}.checkpoint.parquet"


def at(table: Table, name: str) -> Path:
    return Path(table.location, name)


def edited(table: Table, version: int, old: str, new: str) -> None:
    path = at(table, commit_file(version))
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


FLIPS = {
    '"user":"test"': '"user":"tess"',
    '"operation":"WRITE"': '"operation":"WRITF"',
    '"timestamp":1': '"timestamp":2',
    '"operation":"capture"': '"operation":"capturf"',
    '"modificationTime":1': '"modificationTime":2',
    '"hash":': '"hasj":',
}


@pytest.mark.parametrize(("old", "new"), FLIPS.items())
def test_all_that_the_newest_commit_says_is_protected(filled: Table, old: str, new: str) -> None:
    edited(filled, 2, old, new)
    (finding,) = verify(Table.open(filled.location)).findings
    assert finding.path == commit_file(2)
    with pytest.raises(IntegrityError, match=commit_file(2)):
        Table.open(filled.location).shards()


@pytest.mark.parametrize("version", [1, 2])
def test_a_flipped_previous_names_its_own_commit(filled: Table, version: int) -> None:
    previous = json.loads(at(filled, commit_file(version)).read_text().splitlines()[0])["commitInfo"]["softlabel"][
        "previous"
    ]
    edited(filled, version, previous, previous[:-1] + ("0" if previous[-1] != "0" else "1"))
    assert {finding.path for finding in verify(Table.open(filled.location)).findings} == {commit_file(version)}


HISTORIES = {'"positions":': '"positions":1', '"timestamp":1': '"timestamp":"', '"operation":"WRITE"': '"op":"WRITE"'}


@pytest.mark.parametrize(("old", "new"), HISTORIES.items())
def test_a_damaged_commit_is_no_part_of_the_history(filled: Table, old: str, new: str) -> None:
    """A wrong number would be believed."""
    edited(filled, 1, old, new)
    for show in (history, inspect):
        with pytest.raises(IntegrityError, match=commit_file(1)):
            show(Table.open(filled.location))


def test_a_commit_without_its_time_or_operation_is_named(filled: Table) -> None:
    infos = [None, [], "x", {}, {"timestamp": "x", "operation": "x"}, {"timestamp": 1e300, "operation": "x"}]
    for info in (*infos, {"timestamp": 1}, {"timestamp": 1, "operation": 1}):
        at(filled, commit_file(3)).write_text(json.dumps({"commitInfo": info}))
        with pytest.raises(IntegrityError, match=commit_file(3)):
            history(Table.open(filled.location))


def chain(damaged: int, old: bytes, new: bytes) -> dict[str, str]:
    """Problems of four commits without hashes of their own, as earlier versions wrote them, one of them damaged."""
    found, last = Chain(), ""
    for version in range(4):
        about = {"operation": "x", **({"previous": last} if last else {})}
        content = json.dumps({"commitInfo": {"softlabel": about}}).encode()
        last = hash_of(content)
        found.add(version, content.replace(old, new) if version == damaged else content)
    return found.damaged


def test_a_flipped_previous_of_an_older_commit_names_the_right_file() -> None:
    assert list(chain(1, b'"previous": "', b'"previous": "x')) == [commit_file(1)]
    assert list(chain(2, b'"previous": "', b'"previous": "x')) == [commit_file(2)]
    assert list(chain(2, b'"operation": "x"', b'"operation": "y"')) == [commit_file(2)]
    assert chain(9, b"", b"") == {}


SETTINGS = {'"year': '"yeas', '"head_codes': '"head_codet', '"max_k\\":8': '"max_k\\":9'}


@pytest.mark.parametrize(("old", "new"), SETTINGS.items())
def test_damaged_columns_and_identities_are_reported_as_damage(filled: Table, old: str, new: str) -> None:
    """Not as other carried columns, or as another teacher."""
    edited(filled, 0, old, new)
    opened = Table.open(filled.location)
    for use in (
        lambda: opened.carried,
        lambda: opened.require_carried(CARRIED),
        lambda: opened.identity.require(identity(), "x"),
        lambda: make_table(Path(filled.location), identity()),
        lambda: add(opened, ["z"]),
    ):
        with pytest.raises(IntegrityError, match=commit_file(0)):
            use()
    assert commit_file(0) in {finding.path for finding in verify(opened).findings}


@pytest.fixture
def marked(filled: Table) -> Table:
    """A table with a checkpoint and a commit after it."""
    DeltaTable(filled.location).create_checkpoint()
    add(filled, ["c"])
    return filled.newest()


def of_another_version(table: Table) -> None:
    DeltaTable(table.location, version=1).create_checkpoint()
    at(table, f"_delta_log/{1:020}.checkpoint.parquet").replace(at(table, CHECKPOINT))


def cut(table: Table) -> None:
    at(table, CHECKPOINT).write_bytes(at(table, CHECKPOINT).read_bytes()[:1000])


def with_unreadable_columns(table: Table) -> None:
    """Of the same names and types, which is all that the state hash covers."""
    path = at(table, CHECKPOINT)
    rows = pq.read_table(path)
    changed = [
        row | {"schemaString": row["schemaString"].replace('"nullable"', '"nullablf"')} if row else None
        for row in rows["metaData"].to_pylist()
    ]
    column = pa.array(changed, rows.schema.field("metaData").type)
    pq.write_table(rows.set_column(rows.column_names.index("metaData"), "metaData", column), path)


CHECKPOINTS: dict[str, tuple[str, Callable[[Table], object]]] = {
    "emptied": (CHECKPOINT, lambda table: at(table, CHECKPOINT).write_bytes(b"")),
    "cut": (CHECKPOINT, cut),
    "of another version": (CHECKPOINT, of_another_version),
    "unreadable columns": (CHECKPOINT, with_unreadable_columns),
    "ahead": (LAST, lambda table: at(table, LAST).write_text('{"version":90,"size":4}')),
    "far ahead": (LAST, lambda table: at(table, LAST).write_text('{"version":123456789012345678901234,"size":4}')),
    "emptied hint": (LAST, lambda table: at(table, LAST).write_bytes(b"")),
    "nested hint": (LAST, lambda table: at(table, LAST).write_text("[" * 100_000)),
    "missing": (LAST, lambda table: at(table, CHECKPOINT).unlink()),
}


@pytest.mark.parametrize("damage", CHECKPOINTS)
def test_a_damaged_checkpoint_is_read_past_named_and_renewed(marked: Table, damage: str) -> None:
    name, apply = CHECKPOINTS[damage]
    apply(marked)
    opened = Table.open(marked.location)
    assert (opened.version, opened.shards()) == (marked.version, marked.shards())
    assert names_in(opened) == sorted(opened.scan().collect()["document_id"])
    assert add(opened, ["d"]).version == 4
    assert name in {finding.path for finding in verify(opened).findings}
    assert name in maintain(marked.location, dry_run=True).renewed
    assert name in maintain(marked.location).renewed
    assert verify(Table.open(marked.location)).findings == ()
    assert maintain(marked.location).renewed == ()
    assert DeltaTable(marked.location).version() == 4
    assert len(DeltaTable(marked.location).file_uris()) == len(Table.open(marked.location).shards())


def test_a_checkpoint_is_made_every_hundred_versions_and_used(table: Table) -> None:
    for version in range(1, 105):
        shard = Shard(f"split=train/{version:032x}.parquet", "train", 1, 1)
        assert try_commit(table.newest(), [add_action(shard)], {})
    shards = Table.open(table.location).shards()
    assert len(shards) == 104
    assert at(table, f"_delta_log/{99:020}.checkpoint.parquet").exists()
    for version in range(50):
        at(table, commit_file(version)).unlink()
    assert Table.open(table.location).shards() == shards


OUTSIDE = ("../x.parquet", "split=train/../../x.parquet", "/etc/x.parquet", "%2e%2e/x.parquet", "split=a/%2E%2E/%2e./x")
OUTSIDE += (
    "file:///etc/x.parquet",
    "s3://bucket/x.parquet",
    "split=a/..%2fx",
    "%252e%252e/x.parquet",
    "a\\..\\x.parquet",
)
OUTSIDE += ("C:/x.parquet", "C:\\x.parquet", "split=train/%00x.parquet", "split=train\n/x.parquet", "split=train/.")
OUTSIDE += ("split=train/\x7f.parquet",)
OUTSIDE += ("_delta_log/x.parquet", "_softlabel/tags/x.json", "split=a//x.parquet", "./x.parquet", "x\x00.parquet", "")


@pytest.mark.parametrize("path", OUTSIDE)
@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_path_that_leaves_the_table_is_refused(filled: Table, path: str, checkpoint: bool) -> None:
    """Even if all hashes of the log are right."""
    assert try_commit(filled, [add_action(Shard(path, "train", 1, 1))], {})
    if checkpoint:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("softlabel.storage.log.state._OUTSIDE", re.compile("$x"))
            DeltaTable(filled.location).create_checkpoint()
    for use in (lambda: Table.open(filled.location), filled.newest, lambda: verify(filled), lambda: read_log(filled)):
        with pytest.raises(IntegrityError, match=commit_file(3)):
            use()


@pytest.mark.parametrize("which", ["vocabulary", "tokenizer"])
def test_a_vocabulary_or_tokenizer_elsewhere_is_refused(filled: Table, which: str) -> None:
    """Before anything there is read, even if all hashes of the log are right."""
    for number in (1, 2):
        at(filled, commit_file(number)).unlink()
    path = at(filled, commit_file(0))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    metadata = next(line["metaData"] for line in lines if "metaData" in line)
    for name in ("../secret", "/etc", "tokenizer-../../x", "tokenizer-" + "A" * 32, "x\0", "\ud800"):
        metadata["configuration"][f"softlabel.{which}"] = name
        message = lines[0]["commitInfo"]["softlabel"]
        message |= {"state": state(0, metadata["configuration"], metadata["schemaString"], []), "hash": "0" * 32}
        content = "\n".join(map(json.dumps, lines)).encode()
        path.write_bytes(content.replace(b"0" * 32, hash_of(content).encode(), 1))
        with pytest.raises(IntegrityError, match=commit_file(0)):
            Table.open(filled.location)


@pytest.mark.parametrize(
    "path", [f"split=train/{'a' * 300}.parquet", f"split=train/{'%C3%BC' * 200}.parquet", "a/" * 3000 + "x"]
)
def test_a_shard_whose_name_is_too_long_is_a_missing_one(filled: Table, path: str) -> None:
    """Not a file that can't be read at the moment."""
    assert try_commit(filled, [add_action(Shard(unquote(path), "train", 1, 1))], {})
    table = Table.open(filled.location)
    (shard,) = [shard for shard in table.shards() if shard.path == unquote(path)]
    with pytest.raises(IntegrityError, match="missing"):
        read(table, shard)
    assert shard.path in {finding.path for finding in verify(table).findings}
    assert shard.path in remove_damaged(verify(table)).removed


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fail if a block waits, for example for the other end of a pipe."""

    def stop(*_: object) -> None:
        raise AssertionError("still waiting")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def link(path: Path) -> None:
    aside = path.parent.parent / f"{path.name}.aside"
    aside.write_bytes(b"{}")
    path.symlink_to(aside)


def listener(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the path of a socket must be short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def folder(path: Path) -> None:
    path.mkdir()


PLANTED: dict[str, Callable[[Table], object]] = {
    commit_file(1): lambda table: Table.open(f"{table.location}@1"),
    commit_file(3): lambda table: Table.open(table.location),
    commit_file(4): lambda table: add(table.newest(), ["z"]),
    "_softlabel/tags/paper.json": lambda table: tags(table.location),
    "_softlabel/purged/x.json": lambda table: purges(table.location),
    "SHARD": lambda table: read(table, table.shards()[0]),
    "VOCABULARY": lambda table: table.numbering,
    "TOKENIZER": lambda table: table.tokenizer,
}


@pytest.mark.parametrize("plant", [pipe, device, link, listener, folder])
@pytest.mark.parametrize("name", PLANTED)
def test_what_is_not_a_regular_file_is_refused_at_once(marked: Table, name: str, plant: Callable[[Path], None]) -> None:
    names = {"SHARD": marked.shards()[0].path, "VOCABULARY": f"_softlabel/{marked.vocabulary_name}"}
    names["TOKENIZER"] = f"_softlabel/{marked.tokenizer_name}/tokenizer.json"
    path = at(marked, names.get(name, name))
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    plant(path)
    with within(10):
        with pytest.raises(TableError, match=path.name if name != "TOKENIZER" else marked.tokenizer_name):
            PLANTED[name](marked)
        try:
            assert path.name in str(verify(Table.open(marked.location))) or name == "TOKENIZER"
        except SoftlabelError as error:
            assert path.name in str(error)  # noqa: PT017


def full_folder(path: Path) -> None:
    path.mkdir()
    (path / "x").touch()


@pytest.mark.parametrize("plant", [pipe, device, link, listener, folder, full_folder])
@pytest.mark.parametrize("name", [CHECKPOINT, LAST])
def test_a_checkpoint_that_is_not_a_regular_file_is_read_past(marked: Table, name: str, plant: Callable) -> None:
    at(marked, name).unlink()
    plant(at(marked, name))
    with within(10):
        opened = Table.open(marked.location)
        assert opened.shards() == marked.shards()
        assert name in {finding.path for finding in verify(opened).findings}
        assert name in maintain(marked.location).renewed
        assert verify(Table.open(marked.location)).findings == ()


def test_records_and_log_lines_have_a_largest_size(marked: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "LARGEST_RECORD", 1000)
    with pytest.raises(TableError, match="nothing was written"):
        refuse(marked.location, [f"document {i}" for i in range(100)])
    assert purges(marked.location) == []
    tag(marked.location, 1, "paper")
    path = at(marked, "_softlabel/tags/paper.json")
    path.write_bytes(path.read_bytes() + b" " * 1000)
    with pytest.raises(IntegrityError, match=r"paper.json(.|\n)*more than the 1,000|more than the 1,000(.|\n)*paper"):
        tags(marked.location)
    path.unlink()
    log = at(marked, commit_file(3))
    content = log.read_bytes()
    for huge in (b'{"x":"' + b"y" * LARGEST_LINE + b'"}', b"[" * 100_000, b'{"add":' * 100_000, b"17", b'"add"'):
        log.write_bytes(content + b"\n" + huge)
        with pytest.raises(IntegrityError, match=commit_file(3)):
            Table.open(marked.location)
    with log.open("wb") as file:
        file.truncate(1 << 40)  # without data: it takes no space
    with within(5), pytest.raises(IntegrityError, match="more than"):
        Table.open(marked.location)


def test_huge_files_are_refused_before_they_are_read(marked: Table, tmp_path: Path) -> None:
    tokenizer = at(marked, f"_softlabel/{marked.tokenizer_name}/tokenizer.json")
    view = tmp_path / "view" / "view.json"
    view.parent.mkdir()
    view.touch()
    for path in (tokenizer, at(marked, LAST), at(marked, CHECKPOINT), at(marked, marked.shards()[0].path), view):
        os.truncate(path, 1 << 40)  # without data: it takes no space
    with within(100):
        assert Table.open(marked.location).shards() == marked.shards()
        with pytest.raises(IntegrityError, match=marked.tokenizer_name):
            _ = marked.tokenizer
        with pytest.raises(IntegrityError, match=r"view.json(.|\n)*more than"):
            open_table(str(view.parent))
        found = {finding.path for finding in verify(Table.open(marked.location)).findings}
    damaged = {f"_softlabel/{marked.tokenizer_name}", LAST, CHECKPOINT, marked.shards()[0].path}
    assert found == damaged


def at_record(table: Table, kind: str) -> Path:
    return next(at(table, f"_softlabel/{kind}").iterdir())


RECORDS: dict[str, Callable[[Table], object]] = {
    "tags": lambda table: tags(table.location),
    "pins": lambda table: pins(table.location),
    "purged": lambda table: purges(table.location),
    "vacuumed": lambda table: vacuumed(table.location),
    "derived": lambda table: derived(table.location),
}


@pytest.fixture
def recorded(marked: Table) -> Table:
    """A table with a record of each kind."""
    tag(marked.location, 1, "paper")
    pin(marked.location, 1, Path("/student"))
    refuse(marked.location, ["z"])
    retire(marked.location, [0])
    record_derived(marked.location, 1, "/other", "capture")
    return marked


@pytest.mark.parametrize("kind", RECORDS)
def test_a_damaged_record_is_a_finding_beside_others(recorded: Table, kind: str) -> None:
    path = at_record(recorded, kind)
    path.write_bytes(path.read_bytes().replace(b'"user"', b'"uses"'))
    at(recorded, recorded.shards()[0].path).unlink()
    for every in (False, True):
        found = {finding.path for finding in verify(Table.open(recorded.location), all_versions=every).findings}
        assert found == {f"_softlabel/{kind}/{path.name}", recorded.shards()[0].path}


WRONG = {"version": "x", "versions": ["x"], "shards": [1], "documents": "x", "time": 1, "name": None, "student": 1}
WRONG |= {"table": [], "operation": {}, "kind": "x", "user": 1.5}


@pytest.mark.parametrize("kind", RECORDS)
def test_a_record_with_values_of_other_types_is_refused(recorded: Table, kind: str) -> None:
    """Even if its hash is right; but what only a later version of softlabel knows is ignored."""
    path, before = at_record(recorded, kind), RECORDS[kind](recorded)
    fields = unseal(path.read_bytes())
    path.write_bytes(seal(fields | {"later": [1]}))
    assert RECORDS[kind](recorded) == before
    for name in fields.keys() & WRONG.keys():
        path.write_bytes(seal(fields | {name: WRONG[name]}))
        with pytest.raises(IntegrityError, match=path.name):
            RECORDS[kind](recorded)


def forged(table: Table, change: Callable[[list[dict]], object]) -> None:
    """Change the lines of the newest commit, and give it a hash that is right."""
    path = at(table, commit_file(table.version))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    change(lines)
    lines[0]["commitInfo"]["softlabel"]["hash"] = "0" * 32
    content = "\n".join(map(json.dumps, lines)).encode()
    path.write_bytes(content.replace(b"0" * 32, hash_of(content).encode(), 1))


def with_metadata(**changes: object) -> Callable[[list[dict]], object]:
    usual = {"id": "x", "schemaString": '{"fields": []}', "configuration": {"softlabel.format": "2"}}
    return lambda lines: lines.append({"metaData": usual | changes})


FORGED: dict[str, Callable[[list[dict]], object]] = {
    "nested statistics": lambda lines: lines[-1]["add"].update(stats="[" * 100_000),
    "statistics of another kind": lambda lines: lines[-1]["add"].update(stats="[1]"),
    "rows as text": lambda lines: lines[-1]["add"].update(stats='{"numRecords": "2"}'),
    "infinitely many rows": lambda lines: lines[-1]["add"].update(stats='{"numRecords": 1e999}'),
    "fewer rows than none": lambda lines: lines[-1]["add"].update(stats='{"numRecords": -1}'),
    "no size": lambda lines: lines[-1]["add"].update(size=None),
    "half a size": lambda lines: lines[-1]["add"].update(size=0.5),
    "no split": lambda lines: lines[-1]["add"].update(partitionValues={}),
    "half a character": lambda lines: lines[-1]["add"].update(partitionValues={"split": "\ud800"}),
    "half a character in a path": lambda lines: lines[-1]["add"].update(path="split=train/\ud800.parquet"),
    "an add that is a text": lambda lines: lines.append({"add": "x"}),
    "a remove without a path": lambda lines: lines.append({"remove": {}}),
    "properties of other kinds": with_metadata(configuration={"softlabel.format": 2}),
    "no properties": with_metadata(configuration=None),
    "half a character in a property": with_metadata(configuration={"softlabel.format": "2", "x": "\ud800"}),
    "nested columns": with_metadata(schemaString="[" * 100_000),
    "columns that are none": with_metadata(schemaString='{"fields": [{}]}'),
    "metadata that is a text": lambda lines: lines.append({"metaData": "x"}),
    "a vocabulary elsewhere": with_metadata(configuration={"softlabel.format": "2", "softlabel.vocabulary": "../x\0"}),
    "a nested identity": with_metadata(configuration={"softlabel.format": "2", "softlabel.identity": "[" * 100_000}),
}


def test_a_forged_commit_is_named(filled: Table) -> None:
    """No Python error comes out of it, whatever it says and although its hash is right."""
    name = commit_file(2)
    content = at(filled, name).read_bytes()
    for what, change in FORGED.items():
        forged(filled, change)
        with pytest.raises(IntegrityError, match=name):
            Table.open(filled.location).shards()
        with pytest.raises(IntegrityError, match=name):
            maintain(filled.location)
        try:
            assert name in str(verify(Table.open(filled.location))), what
        except IntegrityError as error:
            assert name in str(error), what  # noqa: PT017
        at(filled, name).write_bytes(content)
    assert verify(Table.open(filled.location)).findings == ()


def test_many_vacuums_leave_one_record(filled: Table) -> None:
    for version in range(200):
        retire(filled.location, [100 + version])
    assert len(list(at(filled, "_softlabel/vacuumed").iterdir())) == 1
    for version in (100, 299):
        with pytest.raises(TableError, match="vacuumed"):
            Table.open(f"{filled.location}@{version}")
    assert Table.open(f"{filled.location}@1").version == 1
