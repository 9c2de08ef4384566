"""Training by several processes: the student that one process trains, and nobody left behind."""

import json
import signal
import time

import pytest
import torch

from pipeline import ranks
from pipeline.student_config import OptimiserConfig
from pipeline.student_folder import newest_checkpoint, step_of
from pipeline.training import train
from storage.errors import StudentError, UsageError
from tests.pipeline.trainings import CHILD, curve, history, interrupt_at, processes_of, run, settings, weights

pytestmark = pytest.mark.usefixtures("one_thread")


def test_two_processes_train_the_same_student(uninterrupted, table, tmp_path):
    seen = []
    report = train(settings(table, tmp_path / "student", optimiser={"processes": 2}), seen.append)
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
    # How many processes there were changes nothing about what the student is.
    assert train(settings(table, tmp_path / "student")).steps_trained == 0


def test_processes_die_with_the_one_that_started_them_and_another_number_goes_on(table, tmp_path):
    config = settings(table, tmp_path / "student", optimiser={"processes": 2, "max_steps": 1000})
    assert run(["-c", CHILD], config, step=5).returncode == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while left := processes_of(tmp_path):
        assert time.monotonic() < deadline, f"{left} outlived the process that started them"
        time.sleep(0.1)

    # They did not wait for the one that listens, and may have come further than it heard of.
    checkpoint = step_of(newest_checkpoint(tmp_path / "student.training")) + 4
    for name in ("student", "alone"):
        with pytest.raises(KeyboardInterrupt):
            train(settings(table, tmp_path / name, optimiser={"max_steps": 1000}), interrupt_at(checkpoint + 1))
    found, expected = (weights(tmp_path / f"{name}.training/checkpoint-{checkpoint}") for name in ("student", "alone"))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5)


def test_an_error_of_a_rank_is_the_error(table, tmp_path):
    alone, together = (
        settings(table, tmp_path / "student", student={"layers": None, "model": "nowhere"}, optimiser=optimiser)
        for optimiser in ({}, {"processes": 2})
    )
    with pytest.raises(StudentError) as expected:
        train(alone)
    with pytest.raises(StudentError) as error:
        train(together)
    assert str(error.value) == str(expected.value)
    assert not processes_of(tmp_path)
    # torchrun ends the first rank, too, which may then leave the file that it locked; nobody holds it any more.
    assert not {path.name for path in tmp_path.iterdir()} - {".student.softlabel.lock"}


def test_processes_that_there_are_no_gpus_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert ranks.to_start(OptimiserConfig()) == 2
    assert ranks.to_start(OptimiserConfig(processes=1)) == 0
    assert ranks.to_start(OptimiserConfig(device="cpu")) == 0
    with pytest.raises(UsageError, match="at most 2"):
        ranks.to_start(OptimiserConfig(processes=3))
