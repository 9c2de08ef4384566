"""Ctrl-C and SIGTERM end a training after its current step, with a checkpoint from which it resumes exactly."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from softlabel.pipeline.students.folder import checkpoints, newest_checkpoint, step_of
from softlabel.pipeline.training.train import train
from softlabel.storage.errors import UsageError
from tests.conftest import ROOT
from tests.pipeline.trainings import curve, history, processes_of, settings, weights

pytestmark = pytest.mark.usefixtures("one_thread")
TWO = {"processes": 2}

CHILD = """
import json, os, signal, sys
import torch
torch.set_num_threads(1)
from softlabel.pipeline.config.train import TrainConfig
from softlabel.pipeline.training.train import train

settings, when = json.loads(sys.argv[1]), json.loads(sys.argv[2])
def get(number):
    os.kill(os.getpid(), number)

if "saving" in when:
    save = torch.save
    def interrupted_save(value, path, *more, **others):
        get(when["saving"])
        save(value, path, *more, **others)
    torch.save = interrupted_save

def watch(progress):
    if progress.done == when["step"]:
        get(when["number"])

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for programs in the background
train(TrainConfig.model_validate(settings), watch)
"""
"""A program that trains, and gets a signal when a step is done, and maybe another one while it saves a checkpoint."""


def trained(config, **when):
    """Exit code and stderr of this program."""
    child = subprocess.run(
        [sys.executable, "-c", CHILD, config.model_dump_json(), json.dumps(when)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return child.returncode, child.stderr


def signalled(step, number, *more):
    """A watch at which this process gets a signal, and others at once after it."""

    def watch(progress):
        if progress.done == step:
            for each in (number, *more):
                os.kill(os.getpid(), each)

    return watch


def assert_same(folder, other):
    expected = weights(other)
    for name, tensor in weights(folder).items():
        assert torch.equal(tensor, expected[name]), name
    assert history(folder) == history(other)
    assert curve(folder, "loss") == curve(other, "loss")


@pytest.mark.long
def test_after_sigterm_a_program_has_saved_its_last_step_and_ends_with_143(uninterrupted, table, tmp_path):
    config = settings(table, tmp_path / "student")
    code, printed = trained(config, step=6, number=signal.SIGTERM)
    assert code == 143, printed
    assert "student: stopped at step 6 of 12, saved; run the same command again to go on from step 6" in printed
    assert "Traceback" not in printed
    report = train(config)
    assert (report.resumed_from, report.steps_trained) == (6, 6)
    assert_same(tmp_path / "student", uninterrupted.output)
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_an_ignored_interrupt_stays_ignored(uninterrupted, table, tmp_path):
    """As for a program that a script runs in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        train(settings(table, tmp_path / "student"), signalled(2, signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, before)
    assert_same(tmp_path / "student", uninterrupted.output)


@pytest.mark.parametrize("step", [1, 8, *(pytest.param(step, marks=pytest.mark.long) for step in (5, 11))])
def test_a_training_resumes_exactly_after_an_interrupt(step, uninterrupted, table, tmp_path, caplog):
    """At its first step, at one with an evaluation, at one with a checkpoint of its own, and before its last."""
    config, handlers = settings(table, tmp_path / "student"), list(map(signal.getsignal, (2, 15)))
    with pytest.raises(KeyboardInterrupt):
        train(config, signalled(step, signal.SIGINT))
    assert list(map(signal.getsignal, (2, 15))) == handlers
    assert f"stopped at step {step} of 12, saved" in caplog.text
    assert step_of(newest_checkpoint(tmp_path / "student.training")) == step
    assert train(config).resumed_from == step
    assert_same(tmp_path / "student", uninterrupted.output)


def test_an_interrupt_at_the_last_step_ends_a_finished_training(uninterrupted, table, tmp_path, caplog):
    with pytest.raises(KeyboardInterrupt):
        train(settings(table, tmp_path / "student"), signalled(12, signal.SIGINT))
    assert "the student is finished" in caplog.text
    assert_same(tmp_path / "student", uninterrupted.output)


def test_an_interrupt_at_the_step_of_an_early_stop_ends_a_finished_training(table, tmp_path):
    early = {"early_stopping_patience": 1, "learning_rate": 0.5, "warmup_ratio": 0}  # too high to get any better
    with pytest.raises(KeyboardInterrupt):
        train(settings(table, tmp_path / "student", optimizer=early), signalled(5, signal.SIGINT))
    expected = train(settings(table, tmp_path / "other", optimizer=early))
    assert expected.stopped_at == 5
    assert_same(tmp_path / "student", expected.output)


def test_a_second_signal_ends_at_once_and_keeps_the_last_whole_checkpoint(uninterrupted, table, tmp_path):
    config = settings(table, tmp_path / "student")
    with pytest.raises(KeyboardInterrupt):
        train(config, signalled(4, signal.SIGINT))
    code, printed = trained(config, step=6, number=signal.SIGTERM, saving=signal.SIGINT)
    assert code == -signal.SIGINT, printed
    assert (
        "stopped at step 6 of 12, the last checkpoint is of step 4; run the same command again to go on from step 4"
        in printed
    )
    assert train(config).resumed_from == 4
    assert_same(tmp_path / "student", uninterrupted.output)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_before_the_first_step_a_signal_ends_at_once_and_says_so(number, table, tmp_path, monkeypatch, caplog):
    config = settings(table, tmp_path / "student")
    ended = KeyboardInterrupt if number == signal.SIGINT else SystemExit

    def interrupted(*_, **__):
        os.kill(os.getpid(), number)
        time.sleep(60)

    with monkeypatch.context() as patch:
        patch.setattr("softlabel.pipeline.objectives.language_model.build", interrupted)
        with pytest.raises(ended):
            train(config)
        assert "student: nothing was trained yet; run the same command again to begin" in caplog.text
    with pytest.raises(KeyboardInterrupt):
        train(config, signalled(2, signal.SIGINT))
    with monkeypatch.context() as patch:
        patch.setattr("softlabel.pipeline.objectives.language_model.build", interrupted)
        with pytest.raises(ended):
            train(config)
    assert "student: nothing more was trained yet; run the same command again to go on from step 2" in caplog.text


def test_a_signal_during_the_steps_after_a_finished_training_says_where_these_go_on(table, tmp_path, caplog):
    train(settings(table, tmp_path / "student", optimizer={"max_steps": 2}))
    further = settings(table, tmp_path / "student", optimizer={"max_steps": 6})
    with pytest.raises(KeyboardInterrupt):
        train(further, signalled(4, signal.SIGINT))
    assert "student: stopped at step 4 of 6, saved; run the same command again to go on from step 4" in caplog.text
    assert train(further).resumed_from == 4


def test_a_callers_own_handlers_are_called_after_the_checkpoint_and_put_back(table, tmp_path):
    seen = []

    def note(*_):
        seen.append([step_of(each) for each in checkpoints(tmp_path / "student.training")])

    before = signal.signal(signal.SIGTERM, note)
    try:
        with pytest.raises(SystemExit) as end:
            train(settings(table, tmp_path / "student"), signalled(3, signal.SIGTERM))
        assert signal.getsignal(signal.SIGTERM) is note
    finally:
        signal.signal(signal.SIGTERM, before)
    assert end.value.code == 143
    assert seen == [[3]]


def test_a_training_in_another_thread_leaves_signals_to_the_main_thread(table, tmp_path):
    handlers, during = list(map(signal.getsignal, (2, 15))), []
    config = settings(table, tmp_path / "student", optimizer={"max_steps": 2})
    watch = lambda _: during.append(list(map(signal.getsignal, (2, 15))))  # noqa: E731
    thread = threading.Thread(target=train, args=(config, watch))
    thread.start()
    thread.join()
    assert (tmp_path / "student").exists()
    assert all(each == handlers for each in during)


def test_a_refused_training_puts_the_handlers_back(table, tmp_path):
    handlers = list(map(signal.getsignal, (2, 15)))
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "thesis.tex").write_text("")
    with pytest.raises(UsageError):
        train(settings(table, tmp_path / "student"))
    assert list(map(signal.getsignal, (2, 15))) == handlers


