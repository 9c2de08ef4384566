"""A dry run says what a verb would do, writes nothing at all, starts no server, and refuses what the verb refuses."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from softlabel.flows.cli import app, run
from softlabel.flows.running import runner, server
from softlabel.pipeline.capturing.capture import capture
from softlabel.pipeline.config.base import Settings
from softlabel.pipeline.config.capture import CaptureConfig
from softlabel.pipeline.config.distill import DistillConfig
from softlabel.pipeline.config.evaluate import EvaluateConfig
from softlabel.pipeline.config.export import ExportConfig
from softlabel.pipeline.config.tables import MaintainConfig, MixConfig, ReprocessConfig, VerifyConfig
from softlabel.pipeline.distillation import distill
from softlabel.pipeline.dry_run import dry_run
from softlabel.pipeline.evaluation.evaluate import evaluate
from softlabel.pipeline.exclusive import lock_output
from softlabel.pipeline.tables.export import export
from softlabel.pipeline.tables.maintain import maintain
from softlabel.pipeline.tables.mix import mix
from softlabel.pipeline.tables.reprocess import reprocess
from softlabel.pipeline.tables.verify import verify
from softlabel.pipeline.training.train import train
from softlabel.storage.errors import SoftlabelError, TrainingError
from softlabel.storage.records.versions import tag
from softlabel.storage.table import Table
from tests.conftest import ROOT
from tests.flows.commands import softlabel
from tests.pipeline.capturing.test_capture import settings, texts, write
from tests.pipeline.trainings import settings as training

READING = {"estimate", "inspect", "history", "lineage", "rejects"}
"""Verbs that write nothing, and so have no dry run."""
SHORT: dict[str, Any] = {"stream": {"max_length": 128}, "optimizer": {"max_steps": 2, "report_to": []}}


@pytest.fixture(scope="module")
def original(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a table of several versions, documents that it lacks, a table made from it, and a student."""
    folder = tmp_path_factory.mktemp("dry")
    documents = texts(40)
    capture(settings(tiny_teacher, write(folder / "d.parquet", dict(list(documents.items())[:20])), folder / "table"))
    capture(settings(tiny_teacher, write(folder / "d.parquet", dict(list(documents.items())[:30])), folder / "table"))
    documents["a copy"] = next(iter(documents.values()))
    write(folder / "d.parquet", documents | {"empty": ""})
    reprocess(ReprocessConfig(source=str(folder / "table"), destination=str(folder / "small"), selection={"max_k": 4}))
    train(training(Table.open(str(folder / "table")), folder / "student", **SHORT))
    (folder / "ids.txt").write_text("\n".join(list(documents)[:3]))
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder, inside one that also has the home folder and Prefect's; no server may start."""
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    monkeypatch.setattr(server, "start", None)
    monkeypatch.setattr(runner, "_run_flow", None)
    return Path(shutil.copytree(original, tmp_path / "work", copy_function=shutil.copy2))


def snapshot(root: Path) -> dict[str, tuple[int, bytes]]:
    """Each file and folder below a folder, with its time of change and its content."""
    found = {}
    for path in sorted(root.rglob("*")):
        content = b"" if path.is_dir() else path.read_bytes()
        found[str(path.relative_to(root))] = (path.stat().st_mtime_ns, content)
    return found


def damage(folder: Path) -> None:
    shard = folder / "table" / Table.open(str(folder / "table")).shards()[0].path
    shard.write_bytes(b"x" + shard.read_bytes()[1:])


def leave_behind(folder: Path) -> None:
    (folder / "table" / "split=train" / f"{'0' * 32}.parquet").write_bytes(b"x" * 100)


