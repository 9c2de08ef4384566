"""Who may read and change what a capture and a training write follows from the umask alone; so users can take turns."""

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from softlabel.pipeline.capturing.capture import capture
from softlabel.pipeline.training.train import train
from softlabel.storage.table import Table
from tests.conftest import ROOT
from tests.pipeline.capturing import test_capture
from tests.pipeline.trainings import interrupt_at, settings


@pytest.fixture(params=[0o027, *(pytest.param(umask, marks=pytest.mark.long) for umask in (0o002, 0o077))], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def wrong(folder: Path, umask: int) -> dict[str, str]:
    """Files and folders that are open to others than the umask says."""
    return {
        str(path.relative_to(folder)): oct(mode)
        for path in folder.rglob("*")
        if (mode := stat.S_IMODE(path.lstat().st_mode)) != (0o777 if path.is_dir() else 0o666) & ~umask
    }


def test_all_files_have_the_permissions_that_the_umask_leaves(umask: int, tiny_teacher: Path, tmp_path: Path):
    base = tmp_path / "all"
    base.mkdir()
    documents = test_capture.write(base / "documents.parquet", test_capture.texts(60))
    capture(test_capture.settings(tiny_teacher, documents, base / "table"))
    table = Table.open(str(base / "table"))
    config = settings(table, base / "student", stream={"max_length": 128}, optimizer={"early_stopping_patience": 50})
    with pytest.raises(KeyboardInterrupt):
        train(config, interrupt_at(9))
    assert any(base.glob("student.training/checkpoint-*/model.safetensors"))
    assert any(base.glob("student.training/best-*/model.safetensors"))
    assert wrong(base, umask) == {}
    train(config)
    assert any(base.glob("student/training-state/*/model.safetensors"))
    assert wrong(base, umask) == {}
    train(settings(table, base / "student", stream={"max_length": 128}, optimizer={"num_train_epochs": 4}))
    assert wrong(base, umask) == {}


TRAINING = """
import codecs, os, sys
from softlabel.pipeline.config.train import TrainConfig
from softlabel.pipeline.training.train import train

settings, user, until, warm = sys.argv[1:]
config = TrainConfig.model_validate_json(settings)
# Imports everything that a training does, since only root may read this Python.
train(config.model_copy(update={"output": warm}))
codecs.lookup("latin1")
os.umask(0o002)
os.setgroups([])
os.setgid(4242)
os.setuid(int(user))

def watch(progress):
    if progress.done == int(until):
        os.kill(os.getpid(), 9)

print(train(config, watch).resumed_from)
"""


@pytest.mark.long
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become other users")
def test_a_user_continues_the_training_that_another_user_of_the_group_began(tiny_teacher: Path, tmp_path: Path):
    """The first one's process is killed, so that its lock file stays."""
    from tests.pipeline.captured import make_table

    shared = Path(tempfile.mkdtemp(dir="/tmp"))  # tmp_path is in a folder that only this user can enter
    try:
        shared.chmod(0o2770)
        shutil.chown(shared, group=4242)
        before = os.umask(0o002)
        shutil.copytree(tiny_teacher, shared / "teacher")
        (shared / "teacher" / "model.safetensors").chmod(0o664)
        table = make_table(shared / "table", shared / "teacher")
        os.umask(before)
        for path in shared.rglob("*"):
            shutil.chown(path, 4201, 4242)
        config = settings(table, shared / "student", optimizer={"early_stopping_patience": 50, "max_steps": 14})

        def trained_by(user: int, until: int) -> "subprocess.CompletedProcess[str]":
            warm = tmp_path / f"warm-{user}-{until}"
            return subprocess.run(
                [sys.executable, "-c", TRAINING, config.model_dump_json(), str(user), str(until), str(warm)],
                env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": "/tmp"},
                capture_output=True,
                text=True,
            )

        assert trained_by(4201, until=9).returncode == -9
        continued = trained_by(4202, until=-1)
        assert continued.returncode == 0, continued.stderr
        assert continued.stdout.split() == ["8"]
        assert {path.stat().st_uid for path in (shared / "student").iterdir()} == {4202}
        assert trained_by(4201, until=-1).stdout.split() == ["None"]
    finally:
        shutil.rmtree(shared)