@pytest.mark.long
def test_two_processes_stop_at_the_same_step_and_save_it(table, tmp_path, caplog):
    """Also if each of them gets the signal, as from a service manager."""
    config = settings(table, tmp_path / "student", optimizer={**TWO, "max_steps": 1000, "save_steps": 1000})

    def watch(progress):
        if progress.done == 2:
            for process in processes_of(tmp_path):
                os.kill(process, signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(config, watch)
    assert not processes_of(tmp_path)
    [saved] = map(step_of, checkpoints(tmp_path / "student.training"))
    assert f"stopped at step {saved} of 1,000, saved" in caplog.text


@pytest.mark.long
@pytest.mark.parametrize("sharding", ["none", "full"])
def test_two_processes_resume_exactly_after_an_interrupt(sharding, table, tmp_path):
    optimizer = {**TWO, "sharding": sharding, "max_steps": 40, "save_steps": 1000}
    config = settings(table, tmp_path / "student", optimizer=optimizer)
    with pytest.raises(KeyboardInterrupt):
        train(config, signalled(2, signal.SIGINT))
    assert train(config).resumed_from < 40
    assert_same(tmp_path / "student", train(settings(table, tmp_path / "other", optimizer=optimizer)).output)


@pytest.mark.long
def test_a_second_interrupt_ends_two_processes_at_once(table, tmp_path):
    config = settings(table, tmp_path / "student", optimizer={**TWO, "max_steps": 10_000, "save_steps": 1})
    with pytest.raises(KeyboardInterrupt):
        train(config, signalled(3, signal.SIGINT, signal.SIGINT))
    assert not processes_of(tmp_path)
    last = newest_checkpoint(tmp_path / "student.training")
    assert step_of(last) >= 2
    assert Path(last, "model.safetensors").exists()


@pytest.mark.long
def test_before_the_first_step_a_signal_ends_two_processes_at_once(table, tmp_path, caplog):
    config, parent = settings(table, tmp_path / "student", optimizer=TWO), os.getpid()

    def interrupt():
        while len(processes_of(tmp_path)) < 2:
            time.sleep(0.01)
        os.kill(parent, signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        train(config)
    assert not processes_of(tmp_path)
    assert "nothing was trained yet" in caplog.text
