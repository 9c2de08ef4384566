"""Runs one flow for the command line, in this process, on the Prefect server that is configured or on the embedded one.

Keeps Prefect's own words off the terminal; its server gets them all the same. Prefect is configured by its profile and
the environment alone: it would take settings, which can name code to be run, from files in the working folder, too.
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

# Read by huggingface_hub, and so by transformers: their bars would break ours, and litter a log.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def run(name: str, config: Settings) -> Any:
    """Run the flow of that name and return what it returns.

    Raises:
        SoftlabelError: what the flow raised.
    """
    embedded = None if get_current_settings().api.url else server.start()
    with ExitStack() as around:
        with chdir(NEUTRAL):
            # Importing the flow takes seconds, and so does the server's start: they go on side by side.
            flow = getattr(import_module(f"softlabel.flows.{name}"), f"{name}_flow")
            if embedded:
                server.wait(embedded)
                around.enter_context(temporary_settings({PREFECT_API_URL: embedded}))
        around.enter_context(_quiet())
        return flow(config)


@contextmanager
def _quiet() -> Iterator[None]:
    """Prefect's records go to its server alone, and ours to stderr as plain lines."""
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
