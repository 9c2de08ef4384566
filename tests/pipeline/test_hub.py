"""A hub model's revision: what is loaded is what was asked for, and what is written down is what was loaded."""

import hashlib
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from pipeline.capturing import capture, capture_shard, load_teacher
from pipeline.config import CaptureConfig
from pipeline.planning import plan
from storage.errors import ProvenanceError, TeacherError
from storage.inspection import last_capture
from storage.table import Table
from tests.pipeline.test_capturing import settings, texts, write

OLD, NEW = "a" * 40, "b" * 40
"""Commits of a model."""


@pytest.fixture
def hub(tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a model in a hub's cache, as a download leaves it: two commits, and main, which is the old one."""
    model = tmp_path / "hub" / "models--org--name"
    shutil.copytree(tiny_teacher, model / "snapshots" / OLD)
    shutil.copytree(tiny_teacher, model / "snapshots" / NEW)
    changed = AutoModelForCausalLM.from_pretrained(tiny_teacher)
    changed.model.norm.weight.data *= 2
    changed.save_pretrained(model / "snapshots" / NEW)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(OLD)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(model.parent))
    return model


def of_hub(table: Path, count: int = 3, **teacher: str) -> CaptureConfig:
    """A capture of so many documents by the model of that name."""
    config = settings(Path("unused"), write(table.with_name(f"{count}.parquet"), texts(count)), table)
    named = config.teacher.model_copy(update={"model": "org/name", **teacher})
    return config.model_copy(update={"teacher": named})


def said(table: Path) -> list[float]:
    """The teacher's entropies, by sequence."""
    rows = Table.open(str(table)).scan().sort("document_id").collect()
    return [code for codes in rows["entropies"] for code in codes]


def test_bug_capture_loads_another_revision_than_the_one_written_down(hub: Path, tmp_path: Path) -> None:
    for name, commit, teacher in (("main", OLD, {}), ("old", OLD, {"revision": OLD}), ("new", NEW, {"revision": NEW})):
        table = tmp_path / name
        capture(of_hub(table, **teacher))
        weights = (hub / "snapshots" / commit / "model.safetensors").read_bytes()
        files = Table.open(str(table)).identity.teacher.files
        assert files["model.safetensors"] == hashlib.sha256(weights).hexdigest()
        assert last_capture(Table.open(str(table)))["revision"] == commit
        local = tmp_path / f"{name}-folder"
        capture(settings(hub / "snapshots" / commit, tmp_path / "3.parquet", local))
        assert said(table) == said(local), "the numbers are those of that commit's weights"
    assert said(tmp_path / "main") == said(tmp_path / "old") != said(tmp_path / "new")
    with pytest.raises(TeacherError, match="revision v2"):
        capture(of_hub(tmp_path / "t", revision="v2"))


def test_a_branch_that_moves_is_refused_by_its_table_and_in_the_middle_of_a_capture(hub: Path, tmp_path: Path) -> None:
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
