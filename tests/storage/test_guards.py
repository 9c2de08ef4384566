"""What was damaged or planted in a table's folder is named, read past or refused; nothing hangs and nothing leaks."""

import json
import os
import re
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from deltalake import DeltaTable

from softlabel.storage.committing import try_commit
from softlabel.storage.errors import IntegrityError, SoftlabelError, TableError
from softlabel.storage.log.files import LARGEST_LINE, commit_file
from softlabel.storage.log.state import Chain, Shard
from softlabel.storage.places.place import hash_of
from softlabel.storage.reader import read
from softlabel.storage.records import store
from softlabel.storage.records.takedown import purges, refuse
from softlabel.storage.records.versions import retire, tag, tags
from softlabel.storage.shard_file import add_action
from softlabel.storage.table import Table
from softlabel.storage.upkeep.maintenance import maintain
from softlabel.storage.upkeep.replay import read_log
from softlabel.storage.upkeep.verification import verify
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


CHECKPOINTS: dict[str, tuple[str, Callable[[Table], object]]] = {
    "emptied": (CHECKPOINT, lambda table: at(table, CHECKPOINT).write_bytes(b"")),
    "cut": (CHECKPOINT, cut),
    "of another version": (CHECKPOINT, of_another_version),
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


@pytest.mark.parametrize("plant", [pipe, device, link, listener])
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


def test_many_vacuums_leave_one_record(filled: Table) -> None:
    for version in range(200):
        retire(filled.location, [100 + version])
    assert len(list(at(filled, "_softlabel/vacuumed").iterdir())) == 1
    for version in (100, 299):
        with pytest.raises(TableError, match="vacuumed"):
            Table.open(f"{filled.location}@{version}")
    assert Table.open(f"{filled.location}@1").version == 1
