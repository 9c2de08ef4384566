"""When and where the pipeline runs: Prefect flows and the command line. Never opens Parquet, never touches a tensor."""

import os

# Read by Prefect as it is imported, and by the server that it starts: neither may try to reach the internet.
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
# Our own lines of progress belong to the run that they are about.
os.environ.setdefault("PREFECT_LOGGING_EXTRA_LOGGERS", "softlabel")
os.environ.setdefault("PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW", "ignore")
# Read by torch at its first tensor: large ones lie in huge pages, where the system leaves that to the program. Without,
# a CPU spends a twentieth of a capture on handing out small ones.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
