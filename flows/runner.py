"""Runs one flow for the command line, in this process, on the Prefect server that is configured or on the embedded one.

Keeps Prefect's own words off the terminal; its server gets them all the same.
"""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from typing import Any

from prefect.settings import PREFECT_API_URL, get_current_settings, temporary_settings

from flows import server
from pipeline.settings import Settings

# Read by huggingface_hub, and so by transformers: their bars would break ours, and litter a log.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def run(name: str, config: Settings) -> Any:
    """Run the flow of that name and return what it returns.

    Raises:
        SoftlabelError: what the flow raised.
    """
    embedded = None if get_current_settings().api.url else server.start()
    flow = getattr(import_module(f"flows.{name}"), f"{name}_flow")  # takes seconds, and so does the server's start
    if embedded:
        server.wait(embedded)
    with temporary_settings({PREFECT_API_URL: embedded}) if embedded else nullcontext(), _quiet():
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
