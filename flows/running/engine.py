"""Runs a flow with Prefect. Prefect's own log lines go to its server, not to the terminal.

Prefect takes its settings only from its profile and the environment. By default it would also read files in the working
folder, which can name code to run; so this module is imported, and flows are, in a folder that has none.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partialmethod
from typing import Any

import httpx
from prefect.client.base import PrefectHttpxAsyncClient, PrefectHttpxSyncClient
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from softlabel.flows.running import server
from softlabel.pipeline.config.base import Settings
from softlabel.pipeline.models.files import first_line
from softlabel.storage.errors import SoftlabelError


@contextmanager
def connected(url: str) -> Iterator[None]:
    """Use this process's own server, directly."""
    _ignore_proxies()
    with temporary_settings({PREFECT_API_URL: url, PREFECT_API_AUTH_STRING: server.PASSWORD}):
        yield


def run(flow: Any, config: Settings) -> Any:
    """Run a flow and return its result.

    Raises:
        SoftlabelError: if the flow fails with one, or the server can't be reached.
    """
    terminal = logging.getLogger().handlers
    for handler in terminal:
        handler.addFilter(_is_not_prefects)
    try:
        return flow(config)
    except httpx.HTTPError as error:
        raise SoftlabelError(
            "the Prefect server failed while it recorded this run",
            expected="a server that answers until the run has ended",
            found=f"{type(error).__name__}: {first_line(error)}",
            do="run the same command again: finished work is kept, and is not repeated",
        ) from error
    except RuntimeError as error:
        if not str(error).startswith("Failed to reach API"):
            raise
        raise SoftlabelError(
            "the configured Prefect server can't be reached",
            expected="a running server, whose address is PREFECT_API_URL in the environment or in Prefect's profile",
            found=f"{error}: {error.__cause__}" if error.__cause__ else error,
            do="start that server or correct the address; without a configured server, softlabel starts its own",
        ) from None
    finally:
        for handler in terminal:
            handler.removeFilter(_is_not_prefects)


def _is_not_prefects(record: logging.LogRecord) -> bool:
    return not record.name.startswith("prefect")


@cache
def _ignore_proxies() -> None:
    """Let Prefect's clients in this process connect to the server on this machine without a proxy."""
    excepted = ",".join(filter(None, [os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), "127.0.0.1"]))
    os.environ |= {"no_proxy": excepted, "NO_PROXY": excepted}
    # httpx sets proxies up, and may fail to, even if it does not use them then.
    for client in (PrefectHttpxAsyncClient, PrefectHttpxSyncClient):
        client.__init__ = partialmethod(client.__init__, trust_env=False)  # type: ignore[method-assign, assignment]
