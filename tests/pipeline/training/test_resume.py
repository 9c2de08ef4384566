"""Training that was interrupted resumes exactly; training that would mix two runs is refused."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from softlabel.pipeline.training.train import train
from softlabel.storage.errors import TrainingError, UsageError
from softlabel.storage.table import Table
from tests.pipeline import captured as tables
from tests.pipeline.trainings import CHILD, curve, history, interrupt_at, run, settings, weights

pytestmark = pytest.mark.usefixtures("one_thread")


DEATHS = [pytest.param({"step": 10}, 8, marks=pytest.mark.long), ({"saving": 8}, 4)]


@pytest.mark.parametrize(("die", "resumed"), DEATHS)
def test_a_killed_run_resumes_bit_for_bit(die, resumed, uninterrupted, table, tmp_path, monkeypatch):
    config = settings(table, tmp_path / "student")
    assert run(["-c", CHILD], config, **die).returncode == -signal.SIGKILL
    assert not (tmp_path / "student").exists()
    now = time.time
    monkeypatch.setattr(
        time, "time", lambda: now() - 3600
    )  # the clock jumps back, which must not change the order of the curves
    report = train(config)
    assert report.resumed_from == resumed
    assert report.steps_trained == uninterrupted.steps - resumed
    assert_same(tmp_path / "student", uninterrupted.output)
    assert history(tmp_path / "student") == history(uninterrupted.output)
    assert curve(tmp_path / "student", "loss") == curve(uninterrupted.output, "loss")
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_a_second_training_of_a_student_at_the_same_time_is_refused(uninterrupted, table, tmp_path):
    config = settings(table, tmp_path / "student")
    refused = []

    def begin_again(progress):
        if progress.done in (2, 6):
            with pytest.raises(TrainingError, match=f"process {os.getpid()} of ") as error:
                train(config)
            refused.append(error)

    train(config, begin_again)
    assert len(refused) == 2
    assert_same(tmp_path / "student", uninterrupted.output)
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_early_stopping_keeps_the_best_weights(table, tmp_path):
    """At a rate that overfits; also when interrupted after the best evaluation and after a worse one."""
    fast = {
        **{"early_stopping_patience": 2, "num_train_epochs": 8, "eval_steps": 2, "learning_rate": 0.02},
        **{"lr_scheduler_type": "constant", "warmup_ratio": 0},
    }
    last = train(settings(table, tmp_path / "last", optimizer={**fast, "keep": "last"}))
    assert last.steps == last.stopped_at < 30

    best = train(settings(table, tmp_path / "best", optimizer=fast))
    evaluations = [entry for entry in history(best.output) if "eval_kl" in entry]
    lowest = min(evaluations, key=lambda entry: entry["eval_kl"])
    assert (best.steps, best.metrics["eval_kl"]) == (lowest["step"], lowest["eval_kl"])
    assert best.stopped_at == last.stopped_at == best.steps + 4
    assert best.positions < last.positions
    upto = train(
        settings(table, tmp_path / "upto", optimizer={**fast, "early_stopping_patience": None, "max_steps": best.steps})
    )
    assert_same(best.output, upto.output)

    config = settings(table, tmp_path / "resumed", optimizer=fast)
    for step in (best.steps - 1, best.stopped_at - 1):
        with pytest.raises(KeyboardInterrupt):
            train(config, interrupt_at(step))
    resumed = train(config)
    assert resumed.resumed_from >= best.steps
    assert history(resumed.output) == history(best.output)
    assert_same(resumed.output, best.output)


def test_an_unfinished_run_resumes_with_its_version_of_the_table(table, tiny_teacher, tmp_path):
    own = tables.make_table(tmp_path / "table", tiny_teacher, train=8, held_out=0)
    config = settings(own, tmp_path / "student", optimizer={"save_steps": 1})
    with pytest.raises(KeyboardInterrupt):
        train(config, interrupt_at(2))
    _grow(own, tiny_teacher)
    report = train(config)
    assert report.table == f"{own.location}@{own.version}"
    assert report.resumed_from == 1
    assert json.loads((tmp_path / "student" / "softlabel.json").read_text())["table"]["version"] == own.version


def test_other_settings_are_refused_for_an_existing_student(uninterrupted, table, tmp_path):
    with pytest.raises(UsageError) as error:
        train(settings(table, uninterrupted.output, optimizer={"learning_rate": 0.5}, loss={"hard_weight": 1.0}))
    for message in ("optimizer.learning_rate: 0.001 then, 0.5 now", "loss.hard_weight", "choose another output"):
        assert message in str(error.value)

    # A run without a checkpoint does not fix the settings.
    with pytest.raises(KeyboardInterrupt):
        train(settings(table, tmp_path / "student", stream={"seed": 1}), interrupt_at(2))
    unfinished = settings(table, tmp_path / "student")
    with pytest.raises(KeyboardInterrupt):
        train(unfinished, interrupt_at(5))
    with pytest.raises(UsageError, match="unfinished"):
        train(settings(table, tmp_path / "student", stream={"seed": 1}))
    # How often checkpoints are taken may change.
    with pytest.raises(KeyboardInterrupt):
        train(settings(table, tmp_path / "student", optimizer={"save_steps": 1}), interrupt_at(7))
    assert train(unfinished).resumed_from == 6


def test_another_version_of_the_table_is_refused(tiny_teacher, tmp_path):
    own = tables.make_table(tmp_path / "table", tiny_teacher, train=8, held_out=0)
    config = settings(own, tmp_path / "student")
    train(config)
    _grow(own, tiny_teacher)
    with pytest.raises(UsageError, match=f"table: .*@{own.version} then, .*@{own.version + 1} now"):
        train(config)
    pinned = config.model_copy(update={"table": f"{own.location}@{own.version}"})
    assert train(pinned).steps_trained == 0


def test_a_second_run_trains_nothing(uninterrupted, table):
    before = (Path(uninterrupted.output) / "model.safetensors").stat()
    again = train(settings(table, uninterrupted.output, stream={"micro_batch_size": 8}), _fail)
    assert again.steps_trained == 0
    assert (again.steps, again.positions, again.metrics) == (
        uninterrupted.steps,
        uninterrupted.positions,
        uninterrupted.metrics,
    )
    assert (Path(uninterrupted.output) / "model.safetensors").stat() == before


def test_a_folder_with_other_files_is_refused(table, tmp_path):
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "thesis.tex").write_text("")
    with pytest.raises(UsageError, match=r"thesis\.tex"):
        train(settings(table, tmp_path / "student"))
    assert not list(tmp_path.glob("*.training"))


def _fail(progress):
    raise AssertionError("trained")


def _grow(table, teacher):
    """Commit another sequence."""
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    tables.add(Table.open(table.location), [tables._labels(model, 99)], range(99, 100), "train", teacher)


def assert_same(folder, other):
    expected = weights(other)
    for name, tensor in weights(folder).items():
        assert torch.equal(tensor, expected[name]), name
