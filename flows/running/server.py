"""Prefect's server for runs that have none configured: one for each process that needs it, and only for that process.

Prefect can start such a server too. But a Ctrl-C that is meant for the run stops that server as well, after which the
run waits two minutes for an answer; that server outlives a run that is killed; and it takes orders from every user of
the machine. Ours has a random password, which only the process that starts it knows, and ends with that process. Run as
a module, this file is the server process. Its database is in Prefect's folder, where only its owner can read it.
"""

import asyncio
import atexit
import os
import secrets
import socket
import sqlite3
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import AsyncExitStack, ExitStack, chdir
from functools import cache
from pathlib import Path
from threading import Thread
from typing import Any

from filelock import FileLock

from softlabel.pipeline import processes
from softlabel.pipeline.exclusive import scratch
from softlabel.pipeline.processes import Child, ChildDiedError
from softlabel.storage.errors import SoftlabelError

PASSWORD = f"softlabel:{secrets.token_urlsafe(32)}"
"""User and password of this process's server."""

_CONFIGURING = {"PREFECT_API_URL", "PREFECT_PROFILE", "PREFECT_PROFILES_PATH"}
"""Environment variables without which only a file of profiles in Prefect's folder can name a server."""
_LOCK = "softlabel-server.lock"
_SECONDS_TO_START = 120.0
"""Time to wait for other servers that are starting. The first start creates the database."""
_SECONDS_TO_END = 10.0
_ROOM = 8 << 20
"""Bytes that a run's history may take."""
_until_exit = ExitStack()
atexit.register(_until_exit.close)


def home() -> Path:
    """Prefect's folder.

    Raises:
        SoftlabelError: if the environment names none, and this user has no home folder.
    """
    try:
        return Path(os.environ.get("PREFECT_HOME") or "~/.prefect").expanduser().absolute()
    except RuntimeError:
        raise SoftlabelError(
            "there is no folder for Prefect, which records each run",
            expected="a home folder, or PREFECT_HOME",
            found=f"HOME is not set, and user {os.getuid()} has no home folder on this machine",
            do="set PREFECT_HOME, or HOME, to a folder that this user can write to",
        ) from None


def is_configured() -> bool:
    """Whether a Prefect server is configured. Prefect, which takes a second to import, is asked only if that may be."""
    named = any(name.upper() in _CONFIGURING for name in os.environ) or (home() / "profiles.toml").exists()
    if not named and "prefect" not in sys.modules:
        return False
    with chdir(processes.NEUTRAL):
        from prefect.settings import get_current_settings
    return bool(get_current_settings().api.url)


@cache
def start() -> Child:
    """Start the server, once per process, without waiting for it."""
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    private = {"AUTH_STRING": PASSWORD, "CORS_ALLOWED_ORIGINS": "", "BASE_PATH": "/api"}
    environment |= {f"PREFECT_SERVER_API_{name}": value for name, value in private.items()}
    log = _until_exit.enter_context(scratch()) / "server.log"
    # Not in the working folder: alembic puts the current folder first on the import path, and Prefect reads settings
    # from files there, which can name code to run.
    return Child("softlabel.flows.running.server", log=log, environment=environment, cwd=processes.NEUTRAL)


@cache
def address() -> str:
    """Wait until the server is ready, and return the address of its API.

    Raises:
        SoftlabelError: if it can't start; it says why.
    """
    server = start()
    try:
        for _, _, port in processes.messages([server]):
            return f"http://127.0.0.1:{port}/api"
    except ChildDiedError:
        pass
    raise _not_started(server.death())


def _not_started(found: object) -> SoftlabelError:
    damaged = isinstance(found, sqlite3.DatabaseError) and not isinstance(found, sqlite3.OperationalError)
    repair = "move prefect.db in this folder away (it has the history of earlier runs, no soft labels)"
    room = "make room in this folder and make it writable, or set PREFECT_HOME to another one"
    return SoftlabelError(
        "Prefect's built-in server, which records this run, did not start",
        expected=f"a folder that this user can write to, with {_ROOM >> 20} MB of free space, for Prefect's database",
        found=found,
        where=home(),
        do=f"{repair if damaged else room}; or set PREFECT_API_URL to a running Prefect server",
    )


def main() -> None:
    """Be the server, until the process that started this one ends."""
    os.umask(0o077)
    send = processes.message_sender()
    running: list[Any] = []
    Thread(target=_end_with_parent, args=(running,), daemon=True).start()
    try:
        asyncio.run(_serve(running, send))
    except Exception as error:
        traceback.print_exc()
        # SQLAlchemy wraps the database's own error, and adds the whole statement.
        send("error", processes.serialized(_not_started(getattr(error, "orig", None) or error)))


def _end_with_parent(running: list[Any]) -> None:
    sys.stdin.read()
    for server in running:
        server.should_exit = True
        time.sleep(_SECONDS_TO_END)
    os._exit(1)


async def _serve(running: list[Any], send: Callable[[str, Any], None]) -> None:
    home().mkdir(parents=True, exist_ok=True)
    import uvicorn
    from prefect.server.api.server import create_app

    async with AsyncExitStack() as stack:
        # Of several first starts at once, one creates the database.
        with FileLock(home() / _LOCK, timeout=_SECONDS_TO_START):
            _prepare_database()
            app = create_app(ephemeral=True, final=True)
            await stack.enter_async_context(app.router.lifespan_context(app))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        running.append(server)
        listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        send("ready", listening.getsockname()[1])
        forgetting = asyncio.create_task(_forget_old_runs())
        await server.serve([listening])
        forgetting.cancel()


async def _forget_old_runs() -> None:
    """Delete runs that ended 90 days ago, with their logs; Prefect does so only in servers that stay for long."""
    from prefect.server.database import provide_database_interface
    from prefect.server.services.db_vacuum import vacuum_old_flow_runs

    try:
        await vacuum_old_flow_runs(db=provide_database_interface())
    except Exception:  # of a busy database: the next server tries again
        traceback.print_exc()


def _prepare_database() -> None:
    """Make sure that there is room for the database, and that only its owner can read it.

    Raises:
        OSError: if there is too little room, or the files can't be written or are another user's.
    """
    from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL
    from sqlalchemy.engine import make_url

    url = make_url(PREFECT_API_DATABASE_CONNECTION_URL.value())
    if url.get_backend_name() != "sqlite" or not url.database or ":memory:" in url.database:
        return
    database = Path(url.database)
    with tempfile.TemporaryFile(dir=database.parent) as file:
        file.write(bytes(_ROOM))
    database.touch()
    for path in database.parent.glob(f"{database.name}*"):
        path.chmod(0o600)
    with database.open("r+b"):
        pass


if __name__ == "__main__":
    main()
