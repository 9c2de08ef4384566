"""The teacher's logits are those of its own forward pass at each position, in any batch."""

import hashlib
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    MixtralConfig,
    OPTConfig,
    XLNetConfig,
)

from softlabel.pipeline.config.capture import TeacherConfig
from softlabel.pipeline.models import files as model_folder
from softlabel.pipeline.models.checkpoint import Checkpoint
from softlabel.pipeline.teachers.teacher import TransformersTeacher, each_batch
from softlabel.storage.errors import SoftlabelError, TeacherError, UsageError

torch.set_num_threads(1)

SMALL = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3}
OTHERS = {
    "gemma2": Gemma2Config(**SMALL, **HEADS, head_dim=16, final_logit_softcapping=5.0, sliding_window=8),
    "granite": GraniteConfig(**SMALL, **HEADS, logits_scaling=8.0),
    "mixtral": MixtralConfig(**SMALL, **HEADS, num_local_experts=2),
    "gpt2": GPT2Config(vocab_size=512, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3),
}


def settings(folder: Path, **more: object) -> TeacherConfig:
    return TeacherConfig(**{"model": str(folder), "dtype": "float32", "device": "cpu", **more})


def texts(count: int = 7, vocabulary: int = 500) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Sequences of different lengths, and some positions of each."""
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, vocabulary, 2 + 9 * i, dtype=np.int32) for i in range(count)]
    positions = [np.flatnonzero(rng.random(len(s)) < 0.7).astype(np.int32) for s in sequences]
    return sequences, [p[p > 0] for p in positions]


def another(folder: Path, tiny_teacher: Path, config: object) -> Path:
    """A random model of another architecture, with the tiny teacher's tokenizer."""
    shutil.copytree(tiny_teacher, folder)
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def own_logits(folder: Path, sequence: np.ndarray) -> torch.Tensor:
    """Logits of plain transformers for one sequence, unpadded."""
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(torch.from_numpy(sequence[None].astype(np.int64))).logits[0]


def assert_logits_are_those_of_transformers(teacher: TransformersTeacher) -> None:
    sequences, positions = texts()
    logits = torch.cat(list(teacher.logits(sequences, positions)))
    assert logits.dtype == torch.float32
    folder, pairs = teacher.checkpoint.folder, zip(sequences, positions, strict=True)
    own = [own_logits(folder, sequence)[at.astype(np.int64) - 1, :500] for sequence, at in pairs]
    torch.testing.assert_close(logits, torch.cat(own), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", *OTHERS])
def test_logits_are_those_of_transformers(name: str, tiny_teacher: Path, tmp_path: Path) -> None:
    folder = tiny_teacher if name == "llama" else another(tmp_path / name, tiny_teacher, OTHERS[name])
    teacher = TransformersTeacher(settings(folder))
    assert teacher.vocabulary == 500 < teacher.checkpoint.padded_vocabulary == 512
    assert_logits_are_those_of_transformers(teacher)


def test_soft_capped_logits_stay_below_the_cap(tiny_teacher: Path, tmp_path: Path) -> None:
    teacher = TransformersTeacher(settings(another(tmp_path / "gemma", tiny_teacher, OTHERS["gemma2"])))
    logits = torch.cat(list(teacher.logits(*texts())))
    assert 4.0 < logits.abs().max() <= 5.0


def test_logits_in_chunks_are_the_same(tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list(TransformersTeacher(settings(tiny_teacher)).logits(*texts()))
    monkeypatch.setattr("softlabel.pipeline.teachers.teacher.CPU_CHUNK_BYTES", 4 * 512 * 10)
    chunks = list(TransformersTeacher(settings(tiny_teacher)).logits(*texts()))
    assert [len(chunk) for chunk in chunks[:-1]] == [10] * (len(chunks) - 1)
    torch.testing.assert_close(torch.cat(chunks), torch.cat(whole), rtol=1e-5, atol=1e-5)


def test_a_pad_token_equal_to_eos_does_not_change_logits(tiny_teacher: Path, tmp_path: Path) -> None:
    folder = tmp_path / "teacher"
    shutil.copytree(tiny_teacher, folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "<|im_end|>"}))
    sequences = [np.array([5, 6, 7, 2], np.int32), np.array([5, 2, 9, 10, 11, 2], np.int32)]
    positions = [np.arange(1, len(s), dtype=np.int32) for s in sequences]
    ours, theirs = (list(TransformersTeacher(settings(f)).logits(sequences, positions)) for f in (folder, tiny_teacher))
    assert sum(map(len, ours)) == 3 + 5
    torch.testing.assert_close(torch.cat(ours), torch.cat(theirs), rtol=0, atol=0)


