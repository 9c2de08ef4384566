"""Trackers show the curves of a training if they are asked for, and each point once."""

from pathlib import Path

import pytest
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from softlabel.pipeline.config.distill import DistillConfig
from softlabel.pipeline.distillation import distill
from softlabel.pipeline.students import trackers
from softlabel.pipeline.training.train import train
from softlabel.storage.errors import UsageError
from tests.pipeline.trainings import curve, history, interrupt_at, settings

pytestmark = pytest.mark.usefixtures("one_thread")
TENSORBOARD, NOTHING = {"report_to": ["tensorboard"]}, {"report_to": []}


def test_without_trackers_only_the_record_has_the_curves(uninterrupted, table, tmp_path):
    train(settings(table, tmp_path / "student", optimizer=NOTHING))
    assert history(tmp_path / "student") == history(uninterrupted.output)
    assert not list(tmp_path.rglob("*tfevents*"))


@pytest.mark.parametrize(("first", "then"), [(NOTHING, TENSORBOARD), (TENSORBOARD, NOTHING)])
def test_the_curves_of_a_resumed_run_are_complete_or_left_out(first, then, uninterrupted, table, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(settings(table, tmp_path / "student", optimizer=first), interrupt_at(6))
    assert train(settings(table, tmp_path / "student", optimizer=then)).resumed_from == 4
    assert bool(list(tmp_path.rglob("*tfevents*"))) == (then == TENSORBOARD)
    for name in ("loss", "learning_rate") if then == TENSORBOARD else ():
        assert curve(tmp_path / "student", name) == curve(uninterrupted.output, name)


def test_curves_of_a_run_that_was_interrupted_twice_have_no_point_twice(uninterrupted, table, tmp_path):
    for step in (6, 7, 10):  # after the checkpoints of steps 4, 4 and 8
        with pytest.raises(KeyboardInterrupt):
            train(settings(table, tmp_path / "student"), interrupt_at(step))
        drawn = [point[0] for point in curve(tmp_path / "student.training" / "scratch", "loss")]
        assert drawn == list(range(1, step))
    train(settings(table, tmp_path / "student"))
    assert curve(tmp_path / "student", "loss") == curve(uninterrupted.output, "loss")


@pytest.mark.parametrize("tracker", ["wandb", "mlflow", "trackio"])
def test_another_tracker_gets_the_curves_under_the_students_name(tracker, table, tmp_path, monkeypatch):
    seen = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            seen.append((args.run_name, state.global_step, logs.get("loss")))

    monkeypatch.setattr(trackers, "find_spec", lambda name: name)
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, tracker, Tracker)
    train(settings(table, tmp_path / "student", optimizer={"report_to": [tracker], "max_steps": 2}))
    losses = [(entry["step"], entry["loss"]) for entry in history(tmp_path / "student") if "loss" in entry]
    assert len(losses) == 2
    assert [(step, loss) for name, step, loss in seen if loss] == losses
    assert {name for name, *_ in seen} == {"student"}


@pytest.mark.parametrize(
    ("tracker", "install"),
    [("tensorboard", r"'softlabel\[tensorboard\]'"), ("wandb", "wandb"), ("mlflow", "mlflow"), ("trackio", "trackio")],
)
def test_a_tracker_that_is_not_installed_is_refused_before_anything_runs(
    tracker, install, table, tiny_teacher, documents, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    message = f"optimizer.report_to names {tracker}, which is not installed[^$]*pip install {install}, or leave out"
    asked = {"report_to": [tracker]}
    with pytest.raises(UsageError, match=message):
        train(settings(table, tmp_path / "student", optimizer=asked))
    whole = {"documents": str(documents), "table": str(tmp_path / "table"), "output": str(tmp_path / "runs")}
    with pytest.raises(UsageError, match=message):
        distill(DistillConfig(**whole, teacher={"model": str(tiny_teacher)}, student={"depth": 1}, optimizer=asked))
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == []
