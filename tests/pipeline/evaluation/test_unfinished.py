"""What an evaluation keeps while it runs: other evaluations in the same folder, and full disks."""

import errno
from pathlib import Path

import numpy as np
import pytest

from softlabel.pipeline.evaluation import unfinished
from softlabel.pipeline.evaluation.report.folder import prepare
from softlabel.pipeline.evaluation.standings import Gap
from softlabel.pipeline.evaluation.unfinished import Unfinished, finish, once
from softlabel.storage.errors import UsageError
from softlabel.storage.places import durable

WRITES = {
    "sums": lambda folder: Unfinished.of(folder, {"model": "a"}).save({"sums": np.ones(3)}),
    "other measurements": lambda folder: once(Gap, folder, {"model": "a"}, lambda: Gap("control", None)),
    "the claim": lambda folder: prepare(folder, "table", ["student"]),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_an_evaluation_goes_on_when_another_one_of_the_same_students_finishes(write, tmp_path, monkeypatch):
    """Which deletes what both have kept, maybe just when a file is written."""
    folder, real, failed = tmp_path / "report", durable.write, []

    def interrupted(path: Path, content: bytes, **options: bool) -> None:
        if not failed:
            finish(folder)
            failed.append(path)
            raise FileNotFoundError(errno.ENOENT, "deleted meanwhile")
        real(path, content, **options)

    monkeypatch.setattr(unfinished.durable, "write", interrupted)
    write(folder)
    assert failed[0].exists()
    assert Unfinished.of(folder, {"model": "b"}).restore() == {}


def test_an_evaluation_finishes_while_another_one_writes(tmp_path, monkeypatch):
    WRITES["sums"](tmp_path)
    monkeypatch.setattr("os.rmdir", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.ENOTEMPTY, "not empty")))
    finish(tmp_path)


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_full_disk_is_named_with_what_to_do(write, tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(unfinished.durable, "write", full)
    with pytest.raises(UsageError, match=r"No space left(.|\n)*choose another folder"):
        write(tmp_path / "report")
