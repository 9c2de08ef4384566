"""Code in model folders runs only for a trusted teacher, and there is never a prompt.

Standard input answers yes to every prompt, as piped input might.
"""

import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from softlabel.pipeline.capturing.capture import capture
from softlabel.pipeline.capturing.job import resolve
from softlabel.pipeline.config.capture import CaptureConfig, SequencesConfig, TeacherConfig
from softlabel.pipeline.config.evaluate import EvaluateConfig
from softlabel.pipeline.config.train import StudentConfig
from softlabel.pipeline.evaluation.evaluate import evaluate
from softlabel.pipeline.objectives.decide import objective_of
from softlabel.pipeline.students.manifest import seal
from softlabel.pipeline.students.origin import Origin
from softlabel.pipeline.teachers.teacher import TransformersTeacher
from softlabel.pipeline.training.train import train
from softlabel.storage.errors import SoftlabelError, StudentError, TableError, TeacherError
from softlabel.storage.table import Table
from tests.pipeline.building import built
from tests.pipeline.captured import make_table
from tests.pipeline.classifiers import save_classifier, save_documents
from tests.pipeline.hostile import adapter, hostile
from tests.pipeline.trainings import interrupt_at, settings


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that exists if the code has run; at the end, nothing may have been read from standard input."""
    answers = io.StringIO("y\n" * 100)
    monkeypatch.setattr(sys, "stdin", answers)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    yield tmp_path / "ran"
    assert answers.tell() == 0, "there was a prompt"


REFUSED = ("model", "elsewhere", "nested", "tokenizer", "slow tokenizer", "adapter")


@pytest.mark.parametrize("how", REFUSED)
def test_a_student_model_that_needs_code_is_refused(
    how: str, table: Table, tiny_teacher: Path, tmp_path: Path, ran: Path
):
    folder = hostile(tmp_path / "student", tiny_teacher, how, ran)
    refuses(lambda: built(StudentConfig(model=str(folder)), table), StudentError, folder)
    assert not ran.exists()


@pytest.mark.parametrize("how", ["model", "elsewhere", "nested"])
@pytest.mark.parametrize("file", ["", "config.json"])
def test_a_students_configuration_that_needs_code_is_refused(
    how: str, file: str, table: Table, tiny_teacher: Path, tmp_path: Path, ran: Path
):
    folder = hostile(tmp_path / "student", tiny_teacher, how, ran)
    refuses(lambda: built(StudentConfig(config=str(folder / file)), table), StudentError, folder)
    assert not ran.exists()


@pytest.mark.parametrize("how", ["generate"])
def test_code_that_is_not_needed_does_not_run(how: str, table: Table, tiny_teacher: Path, tmp_path: Path, ran: Path):
    folder = hostile(tmp_path / "student", tiny_teacher, how, ran)
    built(StudentConfig(model=str(folder)), table)
    TransformersTeacher(TeacherConfig(model=str(folder), dtype="float32", device="cpu"))
    assert not ran.exists()


@pytest.mark.parametrize("how", REFUSED)
def test_a_finished_student_with_code_added_to_its_folder_is_not_evaluated(
    how: str, table: Table, uninterrupted: Any, tmp_path: Path, ran: Path
):
    folder = hostile(tmp_path / "student", Path(uninterrupted.output), how, ran)
    config = EvaluateConfig(table=table.location, students=(str(folder),), report=str(tmp_path / "report"))
    refuses(lambda: evaluate(config), StudentError, folder)
    assert not ran.exists()


@pytest.mark.parametrize("how", ["tokenizer", "slow tokenizer"])
@pytest.mark.parametrize("place", ["model", "config", "layers"])
def test_a_table_whose_tokenizer_needs_code_is_refused(
    how: str, place: str, tiny_teacher: Path, tmp_path: Path, ran: Path
):
    tokenizer = hostile(tmp_path / "tokenizer", tiny_teacher, how, ran)
    (tokenizer / "config.json").unlink()
    table = make_table(tmp_path / "table", tiny_teacher, 4, 0, tokenizer)
    student = StudentConfig(**{place: (0,) if place == "layers" else str(tiny_teacher)})
    refuses(lambda: built(student, table), TableError, table.tokenizer)
    assert not ran.exists()


@pytest.fixture(scope="module")
def class_table(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> tuple[Path, Table]:
    """A classifier, and a table that it has labelled."""
    folder = tmp_path_factory.mktemp("classes")
    teacher = save_classifier(folder / "teacher", tiny_teacher, kind="llama")
    config = CaptureConfig(
        documents=str(save_documents(folder / "documents.parquet", 6)),
        table=str(folder / "table"),
        teacher=TeacherConfig(model=str(teacher), dtype="float32", device="cpu"),
    )
    capture(config)
    return teacher, Table.open(str(folder / "table"))


@pytest.mark.parametrize(
    ("how", "place"), [*((how, "model") for how in REFUSED), ("model", "config"), ("elsewhere", "config")]
)
def test_a_student_classifier_that_needs_code_is_refused(
    how: str, place: str, class_table: tuple[Path, Table], tmp_path: Path, ran: Path
):
    teacher, table = class_table
    folder = hostile(tmp_path / "student", teacher, how, ran)
    refuses(lambda: built(StudentConfig(**{place: str(folder)}), table), StudentError, folder)
    assert not ran.exists()


@pytest.mark.parametrize("how", REFUSED)
def test_a_teachers_code_does_not_run_unless_it_is_trusted(how: str, tiny_teacher: Path, tmp_path: Path, ran: Path):
    folder = hostile(tmp_path / "teacher", tiny_teacher, how, ran)
    helps = how in ("model", "elsewhere", "tokenizer", "slow tokenizer")
    refuses(lambda: teach(folder), TeacherError, folder, "teacher.trust_remote_code" if helps else None)
    assert not ran.exists()


def test_an_adapter_that_would_load_a_tokenizer_is_refused(tiny_teacher: Path, tmp_path: Path, ran: Path):
    tokenizer = hostile(tmp_path / "tokenizer", tiny_teacher, "tokenizer", ran)
    folder = adapter(tmp_path / "adapter", tokenizer)
    refuses(lambda: teach(tiny_teacher, adapter=str(folder)), TeacherError, folder)
    assert not ran.exists()


@pytest.mark.parametrize("how", ["model", "elsewhere", "tokenizer"])
def test_the_code_of_a_trusted_teacher_runs(how: str, tiny_teacher: Path, tmp_path: Path, ran: Path):
    teach(hostile(tmp_path / "teacher", tiny_teacher, how, ran), trust_remote_code=True)
    assert ran.exists()


def test_students_do_not_need_the_code_of_a_trusted_tokenizer(
    tiny_teacher: Path, documents: Path, tmp_path: Path, ran: Path
):
    teacher = hostile(tmp_path / "teacher", tiny_teacher, "tokenizer", ran)
    config = CaptureConfig(
        documents=str(documents),
        table=str(tmp_path / "table"),
        teacher=TeacherConfig(model=str(teacher), dtype="float32", device="cpu", trust_remote_code=True),
        sequences=SequencesConfig(max_tokens=16),
    )
    student = StudentConfig(config=str(tiny_teacher))
    job = resolve(config)
    objective_of(Origin.of_capture(job.checkpoint, job.teacher, job.identity)).require_fitting(student)
    capture(config)
    ran.unlink()
    built(student, Table.open(config.table))
    assert not ran.exists()


def teach(folder: Path, **more: Any) -> TransformersTeacher:
    teacher = TransformersTeacher(TeacherConfig(model=str(folder), dtype="float32", device="cpu", **more))
    assert teacher.vocabulary == 500
    return teacher


def refuses(act: Callable[[], object], kind: type[SoftlabelError], where: Path, advice: str | None = None) -> None:
    """The error names the place, and advises to trust the code only where that would help."""
    with pytest.raises(kind) as refused:
        act()
    message = str(refused.value)
    assert all(part in message for part in ("expected:", "found:", "where:", "what to do:", str(where)))
    assert len(message.splitlines()) < 10
    assert ("trust_remote_code" in message) == (advice is not None)
    assert advice is None or advice in message


class Pickled:
    """Runs code when it is unpickled."""

    def __init__(self, ran: Path) -> None:
        self.ran = ran

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.ran,)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_code_in_a_training_checkpoint_does_not_run(name: str, table: Table, tmp_path: Path, ran: Path):
    config = settings(table, tmp_path / "student")
    with pytest.raises(KeyboardInterrupt):
        train(config, interrupt_at(5))
    (checkpoint,) = (tmp_path / "student.training").glob("checkpoint-*")
    assert (checkpoint / name).is_file()
    torch.save(Pickled(ran), checkpoint / name)
    (checkpoint / "manifest.json").unlink()
    seal(checkpoint, checkpoint)  # otherwise the checkpoint would be skipped as damaged
    with pytest.raises(Exception, match=r"(?i)weights.only"):
        train(config)
    assert not ran.exists()
