"""``softlabel mix``, and every other verb on a view over tables of two teachers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from softlabel.flows.cli import run
from softlabel.pipeline.capturing.capture import capture
from softlabel.storage.records.versions import pins
from softlabel.storage.table import Table
from softlabel.storage.upkeep.verification import remove_damaged, verify
from tests.flows.commands import shown, softlabel
from tests.pipeline.capturing.test_capture import settings, texts, write

pytestmark = pytest.mark.usefixtures("prefect")

TRAIN = ("--stream.max-length", 128, "--optimizer.max-steps", 2, "--optimizer.device", "cpu")
EVALUATE = ("evaluate", "--cost.no-measure")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Path:
    """Table a of 40 documents, table b of 40 documents by another teacher (30 in common), and two views over them."""
    folder = tmp_path_factory.mktemp("mix")
    other = folder / "other"
    shutil.copytree(tiny_teacher, other)
    weights = load_file(other / "model.safetensors")
    torch.manual_seed(1)
    noisy = {name: weight + 0.3 * weight.std() * torch.randn_like(weight) for name, weight in weights.items()}
    save_file(noisy, other / "model.safetensors", {"format": "pt"})
    capture(settings(tiny_teacher, write(folder / "a.parquet", texts(40)), folder / "a"))
    capture(settings(other, write(folder / "b.parquet", texts(40, 10)), folder / "b"))
    for name in ("average", "concatenate"):
        assert run(["mix", str(folder / name), str(folder / "a"), str(folder / "b"), "--how", name]) == 0
    return folder


def test_a_student_of_averaged_teachers_is_trained_and_evaluated(folder: Path, capsys: pytest.CaptureFixture[str]):
    view, student = folder / "average", folder / "student"
    train = ("train", view, student, "--student.model", folder / "other", *TRAIN)
    code, report, _ = softlabel(capsys, *train)
    assert (code, report["table"], report["steps_trained"]) == (0, f"{view}@0", 2)
    assert softlabel(capsys, *train)[1]["steps_trained"] == 0

    made_of = json.loads((student / "softlabel.json").read_text())["table"]
    assert [(Path(part["location"]).name, part["weight"]) for part in made_of["tables"]] == [("a", 0.5), ("b", 0.5)]
    assert f"a view (average): 0.5 x {folder / 'a'}, version" in (student / "README.md").read_text()

    text = shown(capsys, *EVALUATE, view, student, "--report", folder / "report")
    assert "teacher and other" in text
    assert "the KL is the mean over the teachers" in text
    assert "mean of the KL from each teacher" in (folder / "report" / "report.html").read_text()
    code, evaluated, _ = softlabel(capsys, *EVALUATE, folder / "a", student, "--report", folder / "report-a")
    assert (code, evaluated["kl_kind"]) == (0, "unbiased"), "a table of one of its teachers"
    assert json.loads((folder / "report-a" / "report.json").read_text())["students"][0]["warnings"] == []

    of_one = softlabel(capsys, "train", folder / "a", folder / "of-one", "--student.layers", 0, *TRAIN)
    assert of_one[0] == 0
    code, error, _ = softlabel(capsys, *EVALUATE, view, folder / "of-one", "--report", folder / "none")
    assert (code, error["error"]) == (1, "StudentError")
    assert "another teacher" in error["message"]


def test_a_student_of_concatenated_tables_is_trained_and_evaluated(folder: Path, capsys: pytest.CaptureFixture[str]):
    view = folder / "concatenate"
    code, error, _ = softlabel(capsys, "train", view, folder / "pruned", "--student.layers", 0, *TRAIN)
    assert (code, error["error"]) == (2, "UsageError")
    assert "the table has several teachers" in error["message"]
    teacher = ("--student.layers", 0, "--student.teacher", folder / "other", "--loss.divergence", "reverse_kl")
    assert softlabel(capsys, "train", view, folder / "pruned", *teacher, *TRAIN)[0] == 0
    code, report, _ = softlabel(capsys, *EVALUATE, view, folder / "pruned", "--report", folder / "report-c")
    assert (code, report["kl_kind"]) == (0, "unbiased")
    held_out = softlabel(capsys, "inspect", view)[1]["view"]["splits"]["eval"]
    assert report["sequences"] == held_out["sequences"]


def test_a_view_shows_its_tables_splits_and_dependents(folder: Path, capsys: pytest.CaptureFixture[str]):
    both = softlabel(capsys, "inspect", folder / "concatenate")[1]["view"]["splits"]
    assert sum(split["sequences"] for split in both.values()) == 80
    found = softlabel(capsys, "inspect", folder / "average")[1]["view"]
    assert sum(split["sequences"] for split in found["splits"].values()) == 30
    assert found["left_out"] == 20
    text = shown(capsys, "inspect", folder / "average")
    assert f"0.5 x {folder / 'a'}@" in text
    assert "teacher, head of 1 to " in text
    assert "20 sequences left out" in text
    assert "average" in shown(capsys, "history", folder / "average")
    assert "(version 0) is intact: " in shown(capsys, "verify", folder / "average")
    assert f"view {folder / 'average'}" in shown(capsys, "history", folder / "a")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["capture", "{folder}/a.parquet", "{folder}/average", "--teacher.model", "{teacher}"], "can only be read"),
        (["maintain", "{folder}/average"], "can only be read"),
        (["reprocess", "{folder}/average", "{folder}/new", "--selection.max-k", "4"], "can only be read"),
        (["verify", "{folder}/average", "--remove-damaged"], "can only be read"),
        (["mix", "{folder}/new", "{folder}/average", "{folder}/a"], "can only be read"),
        (["mix", "{folder}/new", "{folder}/a"], "tables\n  expected:    at least 2 values\n"),
        (
            ["mix", "{folder}/new", "{folder}/a", "{folder}/b", "--weights", "1"],
            "give one weight per table; found 2 tables and 1 weights",
        ),
        (["mix", "{folder}/new", "{folder}/a", "{folder}/b", "--weights", "1", "0"], "weights"),
        (
            ["train", "{folder}/average", "{folder}/s", "--student.layers", "0", "--loss.divergence", "jsd"],
            "forward KL",
        ),
    ],
)
def test_wrong_usage_of_a_view_is_refused_and_creates_nothing(
    folder: Path, tiny_teacher: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    before = sorted(folder.glob("*"))
    assert run([part.format(folder=folder, teacher=tiny_teacher) for part in arguments]) == 2
    assert message in capsys.readouterr().err
    assert sorted(folder.glob("*")) == before


def test_a_vacuum_keeps_the_shards_that_a_view_needs(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The newest version of a table loses a shard, but the view's version keeps it as long as the view is pinned."""
    for name in ("a", "b"):
        shutil.copytree(folder / name, tmp_path / name)
    view, table = tmp_path / "view", str(tmp_path / "a")
    assert softlabel(capsys, "mix", view, table, tmp_path / "b")[0] == 0
    damaged = Table.open(table).shards()[0]
    content = (tmp_path / "a" / damaged.path).read_bytes()
    (tmp_path / "a" / damaged.path).write_bytes(b"x" * damaged.bytes)
    code, error, _ = softlabel(capsys, "verify", view)
    assert (code, error["error"]) == (1, "IntegrityError")
    assert f"softlabel verify {table} --remove-damaged" in error["message"]
    remove_damaged(verify(Table.open(table)))
    (tmp_path / "a" / damaged.path).write_bytes(content)

    vacuum = ("maintain", table, "--vacuum", "--keep-versions", 1, "--grace-hours", 0)
    for pin in pins(table):
        if pin.student != str(view):
            assert softlabel(capsys, "maintain", table, "--unpin", pin.student)[0] == 0
    assert damaged.path not in {gone["path"] for gone in softlabel(capsys, *vacuum)[1]["deletion"]["deleted"]}
    assert softlabel(capsys, "verify", view)[0] == 0
    assert softlabel(capsys, "maintain", table, "--unpin", view)[0] == 0
    assert damaged.path in {gone["path"] for gone in softlabel(capsys, *vacuum)[1]["deletion"]["deleted"]}
    code, error, _ = softlabel(capsys, "inspect", view)
    assert (code, error["error"]) == (1, "TableNotFoundError")
    assert "was vacuumed" in error["message"]