COMMANDS: dict[str, tuple[list[str], Callable[[Path], object]]] = {
    "capture": (["capture", "{}/d.parquet", "{}/table"], lambda _: None),
    "capture anew": (
        ["capture", "{}/d.parquet", "{}/new", "--teacher.model", "TEACHER", "--sequences.max-tokens", "128"],
        lambda _: None,
    ),
    "train": (["train", "{}/table", "{}/new", "--student.layers", "1", "--optimizer.device", "cpu"], lambda _: None),
    "train further": (["train", "{}/table", "{}/student", "--optimizer.max-steps", "5"], lambda _: None),
    "evaluate": (["evaluate", "{}/table", "{}/student", "--report", "{}/report"], lambda _: None),
    "distill": (
        [
            "distill",
            "--documents",
            "{}/d.parquet",
            "--table",
            "{}/table",
            "--output",
            "{}/runs",
            "--student.depth",
            "1",
        ],
        lambda _: None,
    ),
    "reprocess": (["reprocess", "{}/table", "--selection.max-k", "3", "--where", "tokens > 30"], lambda _: None),
    "reprocess anew": (["reprocess", "{}/table", "{}/new", "--compact"], lambda _: None),
    "purge": (["reprocess", "{}/table", "--purge", "{}/ids.txt"], lambda _: None),
    "mix": (["mix", "{}/view", "{}/table", "{}/small"], lambda _: None),
    "maintain": (["maintain", "{}/table", "--vacuum", "--keep-versions", "1", "--grace-hours", "0"], leave_behind),
    "tag": (["maintain", "{}/table", "--tag", "gold"], lambda _: None),
    "untag and unpin": (
        ["maintain", "{}/table", "--untag", "old", "--unpin", "{}/student"],
        lambda f: tag(f"{f}/table", 1, "old"),
    ),
    "compare": (["compare", "{}/student", "--report", "{}/report", "--table", "{}/table"], lambda _: None),
    "export": (["export", "{}/table", "{}/exported", "--format", "axolotl"], lambda _: None),
    "show": (["show", "{}/table", "--html", "{}/page.html"], lambda _: None),
    "verify": (["verify", "{}/table", "--remove-damaged"], damage),
}


def test_every_verb_has_a_dry_run_unless_it_only_reads():
    verbs = {name for name in app if not name.startswith("-")}
    assert verbs - READING == {command[0] for command, _ in COMMANDS.values()} | {"deploy"}
    for verb in verbs:
        assert ("--dry-run" in {name for part in app[verb].assemble_argument_collection() for name in part.names}) == (
            verb not in READING
        )


