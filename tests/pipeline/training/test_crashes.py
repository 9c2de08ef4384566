"""After a power cut at any moment, or with a damaged checkpoint, training goes on and gives the same student."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from softlabel.pipeline.config.train import TrainConfig
from softlabel.pipeline.students.folder import StudentFolder, step_of
from softlabel.pipeline.training.train import train
from softlabel.storage.table import Table
from tests.crashes import recorded
from tests.pipeline.trainings import curve, interrupt_at, settings, weights

pytestmark = pytest.mark.usefixtures("one_thread")
KEEPING = {"keep": "best", "save_steps": 4, "eval_steps": 2, "max_steps": 11}


def keeping_best(table: Table, output: Path) -> TrainConfig:
    return settings(table, output, optimizer=KEEPING)


@pytest.fixture(scope="module")
def whole(table: Table, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student that was trained in one go."""
    return Path(train(keeping_best(table, tmp_path_factory.mktemp("whole") / "student")).output)


@pytest.fixture(scope="module")
def interrupted(table: Table, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of its run, which was interrupted after the checkpoints of steps 4 and 8."""
    output = tmp_path_factory.mktemp("interrupted") / "student"
    with pytest.raises(KeyboardInterrupt):
        train(keeping_best(table, output), interrupt_at(9))
    return output.with_name("student.training")


def assert_same(folder: Path, other: Path) -> None:
    found, expected = weights(folder), weights(other)
    assert found.keys() == expected.keys()
    assert all((found[name] == expected[name]).all() for name in found)
    assert curve(folder, "loss") == curve(other, "loss")
    records = [json.loads((each / "softlabel.json").read_text()) for each in (folder, other)]
    assert records[0]["history"] == records[1]["history"]


def test_a_power_cut_at_any_moment_leaves_the_last_checkpoint_or_the_student(table: Table, whole: Path, tmp_path: Path):
    disk = tmp_path / "disk"
    disk.mkdir()
    with recorded(disk) as recording:
        train(keeping_best(table, disk / "new" / "student"))
    complete = {name: content for name, content in recording.moments[-1][0] if name.startswith("new/student/")}
    seen = {}

    def progress(tree):
        """Steps that are not lost; the student is finished after the last."""
        if tree not in seen:
            student = StudentFolder(recording.rebuild(tree, tmp_path / str(len(seen))) / "new" / "student")
            if student.finished():
                assert {n: c for n, c in tree if n.startswith("new/student/")} == complete
                seen[tree] = 11
            else:
                seen[tree] = step_of(student.checkpoint) if student.checkpoint else 0
            shutil.rmtree(tmp_path / str(list(seen).index(tree)))
        return seen[tree]

    steps, done, before = [0], 0, 0
    for live, cuts in recording.moments:
        if progress(live) != done:
            before, done = done, progress(live)
            steps.append(done)
        assert {progress(cut) for cut in cuts} <= {before, done}
    assert steps == [0, 4, 8, 11]
    assert {progress(cut) for cut in recording.moments[-1][1]} == {11}
    assert_same(disk / "new" / "student", whole)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def unlink(path: Path) -> None:
    path.unlink()


DAMAGES = [
    ("model.safetensors", cut_off),
    ("model.safetensors", flip),
    ("optimizer.pt", empty),
    ("optimizer.pt", zero),
    ("scheduler.pt", flip),
    ("trainer_state.json", flip),
    ("rng_state.pth", unlink),
    ("run.json", cut_off),
    ("run.json", flip),
    ("manifest.json", cut_off),
    ("manifest.json", zero),
    ("*", empty),
    ("*", unlink),
]


@pytest.mark.parametrize(("files", "damage"), DAMAGES)
def test_a_damaged_checkpoint_is_skipped(files: str, damage: Callable[[Path], None], interrupted: Path, tmp_path: Path):
    run = shutil.copytree(interrupted, tmp_path / "student.training")
    assert StudentFolder(tmp_path / "student").checkpoint == run / "checkpoint-8"
    for path in list((run / "checkpoint-8").glob(files)):
        damage(path)
    student = StudentFolder(tmp_path / "student")
    assert student.checkpoint == run / "checkpoint-4"
    with pytest.warns(UserWarning, match=r"checkpoint-8 is damaged or incomplete(.|\n)*continues from checkpoint-4"):
        student.clear()
    assert not (run / "checkpoint-8").exists()


def test_a_checkpoint_whose_best_weights_are_damaged_is_skipped(interrupted: Path, tmp_path: Path):
    run = shutil.copytree(interrupted, tmp_path / "student.training")
    newest = max(run.glob("best-*"), key=lambda folder: int(folder.name.removeprefix("best-")))
    assert len(list(run.glob("best-*"))) > 1
    flip(newest / "model.safetensors")
    assert StudentFolder(tmp_path / "student").checkpoint == run / "checkpoint-4"


@pytest.mark.parametrize(
    ("damaged", "resumed"), [(("checkpoint-8",), 4), (("checkpoint-8", "checkpoint-4"), None)], ids=["one", "all"]
)
def test_a_run_with_damaged_checkpoints_ends_with_the_same_student(
    damaged: tuple[str, ...], resumed: int | None, interrupted: Path, whole: Path, table: Table, tmp_path: Path
):
    run = shutil.copytree(interrupted, tmp_path / "student.training")
    for name in damaged:
        cut_off(run / name / "optimizer.pt")
    with pytest.warns(UserWarning, match="optimizer.pt has"):
        report = train(keeping_best(table, tmp_path / "student"))
    assert report.resumed_from == resumed
    assert_same(tmp_path / "student", whole)


@pytest.mark.parametrize(
    ("damage", "resumed"), [(None, 8), (("optimizer.pt", flip), 4), (("rng_state.pth", cut_off), 4), (("*", empty), 4)]
)
def test_checkpoints_without_a_manifest_are_taken_up_unless_they_are_torn(damage, resumed, interrupted, tmp_path):
    """As they were written by earlier versions."""
    run = shutil.copytree(interrupted, tmp_path / "student.training")
    for manifest in run.glob("*/manifest.json"):
        manifest.unlink()
    if damage:
        files, destroy = damage
        for path in list((run / "checkpoint-8").glob(files)):
            destroy(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert StudentFolder(tmp_path / "student").checkpoint == run / f"checkpoint-{resumed}"
