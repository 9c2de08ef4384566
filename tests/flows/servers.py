"""Servers that tests start as processes, and waiting for them."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from prefect.settings import PREFECT_API_URL, temporary_settings

from tests.conftest import ROOT

SERVICES = (
    *("SCHEDULER", "LATE_RUNS", "PAUSE_EXPIRATIONS", "FOREMAN", "REPOSSESSOR"),
    *("CANCELLATION_CLEANUP", "CLEANUP_RECONCILER", "DB_VACUUM"),
)
"""Background services of Prefect's server."""
POSTGRES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
"""Folders with PostgreSQL's programs, if it is installed."""


def wait_until(holds: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {seconds:g} seconds"
        time.sleep(0.1)


def answers(url: str) -> bool:
    """Whether a Prefect server answers at this API address."""
    try:
        return httpx.get(f"{url}/health").is_success
    except httpx.HTTPError:
        return False


@contextmanager
def prefect_server(home: Path, **environment: str) -> Iterator[Path]:
    """Run a server whose services look for work every second; yields its log file, and sets its URL in this process."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    quick = {f"PREFECT_SERVER_SERVICES_{service}_LOOP_SECONDS": "1" for service in SERVICES}
    log = home / "server.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "prefect", "server", "start", "--port", str(port)],
            env=os.environ | quick | {"PREFECT_HOME": str(home), "PREFECT_SERVER_UI_ENABLED": "false"} | environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
        )
    url = f"http://127.0.0.1:{port}/api"
    try:
        wait_until(lambda: answers(url), seconds=60)
        with temporary_settings({PREFECT_API_URL: url}):
            yield log
    finally:
        process.terminate()
        process.wait(20)


@contextmanager
def postgresql() -> Iterator[str]:
    """Run a PostgreSQL server for one test; yields its URL."""
    programs, root = POSTGRES[-1], os.geteuid() == 0
    owner = {"user": "nobody", "group": "nogroup", "extra_groups": []} if root else {}  # it refuses to run as root
    folder = Path(tempfile.mkdtemp())  # a short path, as sockets need, which its owner may enter
    if root:
        shutil.chown(folder, "nobody", "nogroup")

    def run(program: str, *arguments: str) -> None:
        command = [str(programs / program), "-D", str(folder / "data"), *arguments]
        subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL, **owner)

    try:
        run("initdb", "--auth=trust", "--username=softlabel")
        run("pg_ctl", "start", "--wait", "-l", str(folder / "log"), "-o", f"-k {folder} -c listen_addresses=''")
        yield f"postgresql+asyncpg://softlabel@/postgres?host={folder}"
    finally:
        run("pg_ctl", "stop", "--mode=immediate")
        shutil.rmtree(folder)
