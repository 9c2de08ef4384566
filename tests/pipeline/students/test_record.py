"""A student's record is read whichever version wrote it, if it is not newer, and compared under current names."""

import json
from copy import deepcopy
from pathlib import Path

import pytest

from softlabel.pipeline.config.evaluate import EvaluateConfig
from softlabel.pipeline.evaluation.evaluate import evaluate
from softlabel.pipeline.students.folder import StudentFolder
from softlabel.pipeline.students.record import FORMAT, flatten
from softlabel.pipeline.training.train import train
from softlabel.storage.errors import StudentError, UsageError
from tests.pipeline.captured import make_table
from tests.pipeline.trainings import interrupt_at, settings

OLD_NAMES = {
    "optimizer": "optimiser",
    "num_train_epochs": "epochs",
    "warmup_ratio": "warmup",
    "lr_scheduler_type": "schedule",
    "max_grad_norm": "max_gradient_norm",
    "use_liger_kernel": "liger",
    "save_steps": "checkpoint_steps",
    "early_stopping_patience": "patience",
    "max_length": "row_tokens",
    "batch_size": "batch_rows",
    "micro_batch_size": "micro_rows",
    "lora_r": "lora_rank",
    "lora_target_modules": "lora_targets",
}
"""Current names of settings, and their names in the previous version."""


@pytest.fixture(scope="module")
def student(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory):
    """A table and the settings of a student that was trained from it."""
    folder = tmp_path_factory.mktemp("record")
    config = settings(make_table(folder / "table", tiny_teacher), folder / "student", optimizer={"max_steps": 1})
    train(config)
    return config


@pytest.fixture
def record(student):
    """The student's record as the previous version wrote it; restored at the end."""
    path = Path(student.output) / "softlabel.json"
    today = path.read_text()
    config = json.loads(today)["config"]
    del config["optimizer"]["report_to"]  # newer than these names
    renamed = {
        OLD_NAMES.get(section, section): {OLD_NAMES.get(name, name): value for name, value in values.items()}
        if isinstance(values, dict)
        else values
        for section, values in config.items()
    }
    assert {"optimiser", "stream"} <= {*renamed}
    assert "row_tokens" in renamed["stream"]
    yield write(path, json.loads(today), renamed)
    path.write_text(today)


def write(path: Path, record, config):
    """Write the record with these settings; return a function that changes one of them."""
    path.write_text(json.dumps({**record, "config": config}))

    def change(section: str, name: str, value: object) -> None:
        changed = deepcopy(config)
        changed[section][name] = value
        path.write_text(json.dumps({**record, "config": changed}))

    return change


def test_a_finished_student_of_an_earlier_version_is_recognized(student, record):
    assert train(student).steps_trained == 0


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("optimiser", "epochs", 7.0),
        ("optimiser", "warmup", 0.5),
        ("optimiser", "schedule", "linear"),
        ("optimiser", "max_gradient_norm", 3.0),
        ("optimiser", "patience", 9),
        ("optimiser", "learning_rate", 0.25),
        ("stream", "row_tokens", 99),
        ("stream", "batch_rows", 5),
        ("student", "lora_rank", 2),
        ("student", "lora_targets", ["q_proj"]),
        ("loss", "target", "renormalised"),
    ],
)
def test_a_setting_that_differs_under_its_old_name_refuses_the_student(student, record, section, name, value):
    record(section, name, value)
    today = {old: new for new, old in OLD_NAMES.items()}
    with pytest.raises(UsageError, match=rf"{today.get(section, section)}\.{today.get(name, name)}: .* then, .* now"):
        train(student.completed())


def test_settings_that_do_not_affect_the_student_may_differ(student, record):
    record("optimiser", "checkpoint_steps", 77)
    record("stream", "micro_rows", 1)
    assert train(student).steps_trained == 0


def test_a_record_with_an_unknown_setting_is_refused_with_its_name(student, record):
    record("stream", "of_tomorrow", 1)
    with pytest.raises(UsageError, match=r"stream\.of_tomorrow"):
        train(student)


