"""SIGTERM and Ctrl-C for the command: finished work is kept, and the exit code names the signal."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from softlabel.pipeline.students.folder import newest_checkpoint
from softlabel.storage.table import Table
from tests.flows.servers import wait_until
from tests.pipeline.captured import make_table
from tests.pipeline.capturing.test_capture import texts, write
from tests.pipeline.capturing.test_worker_pool import gone, workers_of
from tests.pipeline.trainings import processes_of

INTERRUPTIBLE = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
"""A shell ignores Ctrl-C for programs in the background, and so do their children."""


def start(prefect_home: Path, log: Path, *arguments: object) -> "subprocess.Popen[bytes]":
    with log.open("wb") as file:
        return subprocess.Popen(
            [
                sys.executable,
                "-c",
                INTERRUPTIBLE + "from softlabel.flows.cli import main; main()",
                *map(str, arguments),
            ],
            env=os.environ | {"PREFECT_HOME": str(prefect_home), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=file,
        )


@pytest.mark.parametrize(
    ("number", "processes", "code"),
    [
        (signal.SIGTERM, 1, 143),
        pytest.param(signal.SIGINT, 1, 130, marks=pytest.mark.long),
        pytest.param(signal.SIGTERM, 2, 143, marks=pytest.mark.long),
        pytest.param(signal.SIGINT, 2, 130, marks=pytest.mark.long),
    ],
)
def test_train_saves_its_last_step(number, processes, code, prefect_home, tiny_teacher, tmp_path):
    table = make_table(tmp_path / "table", tiny_teacher, train=8, held_out=0)
    endless = ("--optimizer.max-steps", 1_000_000, "--optimizer.save-steps", 1_000_000)
    small = ("--student.layers", 1, "--optimizer.device", "cpu", "--optimizer.processes", processes)
    log = tmp_path / "log"
    run = start(prefect_home, log, "train", table.location, tmp_path / "student", *small, *endless)
    try:
        wait_until(lambda: "train student" in log.read_text(), seconds=120)
        run.send_signal(number)
        assert run.wait(180) == code, log.read_text()
    finally:
        run.kill()
    assert newest_checkpoint(tmp_path / "student.training")
    assert "saved; run the same command again to go on from step" in log.read_text()
    assert not processes_of(tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("workers", [1, 2])
def test_capture_keeps_its_committed_shards(workers, prefect_home, tiny_teacher, tmp_path):
    documents, log = write(tmp_path / "d.parquet", texts(20_000)), tmp_path / "log"
    small = ("--shards.positions", 5_000, "--teacher.device", "cpu", "--teacher.workers", workers)
    run = start(prefect_home, log, "capture", documents, tmp_path / "t", "--teacher.model", tiny_teacher, *small)
    try:
        wait_until(lambda: Table.exists(str(tmp_path / "t")) and Table.open(str(tmp_path / "t")).version > 1, 120)
        children = workers_of(run.pid)
        run.send_signal(signal.SIGTERM)
        assert run.wait(180) == 143, log.read_text()
    finally:
        run.kill()
    assert all(map(gone, children))
    assert Table.open(str(tmp_path / "t")).version > 1
    assert not list((tmp_path / "t" / "_softlabel" / "writing").glob("*.parquet"))
