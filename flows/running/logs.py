"""Log lines for programs: with SOFTLABEL_LOG_FORMAT=json, each line on stderr is one JSON object.

It has time, level, message and logger and, where they are known, run, run_name, table, version, shard and student.
Prefect's server gets the same records as ever: only what handlers print is changed.
"""

import json
import logging
import os
import sys
from datetime import UTC, datetime
from typing import Any, Literal

from softlabel.pipeline.log_context import now_about
from softlabel.storage.credentials import masked
from softlabel.storage.errors import UsageError

FORMAT = "SOFTLABEL_LOG_FORMAT"
"""Environment variable; every process that is started inherits it."""
_SECRETS = (
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN"),
    *("PREFECT_API_KEY", "PREFECT_API_AUTH_STRING", "PREFECT_SERVER_API_AUTH_STRING"),
)
"""Environment variables whose values never appear."""


def format_of_lines() -> Literal["text", "json"]:
    """The format that the environment asks for.

    Raises:
        UsageError: if it is neither of the two.
    """
    match os.environ.get(FORMAT) or "text":
        case "text":
            return "text"
        case "json":
            return "json"
        case other:
            raise UsageError(
                "the environment asks for log lines in an unknown format",
                expected=f"{FORMAT}: text or json",
                found=other,
            )


def subject(config: object) -> dict[str, str]:
    """What a run with these settings is about."""
    found = {
        "table": next((value for name in ("table", "source", "view") if (value := getattr(config, name, None))), None),
        "student": getattr(config, "output", None),
    }
    return {name: value for name, value in found.items() if isinstance(value, str)}


def line(level: int, message: str) -> str:
    """A line about this program as a whole, outside of any run."""
    if os.environ.get(FORMAT) == "json":
        return JsonLines().format(logging.LogRecord("softlabel", level, __file__, 0, message, None, None))
    return f"softlabel: {message}"


class JsonLines(logging.Formatter):
    """Formats each record as one line with a JSON object, in ASCII."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "message": _message(record).strip(),
            "logger": record.name,
            **_run_of(record),
            **now_about(),
        }
        if record.exc_info and record.exc_info[0]:
            entry["error"] = self.formatException(record.exc_info)
        return json.dumps({name: _safe(value) if isinstance(value, str) else value for name, value in entry.items()})


def print_json_lines() -> None:
    """From now on, let every log line that this process prints, and every warning, be JSON.

    Libraries set up handlers of their own, at any time; so the change is made where all of them format a line.
    """
    lines = JsonLines()
    logging.StreamHandler.format = lambda _, record: lines.format(record)  # type: ignore[method-assign, assignment]
    logging.captureWarnings(True)
    if not logging.getLogger().handlers:
        logging.getLogger().addHandler(logging.StreamHandler(sys.stderr))


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception:  # wrong arguments: logging would print the error as many lines
        return f"{record.msg!r} with other arguments than it takes"


def _run_of(record: logging.LogRecord) -> dict[str, str]:
    """The Prefect run that a record is about: its own, or else the one that is running."""
    if identifier := getattr(record, "flow_run_id", None):
        return {"run": str(identifier), "run_name": str(getattr(record, "flow_run_name", ""))}
    if "prefect.context" not in sys.modules:
        return {}
    from prefect.context import FlowRunContext, TaskRunContext

    flow, task = FlowRunContext.get(), TaskRunContext.get()
    if flow and flow.flow_run:
        about = {"run": str(flow.flow_run.id), "run_name": flow.flow_run.name}
        return about | subject((flow.parameters or {}).get("config"))
    return {"run": str(task.task_run.flow_run_id)} if task else {}


def _safe(text: str) -> str:
    text = masked(text)
    for name in _SECRETS:
        if len(secret := os.environ.get(name, "")) > 3:
            text = text.replace(secret, "(a secret)")
    return text
