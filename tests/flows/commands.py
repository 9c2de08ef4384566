"""The command line, run in this process: its output for programs and for people."""

import json
from typing import Any

import pytest

from softlabel.flows.cli import run


def softlabel(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, Any, str]:
    """Run with ``--json``; returns the exit code, the JSON on stdout, and stderr."""
    code = run([*map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out), err


def shown(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run without ``--json``; returns stdout with all white space collapsed."""
    assert run([*map(str, arguments)]) == 0
    return " ".join(capsys.readouterr().out.split())
