"""Token ids are those of tokenizer.json, whatever rules transformers has for the tokenizer's class or the model."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from softlabel.pipeline.capturing.job import resolve
from softlabel.pipeline.config.capture import CaptureConfig, SequencesConfig, TeacherConfig
from softlabel.pipeline.config.distill import DistillConfig
from softlabel.pipeline.config.evaluate import EvaluateConfig
from softlabel.pipeline.config.train import StudentConfig
from softlabel.pipeline.distillation import distill_in_stages
from softlabel.pipeline.evaluation.evaluate import evaluate
from softlabel.pipeline.models.checkpoint import Checkpoint
from softlabel.pipeline.sequences.tokenizer import DocumentTokenizer, tokenizer_files
from softlabel.pipeline.training.train import train
from softlabel.storage.errors import StudentError, TeacherError
from tests.conftest import ROOT
from tests.pipeline.building import built
from tests.pipeline.captured import make_table
from tests.pipeline.trainings import settings

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = [
    "In 2024 there were 12345 rings.",
    "def f(x):\n    return x+10000",
    "Cafe\N{COMBINING ACUTE ACCENT}  and   spaces",
    "I'll SAY it's\n\n\n \t done",
]


Rules = Callable[[dict[str, Any]], None]


def split(rules: dict[str, Any]) -> None:
    """As tokenizers do that never merge digits; this one never merges an e with another letter."""
    apart = {"type": "Split", "pattern": {"String": "e"}, "behavior": "Isolated", "invert": False}
    rules["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [apart, rules["pre_tokenizer"]]}


def lower_case(rules: dict[str, Any]) -> None:
    rules["normalizer"] = {"type": "Lowercase"}


def prefix_space(rules: dict[str, Any]) -> None:
    rules["pre_tokenizer"]["add_prefix_space"] = True


def no_merges(rules: dict[str, Any]) -> None:
    rules["model"]["merges"] = rules["model"]["merges"][:20]


def nothing(rules: dict[str, Any]) -> None:
    pass


RULES: list[Rules] = [split, lower_case, prefix_space, no_merges, nothing]
KINDS = ["GPT2Tokenizer", "Qwen2Tokenizer", "LlamaTokenizerFast", "TokenizersBackend", None]


def changed(folder: Path, teacher: Path, rules: Rules, kind: str | None, **config: Any) -> Path:
    """A copy of a model with other rules in its tokenizer.json, and another class in its tokenizer_config.json."""
    shutil.copytree(teacher, folder)
    file, settings_file = folder / "tokenizer.json", folder / "tokenizer_config.json"
    content = json.loads(file.read_text())
    rules(content)
    file.write_text(json.dumps(content))
    named = json.loads(settings_file.read_text()) | {"tokenizer_class": kind}
    if kind is None:
        del named["tokenizer_class"]
    settings_file.write_text(json.dumps(named))
    model = folder / "config.json"
    model.write_text(json.dumps(json.loads(model.read_text()) | config))
    return folder


def ids(tokenizer_json: Path, texts: list[str] = TEXTS) -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(tokenizer_json))
    return [tokenizer.encode(text).ids for text in texts]


def captured(folder: Path, texts: list[str] = TEXTS) -> list[list[int]]:
    """Each text's ids in a capture, without the end token."""
    tokenizer = DocumentTokenizer(Checkpoint.find(TeacherConfig(model=str(folder))), SequencesConfig(), "text")
    encoded, refused = tokenizer.encode(texts)
    assert not refused
    ends = encoded.lengths.cumsum().tolist()
    rows = [encoded.ids[end - length : end].tolist() for end, length in zip(ends, encoded.lengths, strict=True)]
    prefix = tokenizer.prefix.tolist()
    rows = [prefix * begins + row for begins, row in zip(encoded.begins.tolist(), rows, strict=True)]
    assert all(row[-1] == 2 for row in rows), "each text ends with the end token"
    return [row[:-1] for row in rows]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rules", RULES, ids=lambda rules: rules.__name__)
def test_a_capture_has_the_ids_of_tokenizer_json(
    rules: Rules, kind: str | None, tiny_teacher: Path, tmp_path: Path
) -> None:
    folder = changed(tmp_path / "teacher", tiny_teacher, rules, kind)
    assert captured(folder) == ids(folder / "tokenizer.json")


def test_ids_are_never_random(tiny_teacher: Path, tmp_path: Path) -> None:
    """Dropout of merges is a help for training, which some files still have."""

    def dropout(rules: dict[str, Any]) -> None:
        rules["model"]["dropout"] = 0.9

    folder = changed(tmp_path / "teacher", tiny_teacher, dropout, "TokenizersBackend")
    assert captured(folder) == ids(tiny_teacher / "tokenizer.json")


