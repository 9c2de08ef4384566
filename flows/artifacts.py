"""Progress as a Prefect artifact."""

import logging
from collections.abc import Mapping
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact

from softlabel.flows.progress import Show
from softlabel.pipeline.progress import Progress

logger = logging.getLogger("softlabel")


def progress_artifact(key: str) -> Show:
    """Shows progress in an artifact of the current flow run with this key."""
    artifact = create_progress_artifact(0.0, key=key)
    assert isinstance(artifact, UUID)  # not a coroutine: our flows are synchronous

    reachable = True

    def show(progress: Progress, text: str, parts: Mapping[str, str]) -> None:
        nonlocal reachable
        total = progress.total
        share = (
            0.0 if total is None else 100.0 * progress.done / total if total else 100.0
        )  # nothing to do counts as done
        try:
            if reachable:
                lines = [f"{progress.stage}: {text}", *(f"{name}: {part}" for name, part in parts.items())]
                update_progress_artifact(artifact, share, description="  \n".join(lines))
        except Exception as error:  # an unreachable server must not end hours of work
            reachable = False
            logger.warning("Prefect's progress artifact can't be updated, and will not be tried again: %s", error)

    return show
