"""The embedded server: it serves only the process that started it, and says in one error why it can't start."""

import os
import resource
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from softlabel.flows.cli import run
from softlabel.flows.running import engine, server
from softlabel.pipeline.config.base import Settings
from softlabel.storage.errors import SoftlabelError
from tests.conftest import ROOT
from tests.flows.servers import answers, wait_until
from tests.listening import family, listening, only_here
from tests.pipeline.captured import make_table
from tests.pipeline.capturing.test_capture import texts, write

SCRIPT = """
import sys, time
from softlabel.flows.running import server

url = server.address()
try:
    print(url, server.PASSWORD, flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    print("still there", flush=True)
time.sleep(60)
"""


def test_the_server_serves_only_its_process_and_ends_with_it(prefect_database: Path, tmp_path: Path):
    database = Path(shutil.copy(prefect_database, tmp_path))
    database.chmod(0o644)  # as Prefect itself makes it
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        env=os.environ | {"PREFECT_HOME": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout
    url, password = process.stdout.readline().split()
    processes = family(process.pid)
    assert listening(processes)
    assert only_here(listening(processes))
    assert not [each for each in processes if password.encode() in Path(f"/proc/{each}/cmdline").read_bytes()]
    everyone = {"Origin": "https://elsewhere.example"}
    for headers in ({}, {"Authorization": "Basic c29mdGxhYmVsOmd1ZXNz"}):
        assert httpx.post(f"{url}/flow_runs/filter", headers=headers | everyone, json={}).status_code == 401
    owner = tuple(password.split(":"))
    answer = httpx.post(f"{url}/flow_runs/filter", auth=owner, headers=everyone, json={})  # type: ignore[arg-type]
    assert answer.is_success
    assert not [name for name in answer.headers if name.startswith("access-control")]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert database in files
    assert not [path for path in files if stat.S_IMODE(path.stat().st_mode) & 0o077]

    os.killpg(process.pid, signal.SIGINT)
    assert process.stdout.readline() == "still there\n"
    assert answers(url)
    process.kill()
    process.wait()
    wait_until(lambda: not answers(url), seconds=60)


@pytest.mark.long
def test_runs_of_long_ago_are_forgotten(tmp_path: Path):
    def start() -> "subprocess.Popen[str]":
        command, environment = [sys.executable, "-c", SCRIPT], os.environ | {"PREFECT_HOME": str(tmp_path)}
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    def recorded(statement: str) -> list[tuple[object, ...]]:
        with sqlite3.connect(tmp_path / "prefect.db", timeout=60) as database:
            return database.execute(statement).fetchall()

    first = start()
    try:
        url, password = first.stdout.readline().split()
        with httpx.Client(base_url=url, auth=tuple(password.split(":")), timeout=60) as client:
            flow = client.post("/flows/", json={"name": "capture"}).json()["id"]
            for name in ("old", "new"):
                ended = {"type": "COMPLETED", "name": "Completed"}
                made = client.post("/flow_runs/", json={"flow_id": flow, "name": name, "state": ended})
                assert made.status_code == 201
    finally:
        first.kill()
        first.wait()
    now = "strftime('%Y-%m-%d %H:%M:%f000', 'now')"
    recorded(f"UPDATE flow_run SET end_time = CASE name WHEN 'old' THEN '2020-01-01 00:00:00.000000' ELSE {now} END")
    second = start()
    try:
        wait_until(lambda: recorded("SELECT name FROM flow_run") == [("new",)], seconds=60)
    finally:
        second.kill()
        second.wait()


@pytest.mark.long
def test_eight_first_starts_at_once_all_succeed(tmp_path: Path):
    script = "from softlabel.flows.running import server; print(server.address())"
    environment = os.environ | {"PREFECT_HOME": str(tmp_path / "fresh")}
    starts = [
        subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(8)
    ]
    assert len({start.communicate(timeout=200)[0] for start in starts}) == 8
    assert not any(start.returncode for start in starts)


@pytest.fixture
def fresh() -> Iterator[None]:
    """No server of this process, before and after the test."""
    for each in (server.start, server.address):
        each.cache_clear()
    yield
    for each in (server.start, server.address):
        each.cache_clear()


def not_a_database(home: Path) -> None:
    (home / "prefect.db").write_text("no database " * 1000)


def damaged(home: Path) -> None:
    connection = sqlite3.connect(home / "prefect.db")
    connection.execute("create table flow (id, name)")
    connection.executemany("insert into flow values (?, ?)", [(i, "x" * 100) for i in range(1000)])
    connection.commit()
    connection.close()
    with (home / "prefect.db").open("r+b") as file:
        file.seek(1000)
        file.write(b"x" * 20_000)


def of_a_newer_prefect(home: Path) -> None:
    with sqlite3.connect(home / "prefect.db") as connection:
        connection.execute("create table alembic_version (version_num)")
        connection.execute("insert into alembic_version values ('from-the-future')")


def a_folder(home: Path) -> None:
    (home / "prefect.db").mkdir()


def below_a_file(home: Path) -> None:
    shutil.rmtree(home)
    home.parent.rmdir()
    home.parent.touch()


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(
    ("spoil", "found", "do"),
    [
        (not_a_database, "file is not a database", "move prefect.db in this folder away"),
        (below_a_file, "Not a directory", "set PREFECT_HOME to another one"),
        pytest.param(damaged, "malformed", "move prefect.db in this folder away", marks=pytest.mark.long),
        pytest.param(of_a_newer_prefect, "from-the-future", "set PREFECT_HOME", marks=pytest.mark.long),
        pytest.param(a_folder, "Is a directory", "set PREFECT_HOME to another one", marks=pytest.mark.long),
    ],
)
def test_a_server_that_can_not_start_gives_one_clear_error(spoil, found, do, tmp_path, monkeypatch, capfd):
    home = tmp_path / "parent" / "home"
    home.mkdir(parents=True)
    spoil(home)
    monkeypatch.setenv("PREFECT_HOME", str(home))
    with pytest.raises(SoftlabelError) as error:
        server.address()
    assert_clear(str(error.value), found, do, str(home))
    assert capfd.readouterr() == ("", "")


def assert_clear(text: str, *parts: str) -> None:
    assert "Traceback" not in text
    assert "sqlalche" not in text
    assert len(text.splitlines()) < 10
    for part in ("did not start", *parts):
        assert part in text


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("room", [pytest.param(room, marks=pytest.mark.long) for room in (10_000, 1_000_000)])
def test_a_full_disk_gives_one_clear_error(room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    resource.prlimit(server.start().process.pid, resource.RLIMIT_FSIZE, (room, room))
    with pytest.raises(SoftlabelError) as error:
        server.address()
    assert_clear(str(error.value), "File too large", "make room in this folder", str(tmp_path))
    assert not (tmp_path / "prefect.db").exists()


@pytest.mark.usefixtures("fresh")
def test_a_server_that_dies_while_it_starts_gives_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    server.start().process.kill()
    with pytest.raises(SoftlabelError) as error:
        server.address()
    assert_clear(str(error.value), "SIGKILL", str(tmp_path))


@pytest.mark.parametrize("verb", ["verify", "capture"])
def test_a_user_without_a_home_folder_gets_one_clear_error(verb: str, monkeypatch: pytest.MonkeyPatch, capsys):
    for name in ("HOME", "PREFECT_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54321)  # as in a container, where the user may have no name
    more = ["table", "--teacher.model", "teacher"] if verb == "capture" else []
    assert run([verb, "path", *more]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("softlabel: there is no folder for Prefect")
    assert "set PREFECT_HOME, or HOME" in shown


def test_a_configured_server_that_can_not_be_reached_gives_one_clear_error(tiny_teacher, tmp_path, capsys):
    table = make_table(tmp_path / "table", tiny_teacher, 2, 0)
    capsys.readouterr()
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        assert run(["verify", table.location]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("softlabel: the configured Prefect server can't be reached")
    assert "http://127.0.0.1:9/api" in shown
    assert len(shown.splitlines()) < 8


def test_a_server_that_fails_during_a_run_gives_one_clear_error():
    def flow(_: object) -> None:
        raise httpx.ReadError("the connection was closed\nand more")

    with pytest.raises(SoftlabelError, match="failed while it recorded this run") as error:
        engine.run(flow, Settings())
    assert "ReadError: the connection was closed" in str(error.value)
    assert "and more" not in str(error.value)


@pytest.mark.parametrize(
    ("closed", "proxies"),
    [
        ("<&- >&- 2>&-", {"HTTP_PROXY": "http://127.0.0.1:9", "all_proxy": "socks5://127.0.0.1:9"}),
        *(
            pytest.param(closed, {}, marks=pytest.mark.long)
            for closed in ("<&-", ">&-", "2>&-", "<&- >&-", "<&- 2>&-", ">&- 2>&-")
        ),
        *(
            pytest.param("", {name: f"{scheme}://127.0.0.1:9"}, marks=pytest.mark.long)
            for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY", "all_proxy")
            for scheme in ("http", "socks5")
        ),
    ],
)
def test_neither_closed_descriptors_nor_proxies_matter(closed, proxies, prefect_home, tiny_teacher, tmp_path):
    table = make_table(tmp_path / "table", tiny_teacher, 2, 0)
    done = softlabel("verify", table.location, after=closed, PREFECT_HOME=str(prefect_home), **proxies)
    assert done.returncode == 0, done.stderr
    assert "is intact" in done.stdout or ">&-" in closed
    connection = sqlite3.connect(prefect_home / "prefect.db")
    name = f"verify {table.location}"
    ((state,),) = connection.execute("select state_type from flow_run where name = ?", (name,)).fetchall()
    assert state == "COMPLETED"


@pytest.mark.long
def test_workers_and_ranks_need_no_standard_descriptors(prefect_home: Path, tiny_teacher: Path, tmp_path: Path):
    documents, table, student = write(tmp_path / "d.parquet", texts(200)), tmp_path / "table", tmp_path / "student"
    teacher = ("--teacher.model", tiny_teacher, "--teacher.device", "cpu", "--teacher.workers", 2)
    home, closed = {"PREFECT_HOME": str(prefect_home)}, "<&- >&- 2>&-"
    done = softlabel("capture", documents, table, *teacher, "--shards.positions", 1000, after=closed, **home)
    assert done.returncode == 0
    size = ("--student.layers", 1, "--optimizer.device", "cpu", "--optimizer.processes", 2, "--optimizer.max-steps", 2)
    assert softlabel("train", table, student, *size, after=closed, **home).returncode == 0
    assert (student / "model.safetensors").is_file()


def softlabel(
    *arguments: object, before: str = "", after: str = "", **environment: str
) -> "subprocess.CompletedProcess[str]":
    """Run the command in a fresh process, from a shell that does something before, and redirects after."""
    command = " ".join(f"'{argument}'" for argument in (sys.executable, "-m", "softlabel.flows.cli", *arguments))
    return subprocess.run(
        ["sh", "-c", f"{before} exec {command} {after}"],
        env=os.environ | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
