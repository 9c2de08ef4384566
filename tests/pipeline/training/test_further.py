"""A finished student that gets more steps or epochs goes on from where it ended; its record lists both runs."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from softlabel.pipeline.config.evaluate import EvaluateConfig
from softlabel.pipeline.config.train import TrainConfig
from softlabel.pipeline.evaluation.evaluate import evaluate
from softlabel.pipeline.students.folder import StudentFolder
from softlabel.pipeline.training.train import train
from softlabel.storage.errors import StudentError, UsageError
from softlabel.storage.table import Table
from tests.crashes import Tree, recorded
from tests.pipeline.trainings import history, interrupt_at, settings, weights

pytestmark = pytest.mark.usefixtures("one_thread")
STEADY = {"lr_scheduler_type": "constant", "warmup_ratio": 0.0, "keep": "last"}


def asking(table: Table, output: Path, steps: int | None, **optimizer: object) -> TrainConfig:
    return settings(table, output, optimizer={"max_steps": steps, "save_steps": 4, "eval_steps": 3, **optimizer})


def copied(student: Path, folder: Path) -> Path:
    """A copy of a finished student with the same name in another folder."""
    return shutil.copytree(student, folder / student.name)


def assert_same(folder: Path, other: Path) -> None:
    found, expected = weights(folder), weights(other)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert history(folder) == history(other)


def rates(folder: Path) -> list[float]:
    return [entry["learning_rate"] for entry in history(folder) if "learning_rate" in entry]


@pytest.fixture(scope="module")
def finished(table: Table, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of 6 steps."""
    return Path(train(asking(table, tmp_path_factory.mktemp("finished") / "student", 6)).output)


