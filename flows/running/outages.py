"""An outage of the Prefect server costs a deployed run neither its work nor the report of its end.

The work itself never asks the server anything. But at the end of a run, Prefect's client gives up after about a minute:
the run would stay Running on the server, until missing heartbeats start it again. So we wait for the server first.
And a run that has a slot of a concurrency limit would be ended when the server does not extend its lease of the slot
within seconds. Ours goes on, with a warning in its log; until it ends, there may be one run more than the limit.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any
from uuid import UUID

import httpx
from prefect import flow_engine
from prefect.client.orchestration import get_client
from prefect.concurrency._leases import maintain_concurrency_lease
from prefect.context import FlowRunContext
from prefect.settings import PREFECT_API_REQUEST_TIMEOUT, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from softlabel.flows.running.runs import is_deployed
from softlabel.pipeline.models.files import first_line

HOURS = 12.0
"""Longest time to wait for the server. Nothing else could use the worker meanwhile: it gets its runs from there."""
SECONDS_BETWEEN_TRIES = 10.0
_SECONDS_FOR_AN_ANSWER = 10.0

logger = logging.getLogger("softlabel")


def _extending_lease(lease: UUID, seconds: float, **_: Any) -> AbstractContextManager[None]:
    return maintain_concurrency_lease(lease, seconds)


flow_engine.maintain_concurrency_lease = _extending_lease  # type: ignore[attr-defined, assignment]


@contextmanager
def reported() -> Iterator[None]:
    """At the end of the block, also if it fails, wait until the server can record how a deployed run ended."""
    try:
        yield
    except Exception:
        await_server()
        raise
    await_server()


def await_server() -> None:
    """Wait until the server answers; only in a run of a deployment, since a person can decide what to wait for."""
    context = FlowRunContext.get()
    if not (context and context.flow_run and is_deployed()):
        return
    began = time.monotonic()
    answered = True
    while problem := _outage(context.flow_run.id):
        waited = time.monotonic() - began
        if waited > HOURS * 3600:
            logger.error("the Prefect server has not answered for %g hours; this run ends unreported", HOURS)
            return
        if answered:
            logger.warning(
                "the work of this run has ended and is kept, but the Prefect server does not answer (%s);"
                " waiting for it for up to %g hours, to report the end of the run",
                problem,
                HOURS,
            )
        answered = False
        time.sleep(SECONDS_BETWEEN_TRIES)
    if not answered:
        logger.info("the Prefect server answers again, after %s", timedelta(seconds=round(time.monotonic() - began)))


def publish(create: Callable[..., Any], *content: Any, **settings: Any) -> None:
    """Create an artifact. A server that does not take it does not make the run fail, whose work is done.

    Args:
        create: one of Prefect's functions ``create_*_artifact``.
        content: its arguments.
        settings: its keyword arguments.
    """
    await_server()
    try:
        create(*content, **settings)
    except httpx.HTTPError as error:
        logger.warning("the Prefect server did not accept the artifact %r: %s", settings["key"], _describe(error))


def _outage(run: UUID) -> str | None:
    """Why the server can't be used at the moment; None if it answers, whatever it says."""
    once = {PREFECT_CLIENT_MAX_RETRIES: 0, PREFECT_API_REQUEST_TIMEOUT: _SECONDS_FOR_AN_ANSWER}
    try:
        with temporary_settings(once), get_client(sync_client=True) as client:
            client.read_flow_run(run)
    except httpx.HTTPStatusError as error:
        return _describe(error) if error.response.is_server_error else None
    except httpx.HTTPError as error:
        return _describe(error)
    except Exception:  # such as a run that someone has deleted: the server answers
        return None
    return None


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}" if str(error) else type(error).__name__