class Recorder:
    """A teacher that records its batches, and runs out of memory above ``room`` tokens."""

    vocabulary = 500

    def __init__(self, room: int = 10**9) -> None:
        self.room, self.shapes = room, []

    def logits(self, sequences, positions):
        rows, longest = len(sequences), max(map(len, sequences))
        self.shapes.append((rows, longest))
        if rows * longest > self.room:
            raise torch.OutOfMemoryError("no room")
        yield torch.zeros((sum(map(len, positions)), 500))


def go_through(teacher: Recorder, batch_tokens: int) -> list[int]:
    sequences, positions = texts(30)
    seen = each_batch(teacher, sequences, positions, lambda batch, logits: (batch, list(logits)), batch_tokens)
    return [int(i) for batch, _ in seen for i in batch]


def test_batches_stay_within_the_budget_and_contain_each_sequence_once() -> None:
    teacher = Recorder()
    assert sorted(go_through(teacher, 600)) == list(range(30))
    assert all(rows * longest <= 600 for rows, longest in teacher.shapes)
    assert teacher.shapes[0][1] == 2 + 9 * 29, "the longest come first, so that lack of memory shows at once"


def test_out_of_memory_halves_the_batch_and_goes_on() -> None:
    teacher = Recorder(room=700)
    assert sorted(go_through(teacher, 4000)) == list(range(30))
    assert sum(rows * longest > 700 for rows, longest in teacher.shapes) <= 4


def test_a_sequence_that_does_not_fit_in_memory_is_an_error() -> None:
    with pytest.raises(TeacherError, match="not have enough memory for a single sequence"):
        go_through(Recorder(room=100), 4000)


def test_the_identity_depends_on_the_files_and_the_dtype(tiny_teacher: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_teacher, tmp_path / "elsewhere")
    identity = Checkpoint.find(settings(tiny_teacher)).identity
    assert set(identity.files) == {"config.json", "model.safetensors"}
    assert Checkpoint.find(settings(copy)).identity == identity
    assert Checkpoint.find(settings(copy, dtype="bfloat16")).identity != identity
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert Checkpoint.find(settings(copy)).identity != identity


def test_a_file_is_hashed_again_only_after_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_folder, "_HASHES", {})
    read: list[str] = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, name: read.append(file.name) or digest(file, name))
    path = tmp_path / "weights"

    def is_read() -> bool:
        before = len(read)
        assert model_folder.sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()
        return len(read) > before

    path.write_bytes(b"one")
    assert [is_read(), is_read()] == [True, True], "written a moment ago, it may be written again unseen"
    monkeypatch.setattr(model_folder, "_MIN_AGE_SECONDS", -1.0)
    assert [is_read(), is_read()] == [True, False]
    for content in (b"two", b"six", b"ten"):  # all as long, and as old by their own account
        time.sleep(0.02)
        path.write_bytes(content)
        os.utime(path, (1, 1))
        assert [is_read(), is_read()] == [True, False]
    path.with_name("other").write_bytes(b"sum")
    path.with_name("other").rename(path)
    assert [is_read(), is_read()] == [True, False]


