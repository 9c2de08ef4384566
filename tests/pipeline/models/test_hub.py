"""Revisions of a hub model: the requested one is loaded, and the loaded one is recorded."""

import hashlib
import shutil
from pathlib import Path

import pytest

from softlabel.pipeline.capturing.capture import capture
from softlabel.pipeline.capturing.job import CaptureJob, resolve
from softlabel.pipeline.capturing.plan import plan
from softlabel.pipeline.capturing.shard import capture_shard
from softlabel.pipeline.config.capture import CaptureConfig, TeacherConfig
from softlabel.pipeline.evaluation.provenance import is_model
from softlabel.pipeline.models.checkpoint import Checkpoint
from softlabel.pipeline.models.files import locate
from softlabel.storage.errors import ProvenanceError, TeacherError
from softlabel.storage.table import Table
from softlabel.storage.upkeep.inspection import last_capture
from tests.pipeline.capturing.test_capture import settings, texts, write
from tests.pipeline.conftest import NEW, OLD


def of_hub(table: Path, count: int = 3, **teacher: str) -> CaptureConfig:
    """Settings of a capture of ``count`` documents with the hub model."""
    config = settings(Path("unused"), write(table.with_name(f"{count}.parquet"), texts(count)), table)
    named = config.teacher.model_copy(update={"model": "org/name", **teacher})
    return config.model_copy(update={"teacher": named})


def entropies(table: Path) -> list[float]:
    """The stored entropies, in the order of the documents."""
    rows = Table.open(str(table)).scan().sort("document_id").collect()
    return [code for codes in rows["entropies"] for code in codes]


def test_the_revision_that_is_recorded_is_the_one_that_was_loaded(hub: Path, tmp_path: Path) -> None:
    for name, commit, teacher in (("main", OLD, {}), ("old", OLD, {"revision": OLD}), ("new", NEW, {"revision": NEW})):
        table = tmp_path / name
        capture(of_hub(table, **teacher))
        weights = (hub / "snapshots" / commit / "model.safetensors").read_bytes()
        files = Table.open(str(table)).identity.teacher.files
        assert files["model.safetensors"] == hashlib.sha256(weights).hexdigest()
        assert last_capture(Table.open(str(table))).revision == commit
        local = tmp_path / f"{name}-folder"
        capture(settings(hub / "snapshots" / commit, tmp_path / "3.parquet", local))
        assert entropies(table) == entropies(local), "the numbers are those of that commit's weights"
    assert entropies(tmp_path / "main") == entropies(tmp_path / "old") != entropies(tmp_path / "new")
    with pytest.raises(TeacherError, match="revision v2"):
        capture(of_hub(tmp_path / "t", revision="v2"))


def test_a_moved_branch_changes_neither_a_table_nor_a_planned_capture(hub: Path, tmp_path: Path) -> None:
    capture(of_hub(tmp_path / "t"))
    job = resolve(of_hub(tmp_path / "other"))
    [shard] = plan(job, tmp_path / "plan").shards
    (hub / "refs" / "main").write_text(NEW)
    assert capture_shard(CaptureJob.from_json(job.to_json()), shard).sequences == 3
    assert entropies(tmp_path / "other") == entropies(tmp_path / "t"), "also in another process"
    for count, teacher in enumerate(({}, {"model": "org/name"}, {"model": "org/name", "revision": OLD}), 4):
        documents = str(write(tmp_path / "more.parquet", texts(count)))
        taken = {"documents": documents, "table": str(tmp_path / "t"), "teacher": teacher}
        assert capture(CaptureConfig.model_validate(taken)).sequences == 1, "the table's commit goes on"
    with pytest.raises(ProvenanceError, match=r"teacher\.files\.model\.safetensors"):
        capture(of_hub(tmp_path / "t", revision="main"))


def test_a_name_without_an_owner_is_a_repository_unless_there_is_a_folder_of_that_name(
    hub: Path, home: Path, tiny_teacher: Path
) -> None:
    hub.rename(hub.with_name("models--name"))
    assert Checkpoint.find(TeacherConfig(model="name")).revision == OLD
    assert is_model(Path("name"), "name")
    Path("name").mkdir()
    with pytest.raises(TeacherError, match=r"move or rename this folder, which comes first"):
        Checkpoint.find(TeacherConfig(model="name"))
    shutil.copytree(tiny_teacher, "name", dirs_exist_ok=True)
    assert Checkpoint.find(TeacherConfig(model="name")).folder == Path("name")


@pytest.mark.parametrize("name", ["nobody", "org/nobody", "org/name@v2"])
def test_a_repository_that_can_not_be_had_offline_says_so_and_what_to_do(hub: Path, home: Path, name: str) -> None:
    name, _, revision = name.partition("@")
    with pytest.raises(TeacherError) as refused:
        locate(name, "teacher", revision or None)
    text = str(refused.value)
    assert str(Path(name).absolute()) in text
    assert "not in this machine's cache, and HF_HUB_OFFLINE forbids downloads" in text
    assert f"hf download {name}" in text
