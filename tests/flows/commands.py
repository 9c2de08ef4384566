"""The command line within this process: what a program gets of it, and what a person sees."""

import json
from typing import Any

import pytest

from softlabel.flows.cli import run


def softlabel(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, Any, str]:
    """Exit code, the JSON on stdout, and stderr."""
    code = run([*map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out), err


def shown(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a person sees on stdout."""
    assert run([*map(str, arguments)]) == 0
    return " ".join(capsys.readouterr().out.split())