SLOW = ("distill", "capture anew")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] if name in SLOW else []) for name in COMMANDS]
)
def test_a_dry_run_writes_nothing_and_starts_no_server(
    name: str, folder: Path, tiny_teacher: Path, capsys: pytest.CaptureFixture[str]
):
    command, prepare = COMMANDS[name]
    prepare(folder)
    arguments = [part.format(folder).replace("TEACHER", str(tiny_teacher)) for part in command]
    arguments = [part if "unpin" not in name or part != f"{folder}/student" else pinned(folder) for part in arguments]
    before = snapshot(folder.parent)
    code, report, _ = softlabel(capsys, *arguments, "--dry-run")
    assert (code, report["dry_run"]) == (0, True)
    assert run([*arguments, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "would" in shown or "dry run" in shown
    assert snapshot(folder.parent) == before


def pinned(folder: Path) -> str:
    """The student that the copied table names: that of the original folder."""
    from softlabel.storage.records.versions import pins

    return pins(str(folder / "table"))[0].student


def figures(report: object, *names: str) -> dict[str, Any]:
    return {name: getattr(report, name) for name in names}


CAPTURED = ("documents", "unchanged", "rejects", "repeated", "truncated", "sequences", "copied", "positions", "answers")


@pytest.mark.parametrize("table", ["table", "new"])
def test_a_capture_adds_what_its_dry_run_says(folder: Path, tiny_teacher: Path, table: str):
    config = settings(tiny_teacher, folder / "d.parquet", folder / table)
    would, did = dry_run(config), capture(config)
    assert figures(would, *CAPTURED) == figures(did, *CAPTURED)
    assert did.sequences > 9
    assert did.copied == 1
    assert would.bytes == pytest.approx(did.bytes, rel=0.3)
    assert 0 < would.seconds < 60
    again = dry_run(config)
    assert (again.sequences, again.copied, again.bytes) == (0, 0, None)


REWRITES: dict[str, dict[str, Any]] = {
    "narrow": {"selection": {"max_k": 3}},
    "filter": {"where": "tokens > 30"},
    "drop": {"drop": "ids.txt"},
    "split": {"shards": {"eval_fraction": 0.5}},
    "compact": {"compact": True},
    "elsewhere": {"destination": "new", "where": "tokens > 30"},
    "into another": {"destination": "small", "selection": {"max_k": 4}},
    "nothing to do": {"where": "tokens > 0"},
}


@pytest.mark.parametrize("name", REWRITES)
def test_a_reprocessing_does_what_its_dry_run_says(folder: Path, name: str):
    changes = {
        key: str(folder / value) if key in ("drop", "destination") else value for key, value in REWRITES[name].items()
    }
    config = ReprocessConfig(source=str(folder / "table"), **changes)
    would, did = dry_run(config), reprocess(config)
    same = ("source", "table", "version", "operation", "unknown")
    assert figures(would, *same) == figures(did, *same)
    counts = ("version", "sequences", "left", "dropped", "dropped_positions", "positions", "shards", "replaced")
    assert figures(would.rows, *counts) == figures(did.rows, *counts)
    assert (did.rows.sequences > 0) == (name not in ("nothing to do", "into another"))


def test_a_take_down_deletes_what_its_dry_run_says(folder: Path):
    tag(str(folder / "table"), 1, "old")
    config = ReprocessConfig(source=str(folder / "table"), purge=str(folder / "ids.txt"))
    would, did = dry_run(config), reprocess(config)
    assert would.purged == did.purged
    assert did.purged is not None
    assert did.purged.found == 3
    assert did.purged.broken
    assert figures(would.rows, "version", "dropped", "left") == figures(did.rows, "version", "dropped", "left")
    again = dry_run(config)
    assert (again.rows.version, again.purged.files, again.purged.versions) == (did.version, (), did.purged.versions)


@pytest.mark.parametrize("tags", [{}, {"tag": "gold=2"}, {"untag": "old"}])
def test_maintenance_deletes_what_its_dry_run_says(folder: Path, tags: dict[str, str]):
    """A tag that the same command sets protects a version, and one that it removes does not."""
    table = str(folder / "table")
    reprocess(ReprocessConfig(source=table, selection={"max_k": 3}))
    maintain(MaintainConfig(table=table, unpin=pinned(folder)))
    tag(table, 1, "old")
    leave_behind(folder)
    config = MaintainConfig(table=table, vacuum=True, keep_versions=1, grace_hours=0, **tags)
    would, did = dry_run(config), maintain(config)
    assert did.deletion is not None
    assert figures(would.deletion, "deleted", "spared", "vacuumed", "bytes") == figures(
        did.deletion, "deleted", "spared", "vacuumed", "bytes"
    )
    assert did.deletion.vacuumed == {"untag": (1, 2), "tag": ()}.get("".join(tags), (2,))
    assert [(each.name, each.version) for each in would.tags] == [(each.name, each.version) for each in did.tags]
    assert would.pins == did.pins


def test_an_export_has_the_rows_that_its_dry_run_says(folder: Path):
    config = ExportConfig(table=str(folder / "table"), output=str(folder / "exported"), where="tokens > 30")
    would, did = dry_run(config), export(config)
    counts = [{name: (s.sequences, s.positions) for name, s in each.splits.items()} for each in (would, did)]
    assert counts[0] == counts[1] != {}


def test_a_view_holds_what_its_dry_run_says(folder: Path):
    config = MixConfig(view=str(folder / "view"), tables=(str(folder / "table"), str(folder / "small")), weights=(2, 1))
    would, did = dry_run(config), mix(config)
    assert figures(would, "parts", "splits", "how", "left_out") == figures(did, "parts", "splits", "how", "left_out")
    assert (would.exists, did.exists, dry_run(config).exists) == (False, False, True)


def test_damaged_shards_are_removed_as_the_dry_run_says(folder: Path):
    damage(folder)
    config = VerifyConfig(table=str(folder / "table"), remove_damaged=True)
    would, did = dry_run(config), verify(config)
    assert did.removed
    assert figures(would, "removed", "removed_rows", "findings") == figures(did, "removed", "removed_rows", "findings")


def test_a_training_takes_the_steps_and_the_space_that_its_dry_run_says(folder: Path):
    config = training(Table.open(str(folder / "table")), folder / "new", stream={"max_length": 128})
    config = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"report_to": ()})})
    would, did = dry_run(config), train(config)
    assert (would.steps, would.steps_to_train) == (did.steps, did.steps_trained)
    assert would.parameters == did.parameters
    assert would.positions * 3 == did.positions
    size = sum(file.stat().st_size for file in (folder / "new").rglob("*") if file.is_file())
    assert would.bytes == pytest.approx(size, rel=0.25)
    assert dry_run(config).steps_to_train == 0
    evaluation = EvaluateConfig(table=str(folder / "table"), students=(str(folder / "new"),), report=str(folder / "r"))
    planned, done = dry_run(evaluation), evaluate(evaluation)
    assert (planned.held_out, planned.students, planned.files[0]) == (done.positions, ("new",), done.html)


