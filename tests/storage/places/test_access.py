"""What can't be read at the moment (no permission, too many open files, a failing store) is not reported as damaged,
and nothing is deleted because of it."""

import os
import resource
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from obstore.store import S3Store

from softlabel.storage.errors import AccessError, TableError
from softlabel.storage.log.state import Shard
from softlabel.storage.places.open import place_of
from softlabel.storage.reader import outline, read
from softlabel.storage.records.takedown import refuse
from softlabel.storage.records.versions import pin, pins, tags
from softlabel.storage.schema import ROW_KEY
from softlabel.storage.table import Table
from softlabel.storage.upkeep.examination import examine
from softlabel.storage.upkeep.maintenance import maintain
from softlabel.storage.upkeep.purge import purge
from softlabel.storage.upkeep.verification import remove_damaged, verify
from tests import buckets
from tests.conftest import ROOT
from tests.storage.tables import add, identity, make_table

REFUSED = "a0"


def operations(table: Table, shard: Shard | None = None) -> dict[str, Callable[[], object]]:
    """Every operation that reads a table or one of its shards, or might remove something from it or add something."""
    shard = shard or table.shards()[0]
    return {
        "verify": lambda: remove_damaged(verify(table, all_versions=True)),
        "read": lambda: read(table, shard),
        "outline": lambda: list(outline(table, shard, ROW_KEY)),
        "open": lambda: Table.open(table.location),
        "vocabulary": lambda: Table.open(table.location).numbering,
        "tokenizer": lambda: table.tokenizer,
        "names": lambda: (tags(table.location), pins(table.location)),
        "vacuum": lambda: maintain(table.location, keep_versions=1, grace_hours=0),
        "purge": lambda: purge(table.location, ["b0"], {}, (1000, 16)),
        "write": lambda: add(table, [REFUSED, "c0"]),
    }


@contextmanager
def without_permission(path: Path) -> Iterator[None]:
    mode = path.stat().st_mode
    path.chmod(0)
    try:
        yield
    finally:
        path.chmod(mode)


@contextmanager
def without_open_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (sum(1 for _ in Path("/proc/self/fd").iterdir()) - 1, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def message_of(work: Callable[[], object]) -> str:
    """The message of the error, which must fit on one screen."""
    with pytest.raises(TableError) as error:
        work()
    assert type(error.value) in (AccessError, TableError), "neither missing nor damaged"
    assert len(str(error.value).splitlines()) < 7
    return str(error.value)


PROTECTED = {
    "split=*/*.parquet": ("verify", "read", "outline"),
    "split=*": ("verify", "read", "outline", "vacuum"),
    "_delta_log": ("verify", "open", "vacuum", "purge", "write"),
    "_delta_log/*0.json": ("verify", "open", "vacuum"),
    "_softlabel/pins": ("names", "vacuum"),
    "_softlabel/pins/*": ("names", "vacuum"),
    "_softlabel/purged": ("write", "verify"),
    "_softlabel/vocabulary-*": ("verify", "vocabulary"),
    "_softlabel/tokenizer-*": ("verify", "tokenizer"),
    "_softlabel/tokenizer-*/tokenizer.json": ("verify", "tokenizer"),
}
"""Unreadable files, and the operations that must then fail."""


def try_without_permission(location: str) -> None:
    table = Table.open(location)
    for pattern, names in PROTECTED.items():
        path = next(Path(location).glob(pattern))
        shard = next((s for s in table.shards() if s.path.startswith(str(path.relative_to(location)))), None)
        for name in names:
            with without_permission(path):
                found = message_of(operations(table, shard)[name])
            assert str(path) in found, f"{name} without {pattern}: {found}"
            assert "ermission denied" in found
    shard, log = Path(location, table.shards()[0].path), Path(location, "_delta_log")
    content = shard.read_bytes()
    shard.write_bytes(b"")
    log.chmod(0o555)
    assert "it is unchanged" in message_of(operations(table)["verify"]), "a shard is damaged, and can't be removed"
    log.chmod(0o755)
    shard.write_bytes(content)


def try_without_open_files(location: str) -> None:
    table = Table.open(location)
    verify(table)  # so that everything is imported already
    for name, work in operations(table).items():
        with without_open_files():
            found = message_of(work)
        assert "oo many open files" in found, f"{name}: {found}"


@pytest.mark.parametrize("attempt", [try_without_permission, try_without_open_files])
def test_what_cannot_be_read_is_not_damaged_and_not_deleted(
    filled: Table, tmp_path: Path, attempt: Callable[[str], None]
) -> None:
    """In a process without administrator rights, because an administrator can read everything."""
    pin(filled.location, 1, tmp_path / "student")
    refuse(filled.location, [REFUSED])
    shutil.copytree(filled.location, tmp_path / "before")
    rights = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    code = f"from {__name__} import {attempt.__name__} as attempt; attempt({filled.location!r})"
    done = subprocess.run([*rights, sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kept = {path.relative_to(filled.location) for path in Path(filled.location).rglob("*")}
    assert kept >= {path.relative_to(tmp_path / "before") for path in (tmp_path / "before").rglob("*")}
    assert Table.open(filled.location).version == filled.version
    assert verify(filled, all_versions=True).findings == ()


def test_running_out_of_memory_is_not_reported_as_damage(filled: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise pa.ArrowMemoryError("malloc of size 64 failed")

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", fail)
    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", fail)
    for name in ("verify", "read", "outline"):
        assert filled.shards()[0].path in message_of(operations(filled)[name])


class Failing(BaseHTTPRequestHandler):
    """A store that answers with an error, or closes the connection in the middle of an object."""

    status, size = 200, 0

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.send_header("Content-Length", str(self.size))
        self.send_header("Last-Modified", self.date_time_string())
        self.end_headers()
        self.wfile.write(b"PAR1")

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""


@pytest.mark.parametrize("status", [200, 503])
def test_a_failing_store_is_not_reported_as_damage(moto: str, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table is open already; reading a shard fails."""
    real, pause = S3Store.from_url, timedelta(milliseconds=10)
    once = {"max_retries": 1, "backoff": {"init_backoff": pause, "max_backoff": 2 * pause, "base": 2}}
    monkeypatch.setattr(S3Store, "from_url", lambda url, **more: real(url, **more | {"retry_config": once}))
    monkeypatch.setattr(Failing, "status", status)
    with buckets.environment(moto):
        table = make_table(f"{buckets.BUCKET}/{uuid.uuid4().hex}", identity())
        add(table, [f"a{i}" for i in range(40)], "train")
        table = table.newest()
        (shard,) = table.shards()
    with ThreadingHTTPServer(("127.0.0.1", 0), Failing) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        with buckets.environment(f"http://127.0.0.1:{server.server_port}"):
            table.place = place_of(table.location)
            monkeypatch.setattr(Failing, "size", shard.bytes)
            for work in (lambda: examine(table, shard), operations(table)["read"], operations(table)["outline"]):
                assert shard.path in message_of(work)
        server.shutdown()
