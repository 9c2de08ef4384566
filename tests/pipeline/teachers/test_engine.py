"""Custom engines in place of transformers, and writing while the next batch runs."""

from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from softlabel.pipeline.capturing.capture import capture
from softlabel.pipeline.config.capture import CaptureConfig, TeacherConfig
from softlabel.pipeline.config.estimate import EstimateConfig
from softlabel.pipeline.estimation.estimate import estimate
from softlabel.pipeline.models.checkpoint import Checkpoint
from softlabel.pipeline.tables.recheck import recheck
from softlabel.storage.codec import decode
from softlabel.storage.reader import read
from softlabel.storage.table import Table
from softlabel.storage.writer import ShardWriter
from tests.pipeline.bigrams import BIGRAMS, Bigrams


def settings(teacher: Path, documents: Path, table: Path, engine: str = BIGRAMS) -> dict[str, Any]:
    return {
        "documents": str(documents),
        "table": str(table),
        "teacher": {
            "model": str(teacher),
            "dtype": "float32",
            "device": "cpu",
            "engine": engine,
            "batch_tokens": 512,
        },
        "sequences": {"max_tokens": 128},
        "selection": {"top_k": 8},
    }


def test_a_custom_engine_is_used_by_capture_recheck_and_estimate(
    tiny_teacher: Path, documents: Path, tmp_path: Path
) -> None:
    config = CaptureConfig.model_validate(settings(tiny_teacher, documents, tmp_path / "table"))
    report = capture(config)
    table = Table.open(report.table)
    rows = read(table, table.shards()[0])
    ids, mask = (rows.column(name)[0].values.to_numpy(zero_copy_only=False) for name in ("token_ids", "loss_mask"))
    [logits] = Bigrams(config.teacher, Checkpoint.find(config.teacher)).logits([ids], [np.flatnonzero(mask)])
    labels = decode(rows.slice(0, 1), table.numbering)
    expected = logits.log_softmax(1).topk(8)
    np.testing.assert_array_equal(labels.head_ids.reshape(-1, 8), expected.indices)
    np.testing.assert_allclose(labels.head_logprobs.reshape(-1, 8), expected.values, atol=1 / 64)
    assert not recheck(table, config.teacher, sequences=8).disagreements
    assert estimate(EstimateConfig.model_validate(config.model_dump() | {"table": None})).positions > 0


@pytest.mark.parametrize("engine", ["nowhere:Engine", "softlabel.pipeline.teachers.teacher:Nothing", "no name"])
def test_a_missing_engine_is_an_error_when_the_settings_are_read(engine: str) -> None:
    with pytest.raises(ValidationError, match="engine must be module:Class"):
        TeacherConfig(model="teacher", engine=engine)


class Signalling(Bigrams):
    """Signals the start of each batch."""

    batches: tuple[Event, ...] = ()
    begun = 0

    def logits(self, sequences: Any, positions: Any) -> Iterator[torch.Tensor]:
        """See ``pipeline.teachers.teacher.Teacher``."""
        if Signalling.begun < len(self.batches):
            self.batches[Signalling.begun].set()
        Signalling.begun += 1
        return super().logits(sequences, positions)


def test_a_batch_is_written_while_the_next_one_runs(
    tiny_teacher: Path, documents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writing each of the first batches waits until the teacher has begun the next one."""
    monkeypatch.setattr("softlabel.pipeline.capturing.shard.SAMPLE", 1)
    monkeypatch.setattr(Signalling, "batches", tuple(Event() for _ in range(4)))
    monkeypatch.setattr(Signalling, "begun", 0)
    append, in_time = ShardWriter.append, list[bool]()

    def slow(self: ShardWriter, *arguments: Any) -> None:
        if len(in_time) + 1 < len(Signalling.batches):
            in_time.append(Signalling.batches[len(in_time) + 1].wait(60))
        append(self, *arguments)

    monkeypatch.setattr(ShardWriter, "append", slow)
    capture(
        CaptureConfig.model_validate(settings(tiny_teacher, documents, tmp_path / "table", f"{__name__}:Signalling"))
    )
    assert in_time == [True] * 3
