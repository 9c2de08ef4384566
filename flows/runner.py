"""Runs one flow for the command line, in this process, on the Prefect server that is configured or on the embedded one.

Keeps Prefect's own words off the terminal; its server gets them all the same.
"""

import logging
import os
import sys
from contextlib import nullcontext
from importlib import import_module
from typing import Any

from prefect.settings import PREFECT_API_URL, get_current_settings, temporary_settings

from flows import server
from pipeline.config import Settings


# Read by huggingface_hub, and so by transformers: their bars would break ours, and litter a log.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def run(name: str, config: Settings) -> Any:
    """Run the flow of that name and return what it returns.

    Raises:
        SoftlabelError: what the flow raised.
    """
    embedded = None if get_current_settings().api.url else server.start()
    flow = getattr(import_module(f"flows.{name}"), f"{name}_flow")  # takes seconds, and so does the server's start
    _keep_quiet()
    if embedded:
        server.wait(embedded)
    with temporary_settings({PREFECT_API_URL: embedded}) if embedded else nullcontext():
        return flow(config)


def _keep_quiet() -> None:
    """Prefect's records go to its server alone, and ours to stderr as plain lines."""
    for handler in logging.getLogger().handlers:
        handler.addFilter(lambda record: not record.name.startswith("prefect"))
    ours = logging.getLogger("softlabel")
    ours.handlers.append(logging.StreamHandler(sys.stderr))
    ours.propagate = False
