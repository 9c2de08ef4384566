"""Prefect flows and the command line: when and where the pipeline runs. Never opens Parquet or handles tensors."""

import logging
import os
import sys

# Prefect reads these on import, and so does the server that it starts: neither may contact the internet.
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
# Attach our own log lines to the Prefect run that they are about.
os.environ.setdefault("PREFECT_LOGGING_EXTRA_LOGGERS", "softlabel")
if "prefect" in sys.modules:  # a worker loads a flow when Prefect has already configured its logging
    for handler in logging.getLogger("prefect.extra").handlers:
        logging.getLogger("softlabel").addHandler(handler)
    if os.environ.get("SOFTLABEL_LOG_FORMAT") == "json":
        from softlabel.flows.running.logs import print_json_lines

        print_json_lines()
os.environ.setdefault("PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW", "ignore")
# Progress bars of huggingface_hub and transformers would break ours, and clutter the log of a worker.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# Torch reads this at its first tensor. Large tensors then use huge pages, if the system leaves the choice to the
# program. Without them, a CPU spends a twentieth of a capture on handing out small pages.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
