"""The programs that an export is for read it; ``make test-long`` installs them into a folder of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from softlabel.storage.table import Table
from tests.conftest import ROOT
from tests.pipeline.tables.test_export import exported, rows_of, stored

pytestmark = pytest.mark.long
PROGRAMS = ROOT / ".venv" / "programs"


def read_by(program: str, *arguments: Path) -> Any:
    """What ``other_programs`` reads, in a process that finds these programs."""
    assert PROGRAMS.is_dir(), "make test-long installs the programs that read exports"
    command = [sys.executable, "-m", "tests.pipeline.tables.other_programs", program, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": f"{PROGRAMS}:{ROOT}", "HF_HOME": str(arguments[0].parent / "home")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind", ["parquet", "datasets", "axolotl", "trl"])
def test_the_datasets_library_reads_every_value_of_every_format(texts: Table, tmp_path: Path, kind: str):
    exported(texts, tmp_path / "out", format=kind)
    exported(texts, tmp_path / "parquet", format="parquet" if kind == "datasets" else kind)
    found = read_by("datasets", tmp_path / "out", tmp_path / "cache")
    assert found.keys() == {"train", "eval"}
    for split, rows in found.items():
        key = "token_ids" if "token_ids" in rows[0] else "input_ids"
        assert sorted(rows, key=lambda row: row[key]) == sorted(
            rows_of(tmp_path / "parquet", split), key=lambda row: row[key]
        )


def test_trls_trainer_trains_on_the_labels(chats: Table, tmp_path: Path, tiny_teacher: Path):
    exported(chats, tmp_path / "out", format="trl")
    rows = [(row["token_ids"], row["loss_mask"]) for row, _ in stored(chats, "train")]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    found = read_by("trl", tmp_path / "out", tiny_teacher, tmp_path / "scratch", tmp_path / "rows.json")
    assert found["trainer"] == pytest.approx(found["expected"], rel=1e-3)


@pytest.mark.parametrize("draws", [True, False])
def test_axolotls_collator_and_loss_take_the_targets(texts: Table, tmp_path: Path, tiny_teacher: Path, draws: bool):
    """The teacher as its own student: what is left is the rounding of the head, and the shares of the draws."""
    exported(texts, tmp_path / "out", format="axolotl", draws=draws)
    found = read_by("axolotl", tmp_path / "out", tiny_teacher)
    assert found["rows"] == len(stored(texts, "train"))
    assert found["aligned"]
    if draws:
        assert found["shares"] == pytest.approx([1, 1], abs=1e-4)
    else:
        assert found["loss"] == pytest.approx(0, abs=0.02)
    assert found["loss one token later"] > found["loss"] + 1
