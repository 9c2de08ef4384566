"""Progress as a Prefect artifact, sent by a thread of its own: a server that does not answer never stalls the work."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import copy_context
from threading import Condition, Thread
from typing import Any

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from softlabel.flows.running.progress import Show, watching
from softlabel.pipeline.progress import Progress, Watch

_SECONDS_FOR_THE_LAST = 5.0
"""Time for sending the last progress at the end, before the work is reported as done."""

logger = logging.getLogger("softlabel")


@contextmanager
def publishing_progress(key: str) -> Iterator[Watch]:
    """Report progress while the block runs, as ``watching`` does, and in an artifact of the flow run with this key."""
    with progress_artifact(key) as show, watching(show) as watch:
        yield watch


@contextmanager
def progress_artifact(key: str) -> Iterator[Show]:
    """Shows progress in an artifact of the current flow run with this key."""
    newest = _Newest()
    context = copy_context()  # has the flow run and the settings of its server
    thread = Thread(target=context.run, args=(_send, key, newest), name=f"{key} artifact", daemon=True)
    thread.start()

    def show(progress: Progress, text: str, parts: Mapping[str, str]) -> None:
        total = progress.total
        # Nothing to do counts as done.
        share = 0.0 if total is None else 100.0 * progress.done / total if total else 100.0
        lines = [f"{progress.stage}: {text}", *(f"{name}: {part}" for name, part in parts.items())]
        newest.put({"progress": share, "description": "  \n".join(lines)})

    try:
        yield show
    finally:
        newest.put(None)
        thread.join(_SECONDS_FOR_THE_LAST)


class _Newest:
    """Hands values from one thread to another, which gets only the newest; None is the last, and comes last."""

    def __init__(self) -> None:
        self._values: list[dict[str, Any] | None] = []
        self._changed = Condition()

    def put(self, value: dict[str, Any] | None) -> None:
        with self._changed:
            if value is not None:
                self._values.clear()
            self._values.append(value)
            self._changed.notify()

    def get(self) -> dict[str, Any] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._values)
            return self._values.pop(0)


def _send(key: str, newest: _Newest) -> None:
    artifact: Any = None
    failed = False
    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):  # newer progress comes soon
        while (value := newest.get()) is not None:
            try:
                if artifact is None:
                    artifact = create_progress_artifact(key=key, **value)
                else:
                    update_progress_artifact(artifact, **value)
                failed = False
            except Exception as error:
                if not failed:  # once for each time that it can't be reached
                    logger.warning("the work goes on, but the Prefect server does not accept its progress: %s", error)
                failed = True
