"""A row decodes to the text that was given, and has only tokens that the teacher can read."""

import json
import shutil
import string
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from softlabel.pipeline.capturing.capture import capture
from softlabel.pipeline.config.capture import CaptureConfig, TeacherConfig
from softlabel.pipeline.models.checkpoint import Checkpoint
from softlabel.storage.table import Table
from tests.pipeline.classifiers import save_classifier
from tests.pipeline.sequences.test_tokenizer import captured, pair

TEXT = ["Name a planet: Saturn. Mars is red, and  Jupiter has 92 moons.\n"] * 5
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
SPACES = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]


def _replaced() -> Tokenizer:
    """As Llama 2: the space is put before the text, and before the text after each special token."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(SPACES)
    return backend


def _metaspace(scheme: str, model: object) -> Tokenizer:
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation(), pre_tokenizers.Metaspace(prepend_scheme=scheme)]
        if scheme == "first"
        else [pre_tokenizers.Metaspace(prepend_scheme=scheme)]
    )
    backend.decoder = decoders.Sequence(SPACES)
    return backend


def _bytes() -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    return backend


BACKENDS: dict[str, Callable[[], Tokenizer]] = {
    "prepended": _replaced,
    "first": lambda: _metaspace("first", models.BPE(unk_token="<unk>", byte_fallback=True)),
    "always": lambda: _metaspace("always", models.BPE(unk_token="<unk>", byte_fallback=True)),
    "unigram": lambda: _metaspace("always", models.Unigram()),
    "bytes": _bytes,
    "never": lambda: _metaspace("never", models.BPE(unk_token="<unk>", byte_fallback=True)),
}


@pytest.fixture(params=BACKENDS)
def teacher(request: pytest.FixtureRequest, tiny_teacher: Path, tmp_path: Path) -> Checkpoint:
    """A teacher with a tokenizer that puts a space before a text (the last does not)."""
    backend = BACKENDS[request.param]()
    settings = {"special_tokens": SPECIAL, "vocab_size": 300, "show_progress": False}
    alphabet = [*string.printable, "▁"]
    kind = trainers.UnigramTrainer if request.param == "unigram" else trainers.BpeTrainer
    more = {"unk_token": "<unk>"} if request.param == "unigram" else {}
    if request.param == "bytes":
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(TEXT, kind(**settings, **more, initial_alphabet=alphabet))
    folder = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)
    return Checkpoint.find(TeacherConfig(model=str(folder)))


PAIRS = [
    ("Name a planet: ", "Saturn"),
    ("Name a planet:", " Saturn"),
    ("Name a plan", "et: Mars"),
    ("Mars is red,  ", " and  Jupiter"),
    ("Name a planet:\n", "Saturn\n"),
    ("", "Saturn"),
]


def test_a_prompt_and_its_completion_decode_to_what_was_given(teacher: Checkpoint, tmp_path: Path) -> None:
    rows, _, rejects = captured(teacher, tmp_path, *(pair(*texts) for texts in PAIRS))
    assert not rejects
    assert [teacher.tokenizer.decode(row["token_ids"]) for row in rows] == [f"{a}{b}</s>" for a, b in PAIRS]
    prompts = [teacher.tokenizer.encode(prompt, add_special_tokens=False) for prompt, _ in PAIRS]
    assert [row["token_ids"][: len(prompt)] for row, prompt in zip(rows, prompts, strict=True)] == prompts
    assert all(not any(row["loss_mask"][: len(prompt)]) for row, prompt in zip(rows, prompts, strict=True))


NAMED = ["a<|im_end|>b", "a <|im_end|> b", "<s>", "</s> b", "<s><s>Mars", "is <|im_start|>"]


def test_a_text_with_the_name_of_a_special_token_decodes_to_what_was_given(teacher: Checkpoint, tmp_path: Path) -> None:
    texts = [f"Mars {name} red" for name in NAMED]
    rows, _, rejects = captured(teacher, tmp_path, *({"text": text} for text in texts))
    assert not rejects
    assert [teacher.tokenizer.decode(row["token_ids"]) for row in rows] == [f"{text}</s>" for text in texts]


def test_a_chat_with_the_name_of_a_special_token_decodes_to_the_rendered_chat(
    teacher: Checkpoint, tmp_path: Path
) -> None:
    texts = [f"Mars {name} red" for name in ("X", *NAMED)]
    answers = [{"role": "assistant", "content": f"Saturn {text}."} for text in texts]
    chats = [[{"role": "user", "content": text}, answer] for text, answer in zip(texts, answers, strict=True)]
    rows, _, rejects = captured(teacher, tmp_path, *({"messages": chat} for chat in chats))
    assert not rejects
    decode = teacher.tokenizer.decode
    whole = [decode(row["token_ids"]) for row in rows]
    assert whole[1:] == [whole[0].replace("X", name) for name in NAMED]
    wanted = [decode([i for i, m in zip(row["token_ids"], row["loss_mask"], strict=True) if m]) for row in rows]
    assert wanted[1:] == [wanted[0].replace("X", name) for name in NAMED]


@pytest.mark.parametrize("special", [False, True])
def test_a_document_with_a_token_that_the_teacher_has_no_row_for_is_rejected(
    special: bool, tiny_teacher: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    tokenizer = Checkpoint.find(TeacherConfig(model=str(folder))).tokenizer
    spare = [f"<spare{i}>" for i in range(12)]
    tokenizer.backend_tokenizer.add_tokens([*spare, AddedToken("<extra>", special=special)])
    tokenizer.save_pretrained(folder)
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id("<extra>") == 512, "the first without a row"
    documents = tmp_path / "documents.jsonl"
    texts = ["Mars is red.", "Mars <extra> is red.", "Mars <spare11> is red."]
    documents.write_text("".join(json.dumps({"id": str(i), "text": text}) + "\n" for i, text in enumerate(texts)))
    config = CaptureConfig(
        documents=str(documents),
        table=str(tmp_path / "table"),
        teacher={"model": str(folder), "device": "cpu"},
        sequences={"special_tokens": "parse"},
    )
    report = capture(config)
    assert (report.sequences, report.rejects) == (2, 1)
    assert (
        "no embedding for the token '<extra>' (its id is 512, and there are 512 rows)"
        in Path(report.rejects_file).read_text()
    )
    stored = Table.open(str(tmp_path / "table")).scan().collect()
    assert sorted(stored["document_id"].to_list()) == ["0", "2"]
    assert captured(Checkpoint.find(config.teacher), tmp_path, {"text": texts[0]}, special_tokens="parse")[2] == []


def test_a_classifiers_document_with_such_a_token_is_rejected(tiny_teacher: Path, tmp_path: Path) -> None:
    folder = save_classifier(tmp_path / "teacher", tiny_teacher)
    tokenizer = Checkpoint.find(TeacherConfig(model=str(folder))).tokenizer
    tokenizer.backend_tokenizer.add_tokens([f"<spare{i}>" for i in range(13)])
    tokenizer.save_pretrained(folder)
    documents = tmp_path / "documents.jsonl"
    documents.write_text('{"id": "0", "text": "Mars is red."}\n{"id": "1", "text": "Mars <spare12> is red."}\n')
    teacher = {"model": str(folder), "device": "cpu"}
    report = capture(CaptureConfig(documents=str(documents), table=str(tmp_path / "table"), teacher=teacher))
    assert (report.sequences, report.rejects) == (1, 1)
    assert "no embedding for the token" in Path(report.rejects_file).read_text()
