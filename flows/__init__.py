"""When and where the pipeline runs: Prefect flows and the command line. Never opens Parquet, never touches a tensor."""

import os

# Read by Prefect as it is imported, and by the server that it starts: neither may try to reach the internet.
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
# Our own lines of progress belong to the run that they are about.
os.environ.setdefault("PREFECT_LOGGING_EXTRA_LOGGERS", "softlabel")
os.environ.setdefault("PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW", "ignore")
