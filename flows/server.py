"""Prefect's server for runs that have none configured; it ends when the process that started it ends.

Prefect can start such a server too. But a Ctrl-C that is meant for the run stops that server as well, after which the
run waits two minutes for an answer; and that server outlives a run that is killed. Run as a module, this file is the
server process.
"""

import os
import socket
import subprocess
import sys
import threading
from functools import cache
from pathlib import Path

import httpx

from softlabel.pipeline import processes
from softlabel.storage.errors import SoftlabelError

# The first start creates the server's database. On a busy machine, that takes far longer than the usual few seconds.
_SECONDS_TO_START = 120.0


@cache
def start() -> str:
    """Start the server once per process, and return the address of its API without waiting for an answer."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        file, port = listening.fileno(), listening.getsockname()[1]
        # Not in the working folder: alembic puts the current folder first on the import path, and Prefect reads
        # settings from files there, which can name code to run.
        server = processes.start(
            "softlabel.flows.server", str(file), stdout=sys.stderr.fileno(), pass_fds=[file], cwd=processes.NEUTRAL
        )
    _started.append(server)
    return f"http://127.0.0.1:{port}/api"


def wait(url: str) -> None:
    """Wait until the server answers.

    Raises:
        SoftlabelError: if it does not answer in time.
    """
    try:
        httpx.get(f"{url}/health", timeout=_SECONDS_TO_START).raise_for_status()
    except httpx.HTTPError as error:
        raise SoftlabelError(
            "Prefect's built-in server did not start",
            found=f"{type(error).__name__}: {error}",
            where=os.environ.get("PREFECT_HOME", Path.home() / ".prefect"),
            do="make sure that this folder is writable, or set PREFECT_API_URL to a running Prefect server",
        ) from error


_started: list[subprocess.Popen[bytes]] = []
"""Holds the server's stdin open: the server stops when this process ends and the pipe closes."""


def _serve(file: int) -> None:
    import uvicorn
    from prefect.server.api.server import create_app

    app = create_app(ephemeral=True, final=True)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on"))

    def end_with_parent() -> None:
        sys.stdin.read()
        server.should_exit = True

    threading.Thread(target=end_with_parent, daemon=True).start()
    server.run(sockets=[socket.socket(fileno=file)])


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
