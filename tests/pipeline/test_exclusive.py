"""One process per output: a second one is refused, and a killed one does not block the next."""

import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from softlabel.pipeline.config.train import TrainConfig
from softlabel.pipeline.exclusive import lock_output
from softlabel.pipeline.training.train import train
from softlabel.storage.errors import TrainingError
from tests.conftest import ROOT

LOCK = ".student.softlabel.lock"

HOLD = """
import sys
import tempfile
from pathlib import Path
from softlabel.pipeline.exclusive import lock_output
with lock_output(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_can_not_train_the_same_student(tmp_path: Path):
    config = TrainConfig(table="nowhere", output=str(tmp_path / "student"), optimizer={"device": "cpu"})
    held = [sys.executable, "-c", HOLD, config.output]
    with subprocess.Popen(held, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "held\n"
            with pytest.raises(
                TrainingError, match=rf"another process is already training(.|\n)*process {other.pid} of "
            ):
                train(config)
        finally:
            other.kill()
    assert (tmp_path / LOCK).exists()
    with lock_output(tmp_path / "student"), pytest.raises(TrainingError), lock_output(tmp_path / "student"):
        pass
    assert not list(tmp_path.iterdir())


def test_the_block_runs_where_no_lock_can_be_made(tmp_path: Path):
    (tmp_path / "file").touch()
    with lock_output(tmp_path / "file" / "student"):
        during = everything(tmp_path)
    assert [*during] == [*everything(tmp_path)] == [str(tmp_path / "file")]


def linked_to_a_file(lock: Path, other: Path) -> None:
    lock.symlink_to(other)


def linked_to_nothing(lock: Path, other: Path) -> None:
    lock.symlink_to(other.with_name("missing"))


def linked_to_a_folder(lock: Path, other: Path) -> None:
    lock.symlink_to(other.parent)


def linked_in_two_steps(lock: Path, other: Path) -> None:
    (lock.parent / "step").symlink_to(other)
    lock.symlink_to(lock.parent / "step")


def another_name_of_a_file(lock: Path, other: Path) -> None:
    lock.hardlink_to(other)


def a_file(lock: Path, other: Path) -> None:
    lock.write_bytes(other.read_bytes())


def a_folder(lock: Path, other: Path) -> None:
    lock.mkdir()


def a_pipe(lock: Path, other: Path) -> None:
    os.mkfifo(lock)


def a_socket(lock: Path, other: Path) -> None:
    os.mknod(lock, stat.S_IFSOCK | 0o600)


LINKS = [linked_to_a_file, linked_to_nothing, linked_to_a_folder, linked_in_two_steps]
OTHERS = [another_name_of_a_file, a_file, a_folder, a_pipe, a_socket]


@pytest.mark.parametrize("put", [*LINKS, *OTHERS])
def test_a_file_that_is_not_a_lock_stays_unchanged_and_nothing_is_trained(put, tmp_path: Path):
    other = tmp_path / "others" / "thesis"
    other.parent.mkdir()
    other.write_text("years of work")
    (tmp_path / "home").mkdir()
    lock = tmp_path / "home" / LOCK
    put(lock, other)
    before = everything(tmp_path)
    with (
        pytest.raises(TrainingError, match=rf"can't tell whether(.|\n)*{LOCK}"),
        lock_output(tmp_path / "home" / "student"),
    ):
        pytest.fail("it has begun")
    assert everything(tmp_path) == before


def everything(folder: Path) -> dict[str, object]:
    """By path, the inode, mode, time and content of everything in a folder."""
    found = {}
    for path in folder.rglob("*"):
        is_file = path.is_file() and not path.is_symlink()
        about = path.lstat()
        found[str(path)] = (about.st_ino, about.st_mode, about.st_mtime_ns, path.read_bytes() if is_file else None)
    return found


@pytest.mark.parametrize("name", ["uv", "poetry", ".env"])
def test_lock_files_of_other_programs_are_left_alone(name: str, tmp_path: Path):
    (tmp_path / f"{name}.lock").write_text("version = 1")
    before = everything(tmp_path)
    with lock_output(tmp_path / name):
        assert everything(tmp_path).items() >= before.items()
    assert everything(tmp_path) == before


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path):
    held = [sys.executable, "-c", HOLD, str(tmp_path / "student")]
    with subprocess.Popen(held, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        other.kill()
    assert (tmp_path / LOCK).exists()
    with lock_output(tmp_path / "student"):
        assert f"process {os.getpid()} of " in (tmp_path / LOCK).read_text()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_a_lock_held_by_another_user_is_respected():
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        taken = pytest.raises(TrainingError, match=f"process {os.getpid()} of ")
        with lock_output(Path(folder, "student")), as_nobody(), taken, lock_output(Path(folder, "student")):
            pass


@contextmanager
def as_nobody() -> Iterator[None]:
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
