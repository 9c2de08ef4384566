"""Servers that tests start as processes, and waiting for them."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
from prefect.settings import PREFECT_API_URL, get_current_settings, temporary_settings

from tests.buckets import reserved_ports
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
def answering(status: int, port: int = 0) -> Iterator[int]:
    """A server, or the proxy before one, that answers everything with one status."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = HTTPServer(("127.0.0.1", port), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def closed() -> Iterator[int]:
    """A port that nothing listens on."""
    with reserved_ports(1) as [port]:
        yield port


class Link:
    """A way to a server on this machine, which can be cut: its connections end, and no others begin until it is whole.

    Attributes:
        url: address of the server's API by this way.
    """

    def __init__(self, url: str) -> None:
        self._server = httpx.URL(url)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = str(self._server.copy_with(port=self._listening.getsockname()[1]))
        self._ends: list[socket.socket] = []
        self.is_whole = True
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        self.is_whole = False
        for end in self._ends:
            with suppress(OSError):  # it has ended already
                end.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        self.is_whole = True

    def _accept(self) -> None:
        while True:
            near, _ = self._listening.accept()
            if not self.is_whole:
                near.close()
                continue
            far = socket.create_connection((self._server.host, self._server.port or 80))
            self._ends += near, far
            for ends in ((near, far), (far, near)):
                threading.Thread(target=_pass_on, args=ends, daemon=True).start()


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_RDWR)


class PrefectServer:
    """A server whose services look for work every second; it can be killed, and started again at the same address."""

    def __init__(self, home: Path, port: int, **environment: str) -> None:
        self._port = port
        self.url = f"http://127.0.0.1:{self._port}/api"
        self.log = home / "server.log"
        quick = {f"PREFECT_SERVER_SERVICES_{service}_LOOP_SECONDS": "1" for service in SERVICES}
        ui = {"PREFECT_SERVER_UI_ENABLED": "false", "PREFECT_SERVER_UI_API_URL": self.url}
        self._environment = quick | {"PREFECT_HOME": str(home)} | ui | environment

    def start(self) -> None:
        with self.log.open("a") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "prefect", "server", "start", "--port", str(self._port)],
                env=os.environ | self._environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
            )
        wait_until(lambda: answers(self.url), seconds=120)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def prefect_server(home: Path, **environment: str) -> Iterator[PrefectServer]:
    """Run a server, and set its URL in this process."""
    with reserved_ports(1) as [port]:
        server = PrefectServer(home, port, **environment)
        try:
            server.start()
            with temporary_settings({PREFECT_API_URL: server.url}):
                yield server
        finally:
            server.process.terminate()
            server.process.wait(120)  # after an outage, it has much to catch up with


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


def of_server() -> dict[str, str]:
    """The environment of a process that uses the server of this one."""
    return os.environ | {"PREFECT_API_URL": str(get_current_settings().api.url), "OMP_NUM_THREADS": "1"}


@contextmanager
def worker(*flags: str, log: Path | None = None, **environment: str) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a worker of the deployed work pool, which looks for runs every second."""
    with (log or Path(os.devnull)).open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "prefect", "worker", "start", "--pool", "softlabel", *flags],
            env=of_server() | {"PREFECT_WORKER_QUERY_SECONDS": "1"} | environment,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        yield process
    finally:
        process.terminate()
        process.wait()
