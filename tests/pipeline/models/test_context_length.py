"""Sequences longer than the teacher can read are refused before any document is read."""

from pathlib import Path

import pytest
from transformers import (
    CTRLConfig,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen3Config,
    RobertaConfig,
)

from softlabel.pipeline.capturing.capture import capture
from softlabel.pipeline.config.capture import CaptureConfig, SequencesConfig, TeacherConfig
from softlabel.pipeline.config.estimate import EstimateConfig
from softlabel.pipeline.estimation.estimate import estimate
from softlabel.pipeline.models.checkpoint import Checkpoint
from softlabel.pipeline.models.context_length import require_positions, require_trained_positions
from softlabel.storage.errors import UsageError

SMALL = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
ROBERTA = {**SMALL, "intermediate_size": 64, "is_decoder": True, "max_position_embeddings": 64, "pad_token_id": 1}


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (GPT2Config(vocab_size=512, n_embd=32, n_layer=1, n_head=2, n_positions=64), 64),
        (OPTConfig(**SMALL, ffn_dim=64, max_position_embeddings=64), 64),
        (CTRLConfig(vocab_size=512, n_embd=32, dff=64, n_layer=1, n_head=2, n_positions=64), 64),
        (RobertaConfig(**ROBERTA), 64 - 1 - 1),
        (LlamaConfig(**SMALL, intermediate_size=64, max_position_embeddings=64), None),
        (LlamaConfig(**SMALL, intermediate_size=64, max_position_embeddings=512), None),
    ],
    ids=["gpt2", "opt", "ctrl", "roberta", "llama", "llama with a row a position in its vocabulary"],
)
def test_only_a_position_table_limits_the_length(config: PretrainedConfig, limit: int | None, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    checkpoint = Checkpoint(tmp_path, None, False, "float32")
    if limit is None:
        require_positions(checkpoint, SequencesConfig(max_tokens=1024))
        return
    require_positions(checkpoint, SequencesConfig(max_tokens=limit))
    with pytest.raises(UsageError, match=f"of at most {limit}"):
        require_positions(checkpoint, SequencesConfig(max_tokens=limit + 1))


YARN = {"rope_type": "yarn", "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
ROPE = {**SMALL, "intermediate_size": 64, "max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (LlamaConfig(**ROPE), 64),
        (LlamaConfig(**ROPE, rope_scaling={"rope_type": "linear", "factor": 4.0}), 256),
        (LlamaConfig(**ROPE, rope_scaling={"type": "dynamic", "factor": 2.0}), 128),
        (LlamaConfig(**ROPE, rope_scaling={"rope_type": "yarn", "factor": 4.0}), 256),
        (Qwen3Config(**ROPE, rope_scaling=YARN | {"original_max_position_embeddings": 32}), 128),
        (Qwen3Config(**ROPE, rope_scaling=YARN | {"original_max_position_embeddings": 16}), 64),
        (LlamaConfig(**ROPE, rope_scaling=LLAMA3), 64),
        (Gemma3TextConfig(**ROPE, rope_scaling={"rope_type": "linear", "factor": 8.0}), 512),
        (FalconConfig(**SMALL, max_position_embeddings=64, alibi=True), None),
        (MambaConfig(vocab_size=512, hidden_size=32, num_hidden_layers=1), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, PretrainedConfig) else str(value),
)
def test_sequences_longer_than_the_teacher_is_meant_for_are_refused_for_a_new_table(
    config: PretrainedConfig, limit: int | None, tmp_path: Path
) -> None:
    config.save_pretrained(tmp_path)
    checkpoint = Checkpoint(tmp_path, None, False, "float32")
    if limit is None:
        require_trained_positions(checkpoint, SequencesConfig(max_tokens=1 << 20), is_new=True)
        return
    require_trained_positions(checkpoint, SequencesConfig(max_tokens=limit), is_new=True)
    with pytest.raises(UsageError, match=rf"(?s)not meant for.*of at most {limit}"):
        require_trained_positions(checkpoint, SequencesConfig(max_tokens=limit + 1), is_new=True)


def test_a_longer_capture_is_refused_and_a_table_that_has_one_gets_a_warning(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = tmp_path / "documents.jsonl"
    documents.write_text('{"id": 1, "text": "Mars is red."}\n')
    teacher, sequences = {"model": str(tiny_teacher), "device": "cpu"}, {"max_tokens": 4096}
    config = CaptureConfig(documents=str(documents), table=str(tmp_path / "t"), teacher=teacher, sequences=sequences)
    with pytest.raises(UsageError, match="of at most 2048"):
        capture(config)
    with pytest.raises(UsageError, match="of at most 2048"):
        estimate(EstimateConfig(**config.model_dump()))
    with monkeypatch.context() as earlier:
        earlier.setattr("softlabel.pipeline.teachers.kind.require_trained_positions", lambda *_, **__: None)
        capture(config)
    documents.write_text('{"id": 2, "text": "Saturn has rings."}\n')
    with pytest.warns(UserWarning, match="of at most 2048"):
        assert capture(config).sequences == 1


def test_a_capture_refuses_sequences_that_are_too_long_before_it_reads_documents(
    tiny_teacher: Path, documents: Path, tmp_path: Path
) -> None:
    for path in tiny_teacher.iterdir():
        if path.name != "config.json":
            (tmp_path / path.name).symlink_to(path)
    shape = GPT2Config(
        vocab_size=512, n_embd=32, n_layer=1, n_head=2, n_positions=64, architectures=["GPT2LMHeadModel"]
    )
    shape.save_pretrained(tmp_path)
    stages: list[str] = []
    config = CaptureConfig(
        documents=str(documents), table=str(tmp_path / "table"), teacher=TeacherConfig(model=str(tmp_path))
    )
    with pytest.raises(UsageError, match="can't read sequences of this length"):
        capture(config, lambda progress: stages.append(progress.stage))
    assert not stages
