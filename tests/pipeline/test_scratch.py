"""Temporary folders are deleted after their job, even a killed one, and never during it."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from softlabel.pipeline.exclusive import scratch
from tests.conftest import ROOT

KILLED = """
import os, signal
from softlabel.pipeline.exclusive import scratch

with scratch() as folder:
    (folder / "plan").write_text("of a million documents")
    print(folder, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_folder_of_a_killed_job_is_deleted_when_the_next_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "softlabel-other").mkdir()  # without a lock: may belong to something else
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


@pytest.fixture
def tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary files."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "tmp"


def linked_lock(folder: Path, lock: Path) -> None:
    folder.mkdir(0o700)
    (folder / "in-use").symlink_to(lock)


def linked_folder(folder: Path, lock: Path) -> None:
    folder.symlink_to(lock.parent)


def pipe(folder: Path, lock: Path) -> None:
    folder.mkdir(0o700)
    os.mkfifo(folder / "in-use")


def missing_lock(folder: Path, lock: Path) -> None:
    folder.mkdir(0o700)
    (folder / "in-use").symlink_to(lock.with_name("missing"))


def open_to_all(folder: Path, lock: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)
    (folder / "in-use").touch()


@pytest.mark.parametrize("put", [linked_lock, linked_folder, pipe, missing_lock, open_to_all])
def test_a_folder_that_only_looks_abandoned_is_not_deleted(put: Callable[[Path, Path], None], tmp: Path) -> None:
    other = tmp.with_name("others")
    other.mkdir()
    (other / "in-use").write_text("by somebody else")
    put(tmp / "softlabel-1", other / "in-use")
    with scratch():
        pass
    assert os.path.lexists(tmp / "softlabel-1")
    assert [path.name for path in other.iterdir()] == ["in-use"]
    assert (other / "in-use").read_text() == "by somebody else"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_another_users_folder_is_not_deleted(tmp: Path) -> None:
    (tmp / "softlabel-1").mkdir(0o700)
    (tmp / "softlabel-1" / "in-use").touch()
    os.chown(tmp / "softlabel-1", 65534, 65534)
    with scratch():
        pass
    assert (tmp / "softlabel-1" / "in-use").exists()
