"""Tries a deployed run again when it fails for a reason that may pass.

A store that did not answer, or a worker process that was killed, may be back soon; wrong settings will not. Prefect
itself knows only one number of retries for all errors. Runs of the command line are never tried again by themselves.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext

from softlabel.storage.errors import AccessError, WorkerError

SECONDS_BEFORE_RETRY = (60, 600)
"""Time before the first and the second retry; there is no third."""

logger = logging.getLogger("softlabel")


@contextmanager
def retrying() -> Iterator[None]:
    """Have Prefect try the current flow run again, if it has a deployment and the block fails for a passing reason."""
    try:
        yield
    except (AccessError, WorkerError):
        context = FlowRunContext.get()
        if context and context.flow_run and context.flow_run.deployment_id:
            _allow_retry(context.flow_run.id)
        raise


def _allow_retry(run: UUID) -> None:
    try:
        with get_client(sync_client=True) as client:
            before = client.read_flow_run(run)
            if before.run_count > len(SECONDS_BEFORE_RETRY):
                return
            seconds = SECONDS_BEFORE_RETRY[before.run_count - 1]
            retry = {"retries": len(SECONDS_BEFORE_RETRY), "retry_delay": seconds}
            client.update_flow_run(run, empirical_policy=before.empirical_policy.model_copy(update=retry))
            logger.info("this run will start again in %d seconds", seconds)
    except Exception as error:  # the run's own error is what people need to see
        logger.warning("this run will not start again, because the Prefect server did not accept a retry: %s", error)
