"""A table agrees with its own teacher, run again, and with no other."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM

from softlabel.pipeline.capturing.capture import capture
from softlabel.pipeline.config.capture import CaptureConfig, TeacherConfig
from softlabel.pipeline.config.tables import ReprocessConfig
from softlabel.pipeline.tables.recheck import Recheck, disagreement, recheck
from softlabel.pipeline.tables.reprocess import reprocess
from softlabel.pipeline.teachers.teacher import TransformersTeacher
from softlabel.storage.codec import decode
from softlabel.storage.errors import ProvenanceError, TeacherError
from softlabel.storage.identity import Identity
from softlabel.storage.labels import SoftLabels
from softlabel.storage.reader import read
from softlabel.storage.schema import SEQUENCE
from softlabel.storage.table import Table
from softlabel.storage.writer import ShardWriter
from tests.pipeline.capturing.test_capture import settings

pytestmark = pytest.mark.usefixtures("one_thread")

Change = Callable[[SoftLabels], SoftLabels]


def config_of(teacher: Path, documents: Path, table: Path) -> CaptureConfig:
    config = settings(teacher, documents, table, selection={"temperatures": [1.0, 2.0], "max_k": 12, "draws": 12})
    return config.model_copy(update={"teacher": TeacherConfig(model=str(teacher), batch_tokens=1024)})  # bfloat16


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path, documents: Path) -> CaptureConfig:
    """Settings of a finished capture."""
    config = config_of(tiny_teacher, documents, tmp_path_factory.mktemp("captured") / "t")
    capture(config)
    return config


def doctored(config: CaptureConfig, location: Path, change: Change, identity: Identity | None = None) -> Table:
    """A table with the same sequences and changed soft labels; its bytes are intact."""
    table = Table.open(config.table)
    rows = pa.concat_tables([read(table, shard) for shard in table.shards()])
    sequences = rows.select([name for name in SEQUENCE.names if name != "split"])
    sequences = sequences.append_column("split", pa.array(["train"] * len(rows)))
    labels = [change(decode(rows.slice(i, 1), table.numbering)) for i in range(len(rows))]
    tokenizer = location.with_suffix(".tokenizer")
    tokenizer.mkdir()
    new = Table.create(str(location), identity or table.identity, pa.schema([]), table.numbering, tokenizer)
    with ShardWriter(new, 8) as writer:
        writer.append(sequences, SoftLabels.concatenate(labels))
        writer.commit({"operation": "doctor"})
    return new.newest()


def check(table: Table, config: CaptureConfig, sequences: int = 12, seed: int = 0) -> Recheck:
    return recheck(table, config.teacher, sequences, seed)


def test_an_intact_table_agrees_with_its_teacher_in_any_batches(captured: CaptureConfig):
    table = Table.open(captured.table)
    for seed, tokens in enumerate((128, 700, 4096)):
        config = captured.model_copy(update={"teacher": captured.teacher.model_copy(update={"batch_tokens": tokens})})
        found = check(table, config, seed=seed)
        assert found.disagreements == ()
        assert found.sequences == 12
        logprobs = found.agreements[0]
        assert 0 <= logprobs.noise.mean <= logprobs.noise.maximum
        assert 0 <= logprobs.noise.most <= logprobs.noise.maximum
        assert logprobs.table.mean < 2 * logprobs.noise.mean + 1 / 64
        assert 0 < found.outside < 1
        assert found.lost > 0


def shifted(labels: SoftLabels) -> SoftLabels:
    """Soft labels in which each position has those of the position before it."""
    head, tail = (np.repeat(np.arange(labels.positions), counts) for counts in (labels.head_counts, labels.tail_counts))
    order = np.roll(np.arange(labels.positions), 1)
    heads, tails = (np.concatenate([np.flatnonzero(rows == i) for i in order]) for rows in (head, tail))
    return SoftLabels(
        head_counts=labels.head_counts[order],
        head_ids=labels.head_ids[heads],
        head_logprobs=labels.head_logprobs[heads],
        tail_counts=labels.tail_counts[order],
        tail_ids=labels.tail_ids[tails],
        tail_draws=labels.tail_draws[tails],
        tail_logprobs=labels.tail_logprobs[tails],
        tail_log_masses=labels.tail_log_masses[:, order],
        entropies=labels.entropies[order],
        next_logprobs=labels.next_logprobs[order],
    )


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (shifted, None),
        (lambda labels: replace(labels, head_ids=(labels.head_ids + 7) % 500), "log-probabilities"),
        (
            lambda labels: replace(labels, tail_log_masses=labels.tail_log_masses[[0, 0]]),
            "log-probabilities outside the head",
        ),
        (lambda labels: replace(labels, entropies=labels.entropies * 1.2), "entropies"),
        (
            lambda labels: replace(labels, next_logprobs=np.roll(labels.next_logprobs, 1)),
            "log-probabilities of the next tokens",
        ),
    ],
    ids=["shifted", "ids", "temperature", "entropies", "next"],
)
def test_false_soft_labels_are_found(captured: CaptureConfig, tmp_path: Path, change: Change, name: str | None):
    found = check(doctored(captured, tmp_path / "t", change), captured)
    assert len(found.disagreements) >= 10
    worst = found.disagreements[0]
    assert worst.mean > worst.allowed
    assert name in (None, worst.name)
    message = str(disagreement(found))
    assert f"document {worst.document}, chunk {worst.chunk}" in message
    assert f"token {worst.position}" in message


def test_one_wrong_sequence_is_named(captured: CaptureConfig, tmp_path: Path):
    numbers = iter(range(1000))
    table = doctored(captured, tmp_path / "t", lambda labels: shifted(labels) if next(numbers) == 3 else labels)
    rows = pa.concat_tables([read(table, shard, ["document_id", "chunk"]) for shard in table.shards()]).to_pylist()
    (found,) = check(table, captured, sequences=1000).disagreements
    assert (found.document, found.chunk) == (rows[3]["document_id"], rows[3]["chunk"])


def test_another_teachers_table_is_refused_and_disagrees_if_its_identity_is_forged(
    captured: CaptureConfig, tiny_teacher: Path, documents: Path, tmp_path: Path
):
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher)
    torch.manual_seed(1)
    for weight in model.parameters():
        weight.data += 0.02 * weight.std() * torch.randn_like(weight)
    other = tmp_path / "other"
    model.save_pretrained(other)
    for file in tiny_teacher.glob("*token*"):
        (other / file.name).write_bytes(file.read_bytes())
    config = config_of(other, documents, tmp_path / "o")
    capture(config)
    with pytest.raises(ProvenanceError, match=r"teacher\.files\.model\.safetensors"):
        check(Table.open(config.table), captured)
    forged = doctored(config, tmp_path / "t", lambda labels: labels, Table.open(captured.table).identity)
    assert len(check(forged, captured).disagreements) >= 10


def test_a_narrowed_table_agrees_within_its_own_tolerance(captured: CaptureConfig, tmp_path: Path):
    smaller = ReprocessConfig.model_validate(
        {"source": captured.table, "destination": str(tmp_path / "t"), "selection": {"max_k": 4}}
    )
    reprocess(smaller)
    table = Table.open(str(tmp_path / "t"))
    assert table.identity.derived_from is not None
    assert check(table, captured, sequences=30).disagreements == ()


def test_nan_logits_in_any_batch_are_an_error(captured: CaptureConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    logits = TransformersTeacher.logits

    def fails_in_groups_of_three(
        self: TransformersTeacher, sequences: Sequence[Any], positions: Any
    ) -> Iterator[torch.Tensor]:
        for chunk in logits(self, sequences, positions):
            yield chunk * torch.nan if len(sequences) == 3 else chunk

    monkeypatch.setattr(TransformersTeacher, "logits", fails_in_groups_of_three)
    with pytest.raises(TeacherError, match="not give a probability distribution"):
        check(doctored(captured, tmp_path / "t", shifted), captured)


@pytest.mark.long
def test_a_false_alarm_is_rare(tiny_teacher: Path, documents: Path, tmp_path: Path):
    """Not one false alarm in eighty checks, of tables captured in various batches and checked in others."""
    for budget in (150, 300, 1024, 4096):
        config = config_of(tiny_teacher, documents, tmp_path / str(budget))
        config = config.model_copy(update={"teacher": config.teacher.model_copy(update={"batch_tokens": budget})})
        capture(config)
        table = Table.open(config.table)
        for seed in range(20):
            tokens = (128, 333, 777, 2048)[seed % 4]
            checked = config.model_copy(update={"teacher": config.teacher.model_copy(update={"batch_tokens": tokens})})
            assert check(table, checked, sequences=(4, 12, 32)[seed % 3], seed=seed).disagreements == ()
