"""Training by several processes: the student equals that of one process, and no process is left behind."""

import json
import os
import signal
import socket
import stat
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from softlabel.pipeline.config.train import OptimizerConfig
from softlabel.pipeline.processes import Child
from softlabel.pipeline.students.folder import newest_checkpoint, step_of
from softlabel.pipeline.training import launch as ranks
from softlabel.pipeline.training.train import train
from softlabel.storage.errors import StudentError, UsageError, WorkerError
from tests.listening import family, listening, only_here, trap
from tests.pipeline.trainings import CHILD, curve, history, interrupt_at, processes_of, run, settings, weights

pytestmark = pytest.mark.usefixtures("one_thread")
ELSEWHERE = {
    **{"MASTER_ADDR": "0.0.0.0", "MASTER_PORT": "1", "NCCL_COMM_ID": "0.0.0.0:1"},
    **{"RANK": "7", "LOCAL_RANK": "7", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8", "GROUP_RANK": "3"},
    **{"PMI_RANK": "7", "PMI_SIZE": "8", "OMPI_COMM_WORLD_RANK": "7", "SLURM_PROCID": "7", "SLURM_NTASKS": "8"},
}
NOTING = """
import pickle, sys
class Noting(pickle.Unpickler):
    def __init__(self, *what, **how):
        super().__init__(*what, **how)
        if "distributed" in sys._getframe(1).f_code.co_filename:
            open({!r}, "a").write("an object\\n")
pickle.Unpickler = Noting
"""
"""A sitecustomize for ranks, which records whatever torch.distributed unpickles."""


def test_two_processes_train_the_same_student(uninterrupted, table, tmp_path):
    seen, open_to = [], set()

    def watch(progress):
        seen.append(progress)
        open_to.update(listening(family(os.getpid())))

    report = train(settings(table, tmp_path / "student", optimizer={"processes": 2}), watch)
    assert open_to
    assert only_here(open_to), open_to
    assert (report.steps, report.positions) == (uninterrupted.steps, uninterrupted.positions)
    assert [(progress.stage, progress.done) for progress in seen] == [("train student", step) for step in range(1, 13)]
    assert seen[-1].details["eval_kl"] == pytest.approx(report.metrics["eval_kl"]), "of the last step, not one before"
    record = json.loads((tmp_path / "student" / "softlabel.json").read_text())
    assert record["circumstances"]["ranks"] == "2"
    for entry, other in zip(history(uninterrupted.output), history(tmp_path / "student"), strict=True):
        assert other == pytest.approx(entry, rel=1e-4)
    norms = dict(curve(uninterrupted.output, "grad_norm"))
    assert dict(curve(tmp_path / "student", "grad_norm")) == pytest.approx(norms, rel=1e-3)
    for name, tensor in weights(uninterrupted.output).items():
        torch.testing.assert_close(weights(tmp_path / "student")[name], tensor, rtol=1e-3, atol=1e-5)
    # The number of processes does not affect the student.
    assert train(settings(table, tmp_path / "student")).steps_trained == 0


def test_a_rank_ends_with_its_parent_even_while_it_starts(table, tmp_path):
    rank = Child(
        "softlabel.pipeline.training.rank",
        settings(table, tmp_path / "student").model_dump_json(),
        str(tmp_path / "rendezvous"),
        log=tmp_path / "log",
        environment=os.environ | {"RANK": "0"},
    )
    rank.process.stdin.close()  # as the kernel does when the parent is killed
    assert rank.process.wait(300) == 1, (tmp_path / "log").read_text()
    assert not (tmp_path / "student.training").exists()


@pytest.mark.long
def test_ranks_die_with_their_parent_and_another_number_of_them_resumes(table, tmp_path):
    config = settings(table, tmp_path / "student", optimizer={"processes": 2, "max_steps": 1000})
    assert run(["-c", CHILD], config, step=5).returncode == -signal.SIGKILL
    deadline = time.monotonic() + 60
    while left := processes_of(tmp_path):
        assert time.monotonic() < deadline, f"{left} outlived the process that started them"
        time.sleep(0.1)

    # The ranks do not wait for the parent, and may be further than the last progress that it received.
    checkpoint = step_of(newest_checkpoint(tmp_path / "student.training")) + 4
    for name in ("student", "alone"):
        with pytest.raises(KeyboardInterrupt):
            train(settings(table, tmp_path / name, optimizer={"max_steps": 1000}), interrupt_at(checkpoint + 1))
    found, expected = (weights(tmp_path / f"{name}.training/checkpoint-{checkpoint}") for name in ("student", "alone"))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.long
def test_an_error_of_a_rank_is_raised_by_the_parent(table, tmp_path):
    alone, together = (
        settings(table, tmp_path / "student", student={"layers": None, "model": "nowhere"}, optimizer=optimizer)
        for optimizer in ({}, {"processes": 2})
    )
    with pytest.raises(StudentError) as expected:
        train(alone)
    with pytest.raises(StudentError) as error:
        train(together)
    assert str(error.value) == str(expected.value)
    assert not processes_of(tmp_path)
    # The first rank is killed, too, and may leave its lock file, which no process holds any more.
    assert not {path.name for path in tmp_path.iterdir()} - {".student.softlabel.lock"}


@pytest.mark.long
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_ends_the_others_and_is_named_in_the_error(victim, table, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    died, before = 0.0, family(os.getpid())

    def kill(progress):
        nonlocal died
        if not died:
            os.kill(sorted(processes_of(tmp_path))[victim], signal.SIGKILL)
            died = time.monotonic()

    with pytest.raises(WorkerError, match=rf"SIGKILL(.|\n)*rank {victim} of 2"):
        train(settings(table, tmp_path / "student", optimizer={"processes": 2, "max_steps": 10_000}), kill)
    assert time.monotonic() - died < 60
    assert not processes_of(tmp_path)
    assert family(os.getpid()) <= before, "no zombie either"
    assert {path.name for path in tmp_path.iterdir()} <= {".student.softlabel.lock", "student.training"}


@pytest.mark.long
@pytest.mark.parametrize("sharding", ["none", "full"])
def test_ranks_ignore_other_launchers_and_use_only_the_loopback_interface(sharding, table, tmp_path, monkeypatch):
    """With another launcher's environment, another network interface, and a folder of modules that must not run."""
    for name, value in ELSEWHERE.items():
        monkeypatch.setenv(name, value)
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME"):
        monkeypatch.setenv(name, next(name for _, name in reversed(socket.if_nameindex())))
    caught = trap(tmp_path / "working")
    monkeypatch.chdir(tmp_path / "working")
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "sitecustomize.py").write_text(NOTING.format(str(tmp_path / "unpickled")))
    monkeypatch.syspath_prepend(tmp_path / "notes")
    open_to, folders = set(), {}

    def watch(progress):
        open_to.update(listening(family(os.getpid())))
        for process in processes_of(tmp_path):
            rendezvous = Path(Path(f"/proc/{process}/cmdline").read_text().split("\0")[-2])
            folders[rendezvous.parent] = rendezvous.parent.stat()

    before = os.umask(0)
    try:
        config = settings(table, tmp_path / "student", optimizer={"processes": 2, "max_steps": 2, "sharding": sharding})
        train(config, watch)
    finally:
        os.umask(before)
    assert open_to
    assert only_here(open_to), open_to
    [(folder, status)] = folders.items()
    assert (stat.S_IMODE(status.st_mode), status.st_uid) == (0o700, os.getuid())
    assert not folder.exists()
    assert not caught.exists(), caught.read_text()
    assert not (tmp_path / "unpickled").exists(), "nothing from a socket is unpickled"


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert ranks.to_start(OptimizerConfig()) == 2
    assert ranks.to_start(OptimizerConfig(processes=1)) == 0
    assert ranks.to_start(OptimizerConfig(device="cpu")) == 0
    with pytest.raises(UsageError, match="at most 2"):
        ranks.to_start(OptimizerConfig(processes=3))
