"""Prefect's embedded server for runs that have none configured: it ends when the process that started it does.

Prefect would start one by itself. That one dies of the Ctrl-C that was meant for the run, which then waits two minutes
for an answer; and it outlives a run that is killed. Run as a module, this file is the server's own process.
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

# The first start makes the server's database; on a busy machine that takes far longer than the usual few seconds.
_SECONDS_TO_START = 120.0


@cache
def start() -> str:
    """Start this process's server, or find it started, and return its API's address before it answers there."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        file, port = listening.fileno(), listening.getsockname()[1]
        # Away from the working folder: alembic puts the folder that it is run in first on the path, and Prefect takes
        # settings, which can name code to be run, from files there.
        server = processes.start(
            "softlabel.flows.server", str(file), stdout=sys.stderr.fileno(), pass_fds=[file], cwd=processes.NEUTRAL
        )
    _started.append(server)
    return f"http://127.0.0.1:{port}/api"


def wait(url: str) -> None:
    """Wait for the server's first answer.

    Raises:
        SoftlabelError: if there is none.
    """
    try:
        httpx.get(f"{url}/health", timeout=_SECONDS_TO_START).raise_for_status()
    except httpx.HTTPError as error:
        raise SoftlabelError(
            "Prefect's embedded server did not start",
            found=f"{type(error).__name__}: {error}",
            where=os.environ.get("PREFECT_HOME", Path.home() / ".prefect"),
            do="check that this folder can be written to, or set PREFECT_API_URL to a server of yours",
        ) from error


_started: list[subprocess.Popen[bytes]] = []
"""Keeps the pipe open for as long as this process lives."""


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
