"""Sequences longer than the teacher can read are refused before any document is read."""

from pathlib import Path

import pytest
from transformers import CTRLConfig, GPT2Config, LlamaConfig, OPTConfig, PretrainedConfig, RobertaConfig

from softlabel.pipeline.capturing.capture import capture
from softlabel.pipeline.config.capture import CaptureConfig, SequencesConfig, TeacherConfig
from softlabel.pipeline.models.checkpoint import Checkpoint
from softlabel.pipeline.models.context_length import longest
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
        assert longest(checkpoint, SequencesConfig(max_tokens=1024)) == 1024
        return
    assert longest(checkpoint, SequencesConfig(max_tokens=limit)) == limit
    with pytest.raises(UsageError, match=f"of at most {limit}"):
        longest(checkpoint, SequencesConfig(max_tokens=limit + 1))


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
