"""The results of an evaluation stand in the tracker's run of the student's training, each once."""

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from softlabel.pipeline.config.evaluate import EvaluateConfig
from softlabel.pipeline.evaluation.evaluate import evaluate
from softlabel.pipeline.evaluation.report import page
from softlabel.pipeline.students import trackers
from softlabel.pipeline.students.record import RECORD
from softlabel.pipeline.training.train import train
from softlabel.storage.errors import SoftlabelError, UsageError
from tests.pipeline.trainings import curve, settings

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def without_drawings(monkeypatch):
    monkeypatch.setattr(page, "drawings_of", lambda report: {})


@pytest.fixture
def student(uninterrupted, tmp_path):
    """A finished student that was trained with TensorBoard."""
    return Path(shutil.copytree(uninterrupted.output, tmp_path / "student"))


def evaluated(table, *models, report, report_to):
    settings = {"table": table.location, "students": tuple(map(str, models)), "report": str(report), "device": "cpu"}
    return evaluate(EvaluateConfig(**settings, report_to=report_to))


def shown(folder):
    """Steps and values that TensorBoard shows of an evaluation, by name."""
    events = EventAccumulator(str(folder)).Reload()
    names = [name for name in events.Tags()["scalars"] if name.startswith("evaluation/")]
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in names}


def expected(report):
    """Results by name, from report.json."""
    metrics = json.loads(Path(report.json).read_text())["students"][0]["metrics"]
    names = ("cross_entropy", "perplexity", "kl", "reverse_kl", "jsd", "acceptance", "tokens_per_step", "agreement")
    found = {f"evaluation/{name}": metrics[name]["mean"] for name in names}
    found |= {"evaluation/ece": metrics["calibration"]["ece"]["mean"]}
    low, high = metrics["kl"]["interval"]
    return found | {"evaluation/kl_low": low, "evaluation/kl_high": high}


def test_tensorboard_shows_the_results_in_the_run_of_the_training_once(table, student, tmp_path):
    before = curve(student, "loss")
    for _ in range(2):
        report = evaluated(table, student, report=tmp_path / "report", report_to=("tensorboard",))
    found, step = shown(student / "tensorboard"), json.loads((student / RECORD).read_text())["step"]
    for name, value in expected(report).items():
        assert found[name] == [(step, pytest.approx(value, rel=1e-5))], name
    assert curve(student, "loss") == before


def test_a_model_that_was_trained_elsewhere_gets_a_run_of_its_own(table, tiny_teacher, tmp_path):
    files = sorted(path.name for path in tiny_teacher.iterdir())
    report = evaluated(table, tiny_teacher, report=tmp_path / "report", report_to=("tensorboard",))
    found = shown(tmp_path / "report" / "tensorboard" / tiny_teacher.name)
    assert found["evaluation/perplexity"] == [(0, pytest.approx(expected(report)["evaluation/perplexity"], rel=1e-5))]
    assert sorted(path.name for path in tiny_teacher.iterdir()) == files


def test_without_being_asked_nothing_is_written_to_a_student(table, student, tmp_path):
    files = sorted(student.rglob("*"))
    evaluated(table, student, report=tmp_path / "report", report_to=())
    assert sorted(student.rglob("*")) == files


class Service(ModuleType):
    """Stands for the package of a tracker, as far as it is used."""

    def __init__(self, name):
        super().__init__(name)
        self.run, self.got, self.number = None, [], 0

    def begin(self, run_id=None, name=None, **_):
        self.number += 1
        run_id = run_id or f"run-{self.number}"
        self.run = SimpleNamespace(
            id=run_id,
            info=SimpleNamespace(run_id=run_id),
            summary=SimpleNamespace(update=lambda results: self.got.append((run_id, name, results))),
            finish=self.finish,
            name=name,
        )
        return self.run

    def init(self, id=None, name=None, **_):
        return self.begin(id, name)

    def start_run(self, run_id=None, run_name=None):
        outer = self

        class Active:
            def __enter__(self):
                return outer.begin(run_id, run_name)

            def __exit__(self, *_):
                outer.finish()

        return Active()

    def active_run(self):
        return self.run

    def finish(self):
        self.run = None

    def log_metrics(self, results, step):
        self.got.append((self.run.id, self.run.name, results))

    def log(self, results):
        self.got.append((None, self.run.name, results))


@pytest.mark.parametrize(
    "tracker", ["wandb", *(pytest.param(name, marks=pytest.mark.long) for name in ("mlflow", "trackio"))]
)
def test_other_trackers_get_the_results_in_the_run_of_the_training(tracker, table, tmp_path, monkeypatch):
    service = Service(tracker)

    class Tracker(TrainerCallback):
        def on_train_begin(self, args, state, control, **_):
            service.begin(name=args.run_name)

        def on_train_end(self, args, state, control, **_):
            if tracker != "wandb":  # whose run transformers leaves open
                service.finish()

    monkeypatch.setitem(sys.modules, tracker, service)
    monkeypatch.setattr(trackers, "find_spec", lambda name: name)
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, tracker, Tracker)
    for name in ("first", "second"):
        train(settings(table, tmp_path / name, optimizer={"report_to": [tracker], "max_steps": 1}))
        assert service.run is None  # the next training begins its own
    report = evaluated(table, tmp_path / "first", report=tmp_path / "report", report_to=(tracker,))
    [(run_id, name, results)] = service.got
    assert run_id == (None if tracker == "trackio" else "run-1")
    assert name == "first"
    for key, value in expected(report).items():
        assert results[key] == pytest.approx(value), key


def test_a_tracker_that_fails_leaves_a_complete_report(table, student, tmp_path):
    shutil.rmtree(student / "tensorboard")
    (student / "tensorboard").write_text("in the way")
    with pytest.raises(SoftlabelError, match=r"tensorboard did not accept the results(.|\n)*the report is complete"):
        evaluated(table, student, report=tmp_path / "report", report_to=("tensorboard",))
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == ["report.html", "report.json"]


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb", "mlflow", "trackio"])
def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_measured(
    tracker, table, student, tmp_path, monkeypatch
):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=f"^report_to names {tracker}, which is not installed"):
        evaluated(table, student, report=tmp_path / "report", report_to=(tracker,))
    assert not (tmp_path / "report").exists()
