"""A student's record identifies its source files by hash, so that changed files are noticed."""

import hashlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from softlabel.pipeline.config.train import StudentConfig
from softlabel.pipeline.objectives.decide import objective_of
from softlabel.pipeline.students.origin import KnownTeacher, Origin
from softlabel.pipeline.students.source import StudentSource
from softlabel.pipeline.training.train import train
from softlabel.storage.errors import StudentError, UsageError
from softlabel.storage.identity import TeacherIdentity
from softlabel.storage.views.mixing import make_view
from softlabel.storage.views.view import open_table
from tests.pipeline.building import built
from tests.pipeline.captured import make_table
from tests.pipeline.conftest import NEW, OLD
from tests.pipeline.trainings import interrupt_at, settings

pytestmark = pytest.mark.usefixtures("one_thread")

ONE_LAYER = StudentConfig(depth=1)


def change(folder: Path) -> None:
    """Replace the weights by others of the same shape and name."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.model.norm.weight.data *= 2
    model.save_pretrained(folder)


def hashes(folder: Path) -> dict[str, str]:
    names = ("config.json", "model.safetensors")
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def record_of(folder: Path) -> dict:
    return json.loads((folder / "softlabel.json").read_text())


@pytest.fixture
def model(tiny_teacher, tmp_path):
    return shutil.copytree(tiny_teacher, tmp_path / "model")


def going_on(table, output, model):
    student = {"layers": None, "model": str(model)}
    return settings(table, output, student=student, optimizer={"max_steps": 4, "save_steps": 1})


def test_record_and_model_card_name_the_source_and_the_teacher(table, tiny_teacher, model, tmp_path):
    loss = {"divergence": "skew_forward_kl", "mix": 0.25, "hard_weight": 0.5}
    config = going_on(table, tmp_path / "student", model).model_copy(
        update={"loss": settings(table, "", loss=loss).loss}
    )
    train(config)
    record, card = record_of(tmp_path / "student"), (tmp_path / "student" / "README.md").read_text()
    assert record["source"] == {"name": str(model), "commit": None, "files": hashes(model)}
    assert record["teachers"] == [{"name": str(tiny_teacher), "commit": None}]
    assert record["objective"] == "0.5 × cross-entropy + skew forward KL (mix 0.25, bucket)"
    for text in (f"- from: {model}\n", f"- teacher: {tiny_teacher}\n", f"- loss: {record['objective']}\n"):
        assert text in card
    assert "LoRA" not in card


def test_changed_files_in_the_same_folder_are_refused(table, model, tmp_path):
    config = going_on(table, tmp_path / "student", model)
    with pytest.raises(KeyboardInterrupt):
        train(config, interrupt_at(2))
    before = shutil.copytree(model, tmp_path / "before")
    change(model)
    with pytest.raises(UsageError, match=r"an unfinished student(.|\n)*model\.safetensors: its content has changed"):
        train(config)
    shutil.copytree(before, model, dirs_exist_ok=True)
    assert train(config).resumed_from == 1

    (model / "consolidated.safetensors").write_text("what nobody loads")
    assert train(config).steps_trained == 0
    change(model)
    with pytest.raises(UsageError, match=r"already holds a student(.|\n)*model\.safetensors"):
        train(config)
    for file in model.iterdir():
        file.unlink()
    assert train(config).steps_trained == 0, "a finished student needs what it was made from no longer"
    model.rmdir()
    assert train(config).steps_trained == 0
    record = record_of(tmp_path / "student")
    del record["source"]
    (tmp_path / "student" / "softlabel.json").write_text(json.dumps(record))
    with pytest.raises(UsageError, match="an earlier version of softlabel"):
        train(config)


def test_layers_of_a_teacher_changed_since_the_capture_are_refused(model, tmp_path):
    own = make_table(tmp_path / "table", model, train=8, held_out=0)
    built(StudentConfig(layers=(1,)), own)
    change(model)
    with pytest.raises(StudentError, match=r"(?s)no longer the table's teacher.*model\.safetensors has changed"):
        built(StudentConfig(layers=(1,)), own)
    assert built(StudentConfig(layers=(1,), teacher=str(model)), own).config.num_hidden_layers == 1


def captured_from(table, *teachers):
    """Origin of a table captured from these teachers."""
    return replace(Origin.of(table), teachers=lambda: teachers)


def test_layers_of_a_teacher_with_an_adapter_or_code_of_its_own(model, table):
    spoke = TeacherIdentity(files=hashes(model), dtype="float32", adapter="0")
    with pytest.raises(StudentError, match="without the adapter"):
        objective_of(captured_from(table, KnownTeacher.of(str(model), None, spoke))).require_fitting(ONE_LAYER)
    (model / "own.py").write_text("")
    files = hashes(model) | {"own.py": hashlib.sha256(b"").hexdigest()}
    coded = TeacherIdentity(files=files, dtype="float32")
    objective_of(captured_from(table, KnownTeacher.of(str(model), None, coded))).require_fitting(ONE_LAYER)


@pytest.mark.usefixtures("hub")
def test_a_downloaded_copy_of_the_hub_teacher_is_accepted_by_its_files(table, model, tmp_path, monkeypatch):
    """In a folder with the model's name, which has no revisions; its files are compared instead."""
    monkeypatch.chdir(tmp_path)
    spoke = KnownTeacher.of("org/name", OLD, TeacherIdentity(files=hashes(model), dtype="float32"))
    shutil.copytree(model, tmp_path / "org" / "name")
    assert objective_of(captured_from(table, spoke)).require_fitting(ONE_LAYER).path == Path("org/name")


