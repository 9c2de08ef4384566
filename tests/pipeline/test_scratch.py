"""Temporary folders: gone with their job, even one that was killed, and never while it is at work."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from pipeline.scratch import scratch
from tests.conftest import ROOT

KILLED = """
import os, signal
from pipeline.scratch import scratch

with scratch() as folder:
    (folder / "plan").write_text("of a million documents")
    print(folder, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_job_left_goes_when_the_next_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "softlabel-other").mkdir()  # which is not for us to judge
    killed = subprocess.run(
        [sys.executable, "-c", KILLED], cwd=ROOT, env={"TMPDIR": str(tmp_path)}, capture_output=True, text=True
    )
    left = Path(killed.stdout.strip())
    assert (left / "plan").exists()
    with scratch() as folder:
        assert not left.exists()
        with scratch() as other:
            assert folder.exists()
            assert other != folder
    assert [path.name for path in tmp_path.iterdir()] == ["softlabel-other"]