def damaged(folder: Path, tiny_teacher: Path, how: str) -> Path:
    """The tiny teacher, damaged in this way."""
    if how == "missing":
        return folder
    if how in ("empty", "weights of another kind"):
        folder.mkdir()
    else:
        shutil.copytree(tiny_teacher, folder)
    config, weights = folder / "config.json", folder / "model.safetensors"
    match how:
        case "weights of another kind":
            shutil.copy(tiny_teacher / "config.json", config)
            (folder / "pytorch_model.bin").write_bytes(b"pickle")
        case "garbage config":
            config.write_text("{")
        case "garbage weights":
            weights.write_bytes(b"garbage" * 100)
        case "truncated weights":
            weights.write_bytes(weights.read_bytes()[:-1000])
        case "garbage tokenizer":
            (folder / "tokenizer.json").write_text('{"model": 3}')
        case "an encoder":
            config.write_text(json.dumps({"model_type": "bert", "architectures": ["BertForMaskedLM"]}))
        case "code of its own":
            own = {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}
            config.write_text(json.dumps(json.loads(config.read_text()) | own))
            (folder / "own.py").write_text("raise SystemExit('this was run')")
        case "no tokenizer":
            for path in folder.glob("*token*"):
                path.unlink()
        case "a layer too many":
            config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 3}))
    return folder


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("missing", "can't find the teacher"),
        ("empty", "this folder does not contain a model"),
        ("weights of another kind", "pytorch_model.bin"),
        ("garbage config", "config.json can't be read"),
        ("garbage weights", "can't be loaded"),
        ("truncated weights", "can't be loaded"),
        ("garbage tokenizer", "tokenizer can't be loaded"),
        ("an encoder", "neither a causal language model nor"),
        ("a layer too many", "lack some of its weights"),
        ("code of its own", r"teacher\.trust_remote_code"),
        ("no tokenizer", "the model and its tokenizer again"),
    ],
)
def test_an_unusable_teacher_is_an_error_on_one_screen(
    how: str, reason: str, tiny_teacher: Path, tmp_path: Path
) -> None:
    folder = damaged(tmp_path / "teacher", tiny_teacher, how)
    with pytest.raises(TeacherError, match=reason) as caught:
        TransformersTeacher(settings(folder))
    message = str(caught.value)
    assert all(part in message for part in ("expected:", "found:", "where:", "what to do:", str(folder)))
    assert len(message.splitlines()) < 10


BERT = {**SMALL, "num_attention_heads": 2, "initializer_range": 0.3}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (BertConfig(**BERT), "sees the token that it should predict"),
        (
            XLNetConfig(vocab_size=512, d_model=32, n_layer=2, n_head=2, d_inner=64),
            "sees the token that it should predict",
        ),
        (OPTConfig(**SMALL, ffn_dim=64, num_attention_heads=2), "can't be run separately from its base model"),
    ],
    ids=["bert", "xlnet", "opt"],
)
def test_an_architecture_that_can_not_be_a_teacher_is_refused(
    config: object, reason: str, tiny_teacher: Path, tmp_path: Path
) -> None:
    with pytest.raises(TeacherError, match=reason):
        TransformersTeacher(settings(another(tmp_path / "teacher", tiny_teacher, config)))


def test_bert_that_is_a_decoder_is_a_teacher(tiny_teacher: Path, tmp_path: Path) -> None:
    folder = another(tmp_path / "bert", tiny_teacher, BertConfig(**BERT, is_decoder=True))
    assert_logits_are_those_of_transformers(TransformersTeacher(settings(folder)))


def test_the_error_for_an_attention_that_is_not_installed_names_the_setting(tiny_teacher: Path) -> None:
    with pytest.raises(TeacherError, match=r"leave out teacher\.attn_implementation"):
        TransformersTeacher(settings(tiny_teacher, attn_implementation="flash_attention_2"))


def test_a_missing_device_is_an_error(tiny_teacher: Path) -> None:
    with pytest.raises(UsageError, match="no device 'cuda:99'"):
        TransformersTeacher(settings(tiny_teacher, device="cuda:99"))


def test_a_revision_of_a_folder_is_refused(tiny_teacher: Path) -> None:
    with pytest.raises(SoftlabelError, match="a folder has no revisions"):
        Checkpoint.find(settings(tiny_teacher, revision="main"))
