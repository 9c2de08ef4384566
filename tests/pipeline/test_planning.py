"""A nightly run over many documents looks at the new ones, in little memory."""

import json
import os
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import pytest

from pipeline import capturing
from pipeline.checkpoint import Checkpoint
from pipeline.config import CaptureConfig, SelectionConfig, TeacherConfig
from pipeline.documents import Documents
from pipeline.planning import Known, identify, plan
from pipeline.tokeniser import Tokeniser
from tests.benchmarks.planning import load_stub, write_documents

MANY = 20_000
BYTES_A_DOCUMENT = 150
"""What is kept of each document of the table; a set of Python's own takes five times as much."""


def test_ten_new_documents_among_many(tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["some", "of", "the", "words", "that", "there", "are", "in", "these", "short", "documents"]
    write_documents(tmp_path / "d.parquet", words, MANY)
    config = CaptureConfig(
        documents=str(tmp_path / "d.parquet"),
        table=str(tmp_path / "table"),
        teacher=TeacherConfig(model=str(tiny_teacher)),
        selection=SelectionConfig(top_k=1),
    )
    monkeypatch.setattr(capturing, "load_teacher", load_stub)
    assert capturing.capture(config).sequences == MANY
    write_documents(tmp_path / "d.parquet", words, MANY + 10)

    tokenised: list[str] = []
    encode = Tokeniser.encode

    def counting(self: Tokeniser, contents: Sequence[str]) -> object:
        tokenised.extend(contents)
        return encode(self, contents)

    monkeypatch.setattr(Tokeniser, "encode", counting)
    nightly = plan(config, tmp_path / "nightly")
    assert (nightly.documents, nightly.unchanged, nightly.sequences) == (MANY + 10, MANY, 10)
    assert len(tokenised) == 10

    checkpoint = Checkpoint.find(config.teacher)
    identity = identify(config, checkpoint, Tokeniser(checkpoint, config.sequences, "text"))
    carried = Documents(config.documents, config.columns).carried
    tracemalloc.start()
    known = Known(config, identity, carried)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del known
    assert kept < BYTES_A_DOCUMENT * MANY
    assert peak < 4 * BYTES_A_DOCUMENT * MANY


def test_a_file_whose_name_is_no_utf8_costs_that_file(tiny_teacher: Path, tmp_path: Path) -> None:
    folder = tmp_path / "documents"
    folder.mkdir()
    (folder / "good.txt").write_text("some words")
    (folder / os.fsdecode(b"caf\xe9.txt")).write_text("some words")
    teacher = TeacherConfig(model=str(tiny_teacher))
    found = plan(CaptureConfig(documents=str(folder), table=str(tmp_path / "t"), teacher=teacher), tmp_path / "plan")
    assert (found.documents, found.rejects) == (1, 1)
    assert found.rejects_file
    reject = json.loads(Path(found.rejects_file).read_text())
    assert reject == {"document_id": os.fsdecode(b"caf\xe9.txt"), "reason": "the id is broken UTF-8"}
