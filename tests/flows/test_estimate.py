"""``softlabel estimate`` as a person runs it."""

import json
from pathlib import Path

import pytest

from flows.cli import run

pytestmark = pytest.mark.usefixtures("prefect")


def test_an_estimate_for_people_and_for_programs(
    tiny_teacher: Path, documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    command = ["estimate", str(documents), "--teacher.model", str(tiny_teacher), "--selection.top-k", "5"]
    command += ["--sample.batches", "1", "--gpu", "l4"]
    assert run([*command, "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert "read" in err
    assert "estimate" in err
    assert [selection["name"] for selection in found["selections"]] == [
        "as asked for",
        "default",
        "top-16",
        "top-64",
        "50 draws",
    ]
    assert run(command) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for said in (
        f"{found['sequences']:,} sequences, {found['positions']:,} positions",
        "on cpu",
        "one l4",
        "lost (KL)",
    ):
        assert said in shown


def test_a_device_that_nobody_knows_is_refused(capsys: pytest.CaptureFixture[str]):
    assert run(["estimate", "d", "--teacher.model", "t", "--gpu", "abacus"]) == 2
    assert "h100" in capsys.readouterr().err