def test_one_teacher_in_two_precisions_is_one(tiny_teacher, tmp_path):
    tables = [make_table(tmp_path / name, tiny_teacher, train=8, held_out=0) for name in "ab"]
    make_view(str(tmp_path / "view"), [table.location for table in tables], (1, 1), "concatenate")
    identities = [TeacherIdentity(files=hashes(tiny_teacher), dtype=dtype) for dtype in ("float32", "bfloat16")]
    assert KnownTeacher.of("a", None, identities[0]) == KnownTeacher.of("a", None, identities[1])
    [teacher] = Origin.of(open_table(str(tmp_path / "view"))).teachers()
    assert teacher.files == hashes(tiny_teacher)


def test_a_configuration_is_pinned_without_weights(table, tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaConfig(vocab_size=512, **sizes).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    for given in (tmp_path, file):
        found = StudentSource.find(StudentConfig(config=str(given)), Origin.of(table))
        assert found.files == {"config.json": hashlib.sha256(file.read_bytes()).hexdigest()}
        with pytest.raises(UsageError, match="no revisions"):
            StudentSource.find(StudentConfig(config=str(given), revision="main"), Origin.of(table))
    config = settings(table, tmp_path / "s", student={"layers": None, "config": str(file)}, optimizer={"max_steps": 1})
    train(config)
    LlamaConfig(vocab_size=512, **{**sizes, "num_hidden_layers": 2}).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=re.escape(f"{file}: its content")):
        train(config)


@pytest.mark.usefixtures("hub")
def test_a_revision_of_a_hub_model(table, tmp_path):
    for revision, commit in ((None, OLD), (NEW, NEW)):
        output = tmp_path / commit
        student = {"layers": None, "model": "org/name", "revision": revision}
        train(settings(table, output, student=student, optimizer={"max_steps": 1}))
        source = record_of(output)["source"]
        assert (source["name"], source["commit"]) == ("org/name", commit)
        assert source["files"] == hashes(tmp_path / "hub" / "models--org--name" / "snapshots" / commit)
        assert f"- from: org/name at {commit}\n" in (output / "README.md").read_text()
    by_commit = settings(table, tmp_path / OLD, student={**student, "revision": OLD}, optimizer={"max_steps": 1})
    assert train(by_commit).steps_trained == 0, "only the files count, not the name of the revision"
    moved = settings(table, tmp_path / OLD, student={**student, "revision": NEW}, optimizer={"max_steps": 1})
    with pytest.raises(UsageError, match="its content has changed"):
        train(moved)
    with pytest.raises(StudentError, match="revision v2"):
        built(StudentConfig(model="org/name", revision="v2"), table)


@pytest.mark.parametrize(("max_k", "target"), [(8, "sampled tail"), (99, "sampled tail"), (7, "bucket")])
def test_fewer_ids_than_the_table_has_make_the_tail_a_bucket(max_k, target, table, tmp_path):
    train(settings(table, tmp_path / "student", stream={"max_k": max_k}, optimizer={"max_steps": 1}))
    assert record_of(tmp_path / "student")["objective"] == f"forward KL ({target})"