@pytest.mark.long
def test_a_distillation_does_what_its_dry_run_says(folder: Path, tiny_teacher: Path):
    config = DistillConfig.model_validate(
        settings(tiny_teacher, folder / "d.parquet", folder / "table").model_dump()
        | {"output": str(folder / "runs-{version}"), "student": {"depth": 1}, **SHORT}
    )
    would, did = dry_run(config), distill(config)
    assert figures(would.capture, *CAPTURED) == figures(did.capture, *CAPTURED)
    assert {name: each.steps for name, each in would.train.items()} == {"student": 2, "control": 2}
    again = dry_run(config)
    assert {each.steps_to_train for each in again.train.values()} == {0}
    assert again.evaluate.held_out == did.evaluate.positions


def refused(work: Callable[[], object]) -> str:
    with pytest.raises(SoftlabelError) as caught:
        work()
    return f"{type(caught.value).__name__}: {caught.value}"


def test_a_dry_run_refuses_what_the_verb_refuses(folder: Path, tiny_teacher: Path):
    table = Table.open(str(folder / "table"))
    tag(table.location, 1, "old")
    (folder / "full").mkdir()
    (folder / "full" / "file").touch()
    (folder / "all.txt").write_text("\n".join(texts(40)))
    other = settings(tiny_teacher, folder / "d.parquet", folder / "table", selection={"top_k": 3})
    nothing = settings(tiny_teacher, write(folder / "e.parquet", {"a": ""}), folder / "new")
    cases: list[tuple[Settings, Callable[[Any], object]]] = [
        (other, capture),
        (training(table, folder / "student", **SHORT, loss={"temperature": 7.0}), train),
        (training(table, folder / "full", **SHORT), train),
        (training(table, folder / "new", **SHORT, student={"layers": (9,)}), train),
        (EvaluateConfig(table=table.location, students=(str(folder / "nobody"),)), evaluate),
        (ReprocessConfig(source=table.location, selection={"max_k": 30}), reprocess),
        (ReprocessConfig(source=table.location, drop=str(folder / "all.txt")), reprocess),
        (ReprocessConfig(source=table.location, destination=str(folder / "small")), reprocess),
        (ReprocessConfig(source=f"{table.location}@1", where="tokens > 3"), reprocess),
        (MixConfig(view=str(folder / "full"), tables=(table.location, str(folder / "small"))), mix),
        (MaintainConfig(table=table.location, tag="old"), maintain),
        (MaintainConfig(table=table.location, untag="young"), maintain),
        (MaintainConfig(table=table.location, unpin="nobody"), maintain),
        (MaintainConfig(table=table.location, tag="new=99"), maintain),
    ]
    before = snapshot(folder)
    for config, verb in cases:
        message = refused(lambda config=config: dry_run(config))
        assert snapshot(folder) == before
        assert message == refused(lambda config=config, verb=verb: verb(config))
        before = snapshot(folder)
    assert "no document can be used" in refused(lambda: dry_run(nothing))
    with lock_output(folder / "new"):
        locked = training(table, folder / "new", **SHORT)
        with pytest.raises(TrainingError, match="already training"):
            dry_run(locked)


IN_A_PROCESS = {
    "maintain": (0, ["--table", "{}/table", "--tag", "gold"]),
    "capture": (0, ["--documents", "{}/d.parquet", "--table", "{}/table"]),
    "train": (0, ["--table", "{}/table", "--output", "{}/new", "--student.layers", "1", "--optimizer.device", "cpu"]),
    "evaluate": (0, ["--table", "{}/table", "--students", "{}/student", "--report", "{}/report"]),
    "deploy": (1, ["--schedules"]),  # no server answers
}


@pytest.mark.parametrize(
    "verb", [pytest.param(verb, marks=[] if verb == "maintain" else [pytest.mark.long]) for verb in IN_A_PROCESS]
)
def test_the_command_writes_nothing_in_a_process_of_its_own(verb: str, folder: Path):
    """The home folder and Prefect's do not exist before, and neither do caches of libraries."""
    environment = os.environ | {"PREFECT_HOME": str(folder.parent / "prefect"), "HOME": str(folder.parent / "nobody")}
    environment |= {"PREFECT_API_URL": "http://127.0.0.1:9/api"}
    before = snapshot(folder.parent)
    expected, flags = IN_A_PROCESS[verb]
    script = [sys.executable, "-m", "softlabel.flows.cli", verb, *(flag.format(folder) for flag in flags), "--dry-run"]
    done = subprocess.run(script, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == expected, done.stderr
    assert "dry run: nothing was written" in done.stdout or expected
    assert snapshot(folder.parent) == before


def test_settings_of_a_capture_stay_what_they_are():
    """A dry run is no setting: it is in no file, no form and no record."""
    assert all("dry_run" not in model.model_fields for model in (CaptureConfig, MaintainConfig, DistillConfig))