def test_a_setting_that_the_record_lacks_has_its_default(student, record, tmp_path: Path):
    path = Path(student.output) / "softlabel.json"
    old = json.loads(path.read_text())
    del old["config"]["optimiser"]["weight_decay"]
    path.write_text(json.dumps(old))
    assert train(student).steps_trained == 0
    decayed = student.model_copy(update={"optimizer": student.optimizer.model_copy(update={"weight_decay": 0.1})})
    with pytest.raises(UsageError, match=r"optimizer\.weight_decay: 0\.0 then, 0\.1 now"):
        train(decayed)


def test_a_record_is_read_with_the_current_names_of_its_settings(student, record):
    found = StudentFolder(Path(student.output)).finished()
    assert found is not None
    every = flatten(student.completed().model_dump(mode="json")).keys()
    assert flatten(found.config.model_dump(mode="json")).keys() == every


@pytest.fixture
def written(student):
    """The path of the student's record, and its content today; restored at the end."""
    path = Path(student.output) / "softlabel.json"
    today = path.read_text()
    yield path, json.loads(today)
    path.write_text(today)


def evaluated(student, folder: Path):
    return evaluate(
        EvaluateConfig(table=student.table, students=(student.output,), report=str(folder / "report"), device="cpu")
    )


@pytest.mark.parametrize(
    "lacking", [("format",), ("format", "circumstances"), ("format", "teachers", "step"), ("format", "step")]
)
def test_a_record_from_before_there_were_formats_is_read(written, student, lacking, tmp_path: Path):
    path, record = written
    path.write_text(json.dumps({name: value for name, value in record.items() if name not in lacking}))
    report = train(student)
    assert (report.steps, report.steps_trained) == (1, 0)
    assert evaluated(student, tmp_path).students[0].parameters == report.parameters


def test_a_checkpoint_from_before_there_were_formats_is_taken_up(student, tmp_path: Path):
    more = student.optimizer.model_copy(update={"max_steps": 3, "save_steps": 2})
    config = student.model_copy(update={"output": str(tmp_path / "student"), "optimizer": more})
    with pytest.raises(KeyboardInterrupt):
        train(config, interrupt_at(3))
    (checkpoint,) = (tmp_path / "student.training").glob("checkpoint-*")
    (checkpoint / "manifest.json").unlink()
    record = json.loads((checkpoint / "run.json").read_text())
    del record["format"]
    (checkpoint / "run.json").write_text(json.dumps(record))
    assert train(config).resumed_from == 2


@pytest.mark.parametrize("newer", [FORMAT + 1, FORMAT + 100])
def test_a_record_of_a_newer_format_is_refused_with_what_to_do(written, student, newer, tmp_path: Path):
    path, record = written
    path.write_text(json.dumps({**record, "format": newer, "of_tomorrow": {"a": 1}}))
    for use in (lambda: train(student), lambda: evaluated(student, tmp_path)):
        with pytest.raises(StudentError, match=rf"(?s)format {newer}.*upgrade softlabel"):
            use()


@pytest.mark.parametrize(
    "damage",
    [
        lambda record: "{",
        lambda record: "[" * 100_000,
        lambda record: "\ud800".encode("utf-8", "surrogatepass"),
        lambda record: "[]",
        lambda record: json.dumps({**record, "format": "two"}),
        lambda record: json.dumps({**record, "format": 0}),
        lambda record: json.dumps({**record, "parameters": None}),
        lambda record: json.dumps({**record, "unknown": 1}),
        lambda record: json.dumps({**record, "config": []}),
        lambda record: json.dumps({**record, "config": {"student": 1, "student.x": 2}}),
        lambda record: json.dumps({**record, "history": [{"step": "many"}]}),
        lambda record: json.dumps({**record, "table": {**record["table"], "identity": {}}}),
    ],
)
def test_a_damaged_record_is_an_error_that_names_its_file(written, student, damage, tmp_path: Path):
    path, record = written
    content = damage(record)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for use in (lambda: train(student), lambda: evaluated(student, tmp_path)):
        with pytest.raises(StudentError, match=r"(?s)record is damaged.*where: .*softlabel\.json"):
            use()


def test_a_record_is_read_as_it_was_written(student, tmp_path: Path):
    record = StudentFolder(Path(student.output)).finished()
    assert record is not None
    (tmp_path / "softlabel.json").write_text(record.to_json())
    assert StudentFolder(tmp_path).finished() == record
    assert (Path(student.output) / "softlabel.json").read_text() == record.to_json()
    assert record.config == student
