"""The Prefect run of a flow: everything that the flow writes records its id, and its warnings are in the run's log."""

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefect.context import FlowRunContext, _deployment_id

from softlabel.storage.credentials import masked
from softlabel.storage.errors import UsageError, printable
from softlabel.storage.identity import working_for

logger = logging.getLogger("softlabel")


@contextmanager
def recorded(**written: str | None) -> Iterator[None]:
    """Record the current flow run in the commits, records and students that the block writes, and log its warnings.

    Args:
        written: where the block writes to, by the name of the setting.

    Raises:
        UsageError: if a run of a deployment would write to a relative path.
    """
    if is_deployed():
        _require_full(written)
    context = FlowRunContext.get()
    if context is None or context.flow_run is None or context.flow is None:
        yield
        return
    with working_for(str(context.flow_run.id), context.flow.name), _warnings_as_log_lines():
        yield


def is_deployed() -> bool:
    """Whether the current flow run, or the one that it is a part of, is a run of a deployment, by a worker."""
    return bool(_deployment_id.get())


def _require_full(written: Mapping[str, str | None]) -> None:
    for name, location in written.items():
        if location is not None and "://" not in location and not Path(location).is_absolute():
            raise UsageError(
                "a run of a deployment can't write to a relative path: its working folder is deleted at its end",
                expected=f"{name}: a full path, or s3://BUCKET/PREFIX",
                found=f"{name}: {location}",
                where=Path.cwd(),
            )


@contextmanager
def _warnings_as_log_lines() -> Iterator[None]:
    usual = warnings.showwarning
    warnings.showwarning = _log
    try:
        yield
    finally:
        warnings.showwarning = usual


def _log(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    text = f"{message}" if category is UserWarning else f"{category.__name__}: {message}"
    logger.warning("%s", masked(printable(text, kept="\n\t")))
