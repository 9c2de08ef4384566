"""Revisions of a hub model: the requested one is loaded, and the loaded one is recorded."""

import hashlib
from pathlib import Path

import pytest

from softlabel.pipeline.capturing.capture import capture
from softlabel.pipeline.capturing.plan import plan
from softlabel.pipeline.capturing.shard import capture_shard
from softlabel.pipeline.config.capture import CaptureConfig
from softlabel.pipeline.teachers.load import load_teacher
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


def test_a_moved_branch_is_refused_by_its_table_and_during_a_capture(hub: Path, tmp_path: Path) -> None:
    capture(of_hub(tmp_path / "t"))
    [shard] = plan(of_hub(tmp_path / "other"), tmp_path / "plan").shards
    (hub / "refs" / "main").write_text(NEW)
    with pytest.raises(ProvenanceError, match=r"teacher\.files\.model\.safetensors"):
        capture(of_hub(tmp_path / "t", count=6))
    load_teacher.cache_clear()  # as in another process
    with pytest.raises(ProvenanceError, match="has changed since this capture was planned"):
        capture_shard(of_hub(tmp_path / "other"), shard)
    assert not (tmp_path / "other").exists()
    pinned = of_hub(tmp_path / "t", count=6, revision=OLD)
    assert capture(pinned).sequences == 3, "the commit itself goes on"
