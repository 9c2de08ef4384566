"""Runs one flow for the command line, in this process, with the configured Prefect server or a temporary one.

Prefect's own log lines go to its server, not to the terminal. Prefect takes its settings only from its profile and the
environment: by default it would also read files in the working folder, which can name code to run.
"""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, chdir, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from softlabel.pipeline.config.base import Settings
from softlabel.pipeline.processes import NEUTRAL

if home := os.environ.get("PREFECT_HOME"):
    os.environ["PREFECT_HOME"] = str(Path(home).expanduser().absolute())
with chdir(NEUTRAL):
    from prefect.settings import PREFECT_API_URL, get_current_settings, temporary_settings

    from softlabel.flows import server

# Progress bars of huggingface_hub and transformers would break ours and clutter a log.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def run(name: str, config: Settings) -> Any:
    """Run the flow of that name and return its result.

    Raises:
        SoftlabelError: if the flow fails with one.
    """
    embedded = None if get_current_settings().api.url else server.start()
    with ExitStack() as stack:
        with chdir(NEUTRAL):
            # Importing the flow takes seconds, and so does starting the server: both go on at the same time.
            flow = getattr(import_module(f"softlabel.flows.{name}"), f"{name}_flow")
            if embedded:
                server.wait(embedded)
                stack.enter_context(temporary_settings({PREFECT_API_URL: embedded}))
        stack.enter_context(_quiet())
        return flow(config)


@contextmanager
def _quiet() -> Iterator[None]:
    """Send Prefect's log records only to its server, and ours to stderr as plain lines."""
    terminal, ours = logging.getLogger().handlers, logging.getLogger("softlabel")
    lines = logging.StreamHandler(sys.stderr)
    for handler in terminal:
        handler.addFilter(_not_prefects)
    ours.addHandler(lines)
    ours.propagate = False
    try:
        yield
    finally:
        ours.propagate = True
        ours.removeHandler(lines)
        for handler in terminal:
            handler.removeFilter(_not_prefects)


def _not_prefects(record: logging.LogRecord) -> bool:
    return not record.name.startswith("prefect")