@pytest.mark.parametrize("file", [None, "tokenizer.model", "vocab.tiktoken", "tekken.json"])
def test_a_tokenizer_without_tokenizer_json_is_an_error_that_says_how_to_convert_it(
    file: str | None, tiny_teacher: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    (folder / "tokenizer.json").unlink()
    if file:
        (folder / file).write_bytes(b"\x0a\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    with pytest.raises(TeacherError, match=rf"(?s)expected:\s+tokenizer\.json.*{file or ''}.*can be converted"):
        captured(folder)


@pytest.mark.parametrize("model_type", ["qwen2", "gpt2", "phi3", "gemma2"])
def test_a_capture_has_the_ids_of_tokenizer_json_for_every_kind_of_model(
    model_type: str, tiny_teacher: Path, tmp_path: Path
) -> None:
    folder = changed(tmp_path / "teacher", tiny_teacher, split, None, model_type=model_type, architectures=None)
    assert captured(folder) == ids(folder / "tokenizer.json")


@pytest.mark.parametrize(("model_type", "is_warned"), [("qwen2", True), ("llama", False)])
def test_a_teacher_that_can_not_be_pruned_because_of_its_tokenizer_is_warned_about_before_the_capture(
    model_type: str, is_warned: bool, tiny_teacher: Path, tmp_path: Path
) -> None:
    folder = changed(tmp_path / "teacher", tiny_teacher, split, None, model_type=model_type, architectures=None)
    config = {"documents": str(ROOT / "README.md"), "table": str(tmp_path / "t"), "teacher": {"model": str(folder)}}
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        resolve(CaptureConfig.model_validate(config))
    found = [str(each.message) for each in warned if "no student can be pruned from it" in str(each.message)]
    assert len(found) == is_warned
    assert all("model_type qwen2" in each for each in found)


def test_settings_of_added_tokens_are_those_of_tokenizer_json(tiny_teacher: Path, tmp_path: Path) -> None:
    """A token that takes the space around it changes the ids of that text."""

    def ordinary(rules: dict[str, Any]) -> None:
        rules["added_tokens"][1] |= {"special": False, "lstrip": True}

    folder = changed(tmp_path / "teacher", tiny_teacher, ordinary, "GPT2Tokenizer")
    file = folder / "tokenizer_config.json"
    other = {"content": "<|im_start|>", "lstrip": False, "rstrip": True, "normalized": False, "special": False}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"added_tokens_decoder": {"1": other}}))
    texts = ["a  <|im_start|>  b", "a<|im_start|>b"]
    assert captured(folder, texts) == ids(folder / "tokenizer.json", texts)


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "Qwen2Tokenizer", "TokenizersBackend", None])
def test_transformers_loads_the_same_ids_from_a_tables_tokenizer(
    kind: str | None, tiny_teacher: Path, tmp_path: Path
) -> None:
    folder = changed(tmp_path / "teacher", tiny_teacher, split, kind)
    saved = tmp_path / "saved"
    saved.mkdir()
    checkpoint = Checkpoint.find(TeacherConfig(model=str(folder)))
    DocumentTokenizer(checkpoint, SequencesConfig(), "text").save(saved)
    loaded = AutoTokenizer.from_pretrained(saved)
    assert [loaded(text).input_ids for text in TEXTS] == ids(folder / "tokenizer.json")
    assert loaded.eos_token_id == checkpoint.tokenizer.eos_token_id == 2
    assert loaded.chat_template == checkpoint.tokenizer.chat_template


def test_the_files_of_a_tokenizer_that_transformers_loads_right_are_copied_unchanged(
    tiny_teacher: Path, tmp_path: Path
) -> None:
    tokenizer = DocumentTokenizer(Checkpoint.find(TeacherConfig(model=str(tiny_teacher))), SequencesConfig(), "text")
    tokenizer.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        path.name: path.read_bytes() for path in tokenizer_files(tiny_teacher)
    }


SMALL = {
    "vocab_size": 512,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 2048,
}


def student_config(folder: Path, model_type: str) -> str:
    path = folder / f"{model_type}.json"
    path.write_text(json.dumps(SMALL | {"model_type": model_type}))
    return str(path)


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_transformers_loads_the_same_ids_from_a_finished_student(
    model_type: str, tiny_teacher: Path, tmp_path: Path
) -> None:
    teacher = changed(tmp_path / "teacher", tiny_teacher, split, "GPT2Tokenizer")
    saved = tmp_path / "saved"
    saved.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):  # as older tables have them
        shutil.copy(teacher / file, saved)
    table = make_table(tmp_path / "table", tiny_teacher, train=4, held_out=2, tokenizer=saved)
    config = settings(
        table,
        tmp_path / "student",
        student={"layers": None, "config": student_config(tmp_path, model_type)},
        optimizer={"max_steps": 1},
    )
    folder = Path(train(config).output)
    loaded = AutoTokenizer.from_pretrained(folder)
    assert [loaded(text).input_ids for text in TEXTS] == ids(teacher / "tokenizer.json")
    assert loaded.eos_token_id == 2
    report = tmp_path / "report"
    assert evaluate(EvaluateConfig(table=table.location, students=(str(folder),), report=str(report), device="cpu"))


def test_a_student_whose_kind_of_model_has_rules_of_its_own_is_refused_before_capture_and_training(
    tiny_teacher: Path, tmp_path: Path
) -> None:
    """Transformers has one tokenizer for all models of this type, whatever the files say."""
    student = {"config": student_config(tmp_path, "qwen2")}
    table = make_table(tmp_path / "table", tiny_teacher, train=4, held_out=0)
    built(StudentConfig(**student), table)
    with pytest.raises(StudentError, match=r"(?s)would split text differently.*model_type qwen2"):
        train(settings(table, tmp_path / "student", student={"layers": None, **student}))
    with pytest.raises(StudentError, match=r"(?s)would split text differently.*model_type qwen2"):
        distill_in_stages(
            DistillConfig(
                documents=str(ROOT / "README.md"),
                table=str(tmp_path / "new"),
                teacher={"model": str(tiny_teacher)},
                student=student,
                output=str(tmp_path / "run"),
            ),
            capture=pytest.fail,
            train=pytest.fail,
            evaluate=pytest.fail,
        )