@pytest.fixture(scope="module")
def further(finished: Path, table: Table, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same student, which then took 8 more."""
    student = copied(finished, tmp_path_factory.mktemp("further"))
    report = train(asking(table, student, 14))
    assert (report.steps, report.steps_trained, report.resumed_from) == (14, 8, 6)
    return student


def test_at_a_constant_rate_a_training_in_two_runs_equals_one_in_a_single_run(table: Table, tmp_path: Path):
    train(asking(table, tmp_path / "student", 6, **STEADY))
    report = train(asking(table, tmp_path / "student", 14, **STEADY))
    whole = train(asking(table, tmp_path / "whole", 14, **STEADY))
    assert (report.positions, report.metrics) == (whole.positions, whole.metrics)
    found, expected = weights(tmp_path / "student"), weights(tmp_path / "whole")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    losses = [[e["loss"] for e in history(tmp_path / name) if "loss" in e] for name in ("student", "whole")]
    assert losses[0] == losses[1]


def test_the_further_run_has_a_schedule_of_its_own(table: Table, finished: Path, further: Path):
    """Cosine: it falls to almost 0 over each run, and begins each with its warmup."""
    assert rates(further)[:6] == rates(finished)
    assert rates(further)[5] < 1e-4 < 9e-4 < max(rates(further)[6:])
    assert rates(further)[-1] < 1e-4
    slow = [0.5 * (1 + math.cos(math.pi * step / 8)) * 1e-3 for step in range(1, 9)]
    assert rates(further)[6:] == pytest.approx(slow, abs=2e-4)


def test_record_report_and_model_card_show_both_runs(table: Table, further: Path, tmp_path: Path):
    record = json.loads((further / "softlabel.json").read_text())
    assert [(run["first_step"], run["last_step"], run["max_steps"]) for run in record["runs"]] == [
        (1, 6, 6),
        (7, 14, 14),
    ]
    assert record["config"]["optimizer"]["max_steps"] == 14
    steps = [entry["step"] for entry in record["history"] if "loss" in entry]
    assert steps == list(range(1, 15))
    assert "steps 1 to 6, then steps 7 to 14" in (further / "README.md").read_text()
    report = evaluate(
        EvaluateConfig(table=table.location, students=(str(further),), report=str(tmp_path), device="cpu")
    )
    assert "steps 7 to 14" in Path(report.html).read_text()
    assert json.loads(Path(report.json).read_text())["students"][0]["runs"] == ["steps 1 to 6", "steps 7 to 14"]


def test_only_the_newest_state_is_kept_and_out_of_the_way(further: Path):
    assert [path.name for path in (further / "training-state").iterdir()] == ["checkpoint-14"]
    assert [path.name for path in further.glob("*.safetensors")] == ["model.safetensors"]
    assert not list(further.glob("*.pt*"))
    assert [path.name for path in further.parent.iterdir()] == ["student"]


def test_epochs_take_a_student_further_too(table: Table, tmp_path: Path):
    one = train(asking(table, tmp_path / "student", None, num_train_epochs=1))
    two = train(asking(table, tmp_path / "student", None, num_train_epochs=2.5))
    assert (two.resumed_from, two.positions) == (one.steps, pytest.approx(2.5 * one.positions, rel=0.2))
    three = train(asking(table, tmp_path / "student", two.steps + 1, num_train_epochs=2.5))
    assert (three.steps, three.steps_trained) == (two.steps + 1, 1)
    assert len(json.loads((tmp_path / "student" / "softlabel.json").read_text())["runs"]) == 3


@pytest.mark.parametrize("stop", [9, *(pytest.param(stop, marks=pytest.mark.long) for stop in (7, 13))])
def test_an_interrupted_further_run_ends_with_the_same_student(stop, table, finished, further, tmp_path):
    """Before its first checkpoint, it begins again from the finished student, which stays usable all the time."""
    student = copied(finished, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        train(asking(table, student, 14), interrupt_at(stop))
    assert_same(student, finished)
    assert train(asking(table, student, 6)).steps_trained == 0  # which does not harm the unfinished run
    if stop > 8:  # before the first checkpoint, nothing fixes the settings
        with pytest.raises(UsageError, match=r"(?s)unfinished.*optimizer\.max_steps: 14 then, 20 now"):
            train(asking(table, student, 20))
    report = train(asking(table, student, 14))
    assert report.resumed_from == {7: 6, 9: 8, 13: 12}[stop]
    assert_same(student, further)
    assert (student / "softlabel.json").read_text().replace(str(student), "") == (
        further / "softlabel.json"
    ).read_text().replace(str(further), "")
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


@pytest.mark.parametrize(
    ("steps", "optimizer", "named"),
    [
        (5, {}, r"optimizer\.max_steps: 6 then, 5 now"),
        (6, {"num_train_epochs": 9}, r"optimizer\.num_train_epochs: 3\.0 then, 9\.0 now"),
        (
            14,
            {"learning_rate": 0.5},
            r"(?s)optimizer\.max_steps: 6 then, 14 now.*|optimizer\.learning_rate: .*0\.5 now",
        ),
        (14, {"warmup_ratio": 0.5}, r"optimizer\.warmup_ratio: 0\.05 then, 0\.5 now"),
        (14, {"keep": "best"}, r"optimizer\.keep: auto then, best now"),
        (None, {"num_train_epochs": 0.5}, "more than 6 steps"),
    ],
)
def test_fewer_steps_and_any_other_change_are_refused(steps, optimizer, named, table, finished, tmp_path):
    student = copied(finished, tmp_path)
    with pytest.raises(UsageError, match=named):
        train(asking(table, student, steps, **optimizer))
    assert_same(student, finished)


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("harm", "found"),
    [
        (lambda state: shutil.rmtree(state), "no checkpoint"),
        (lambda state: shutil.rmtree(state / "checkpoint-6"), "no checkpoint"),
        (lambda state: (state / "checkpoint-6" / "optimizer.pt").unlink(), "optimizer.pt is missing"),
        (lambda state: damage(state / "checkpoint-6" / "model.safetensors"), "bytes instead of"),
    ],
)
def test_without_its_state_a_student_is_not_trained_further_and_the_error_says_what_to_do(
    harm, found, table, finished, tmp_path
):
    student = copied(finished, tmp_path)
    harm(student / "training-state")
    with pytest.raises(StudentError, match=rf"(?s)can't be trained further.*{found}.*student\.model"):
        train(asking(table, student, 14))
    assert train(asking(table, student, 6)).steps_trained == 0
    assert_same(student, finished)


def test_the_best_weights_of_both_runs_are_kept_and_patience_begins_anew(table: Table, tmp_path: Path):
    """The second run overfits: the student keeps the weights of the first, and stops when its own patience is over."""
    fast = {"learning_rate": 0.02, "eval_steps": 1, "early_stopping_patience": 2, **STEADY, "keep": "best"}
    first = train(asking(table, tmp_path / "student", 40, **fast))
    assert first.steps == first.stopped_at - 2 < 38
    second = train(asking(table, tmp_path / "student", 80, **fast))
    assert second.resumed_from == first.stopped_at
    lowest = min((e for e in history(tmp_path / "student") if "eval_kl" in e), key=lambda e: e["eval_kl"])
    assert second.steps == lowest["step"]
    assert second.stopped_at == max(second.steps, first.stopped_at) + 2
    assert second.metrics["eval_kl"] == lowest["eval_kl"]
    kept = sorted(path.name for path in (tmp_path / "student" / "training-state").iterdir())
    assert kept == [f"best-{second.steps}", f"checkpoint-{second.stopped_at}"]


def test_the_weights_of_the_loss_stay_at_their_end_values(table: Table, tmp_path: Path):
    loss = {"hard_weight": 0.5, "hard_weight_end": 0.0, "soft_weight_end": 2.0}
    for steps in (3, 5):
        config = asking(table, tmp_path / "student", steps)
        train(config.model_copy(update={"loss": config.loss.model_validate(loss)}))
    entries = [entry for entry in history(tmp_path / "student") if "loss" in entry]
    for entry, hard, soft in zip(entries, (0.5, 0.25, 0, 0, 0), (1, 1.5, 2, 2, 2), strict=True):
        assert entry["loss"] == pytest.approx(hard * entry["hard"] + soft * entry["soft"], rel=1e-5)


def test_a_power_cut_at_any_moment_leaves_the_student_before_or_after(table, finished, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    copied(finished, disk)
    with recorded(disk) as recording:
        train(asking(table, disk / "student", 8, save_steps=50))
    before, after = (
        {entry for entry in tree if entry[0].startswith("student/")}
        for tree in (recording.moments[0][0], recording.moments[-1][0])
    )
    assert before != after
    seen: dict[Tree, bool] = {}

    def is_new(tree: Tree) -> bool:
        """Whether the next training finds the new student; otherwise, it has to find the one before, whole."""
        concerned = frozenset(entry for entry in tree if concerns(entry[0]))
        if concerned not in seen:
            folder = recording.rebuild(concerned, tmp_path / str(len(seen)))
            StudentFolder(folder / "student").recover()
            record = StudentFolder(folder / "student").finished()
            assert record is not None
            expected = dict(after if record.last_step == 8 else before)
            found = {str(path.relative_to(folder)): path for path in (folder / "student").rglob("*")}
            assert found.keys() == expected.keys()
            for name, path in found.items():
                assert path.is_dir() or recording.is_content(expected[name], path.read_bytes())
            seen[concerned] = record.last_step == 8
        return seen[concerned]

    newest = [is_new(live) for live, _ in recording.moments]
    assert newest == sorted(newest)
    for _, cuts in recording.moments:
        assert {is_new(cut) for cut in cuts} <= {False, True}
    assert {is_new(cut) for cut in recording.moments[-1][1]} == {True}


def concerns(name: str) -> bool:
    """Whether a file decides which student is in place."""
    return name in ("student", "student.training") or name.startswith(("student/", "student.training/student"))


@pytest.mark.parametrize("damaged", [("checkpoint-12",), ("checkpoint-12", "checkpoint-8")])
def test_a_damaged_checkpoint_of_the_further_run_is_skipped_with_a_warning(damaged, table, finished, further, tmp_path):
    student = copied(finished, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        train(asking(table, student, 14), interrupt_at(13))
    for name in damaged:
        damage(tmp_path / "student.training" / name / "optimizer.pt")
    left = "checkpoint-8" if len(damaged) == 1 else "step 6"
    with pytest.warns(UserWarning, match=rf"checkpoint-12 is damaged(.|\n)*continues from {left}"):
        assert train(asking(table, student, 14)).resumed_from == (8 if len(damaged) == 1 else 6)
    assert_same(student, further)


def test_adapters_are_trained_further(table: Table, tmp_path: Path):
    for name, steps in (("whole", (7,)), ("student", (3, 7))):
        for number in steps:
            config = asking(table, tmp_path / name, number, **STEADY)
            train(config.model_copy(update={"student": config.student.model_copy(update={"lora_r": 2})}))
    found, expected = weights(tmp_path / "student"), weights(tmp_path / "whole")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.long
@pytest.mark.parametrize("sharding", ["none", "full"])
def test_several_processes_take_a_student_further(sharding: str, table: Table, tmp_path: Path):
    """Also one that a single process has trained; the order of the data does not depend on the processes."""
    several = {"processes": 2, "sharding": sharding, **STEADY}
    train(asking(table, tmp_path / "student", 4, **STEADY))
    assert train(asking(table, tmp_path / "student", 9, **several)).resumed_from == 4
    with pytest.raises(KeyboardInterrupt):
        train(asking(table, tmp_path / "student", 14, **several), interrupt_at(13))
    assert train(asking(table, tmp_path / "student", 14, **several)).resumed_from == 12
    train(asking(table, tmp_path / "whole", 14, **STEADY))
    found, expected = ([e["loss"] for e in history(tmp_path / n) if "loss" in e] for n in ("student", "whole"))
    assert found == pytest.approx(expected, rel=1e-3)
